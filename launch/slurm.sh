#!/usr/bin/env bash
# Training on GPU nodes under SLURM: one process for each GPU, found by JAX from SLURM's own variables.
#   sbatch launch/slurm.sh CONFIG.yaml WORKDIR [--mesh.fsdp 8 ...]
#   bash launch/slurm.sh --dry-run CONFIG.yaml WORKDIR        prints what the job would run
# Options of sbatch override these: sbatch --nodes=4 --partition=NAME launch/slurm.sh ...

#SBATCH --job-name=jax_ccm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM to the processes this long before the time is up; train.grace below must fit into it.
#SBATCH --signal=TERM@120
set -euo pipefail

grace=${GRACE:-110}
# sbatch runs a copy of this file: the repository is where it was submitted from.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
. launch/common.sh

dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ $# -ge 2 ] || usage
config=$1 workdir=$2
shift 2

# One process that fails takes the others with it; --wait bounds how long after the first exit.
code=0
run srun --kill-on-bad-exit=1 --wait=60 \
    bash launch/supervise.sh "$config" "$workdir" --train.grace "$grace" "$@" || code=$?
# 75: stopped in time and saved. The same job goes on when it is scheduled again.
if [ "$code" -eq 75 ] || [ -n "$dry" ]; then
    run scontrol requeue "${SLURM_JOB_ID:-JOB}"
    exit 0
fi
exit "$code"
