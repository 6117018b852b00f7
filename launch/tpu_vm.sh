#!/usr/bin/env bash
# Training on a Cloud TPU slice, on all its hosts at once.
#   bash launch/tpu_vm.sh [--dry-run] create                                   the slice
#   bash launch/tpu_vm.sh [--dry-run] sync                                     this code and its packages, on every host
#   bash launch/tpu_vm.sh [--dry-run] run CONFIG.yaml WORKDIR [--mesh.fsdp -1 ...]   starts or resumes a run, in the background
#   bash launch/tpu_vm.sh [--dry-run] logs | stop | delete                     follow host 0; save and stop; give it back
# Set these in the environment, or here. WORKDIR is relative to SHARED.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

name=${NAME:-jax-ccm}
zone=${ZONE:-us-west4-a}
accelerator=${ACCELERATOR:-v5litepod-16} # 16 chips, 4 hosts
image=${VERSION:-v2-alpha-tpuv5-lite}    # of the TPU VM: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
spot=${SPOT:-1}                          # 1: cheaper, may be taken away with 30 s notice (train.grace)
shared=${SHARED:-}                       # an NFS export that all hosts can mount, HOST:/PATH (Filestore): all write the checkpoint

dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
everywhere() { tpu ssh "$name" --worker=all --command="$1"; }

action=${1:-help}
[ $# -eq 0 ] || shift
case $action in
create)
    options=()
    [ "$spot" != 1 ] || options+=(--spot)
    tpu create "$name" --accelerator-type="$accelerator" --version="$image" "${options[@]}"
    ;;
sync)
    if [ -z "$shared" ]; then echo "set SHARED=HOST:/PATH, a folder that all hosts of the slice can mount" >&2; exit 2; fi
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    run git archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$name":jax_ccm.tar.gz --worker=all
    everywhere "mkdir -p jax_ccm && tar -xzf jax_ccm.tar.gz -C jax_ccm"
    everywhere "cd jax_ccm && ([ -d .venv ] || python3 -m venv .venv) && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q 'jax[tpu]>=0.10.2,<0.13' -e ."
    everywhere "sudo apt-get install -qy nfs-common && sudo mkdir -p /runs && (mountpoint -q /runs || sudo mount -t nfs $shared /runs) && sudo chmod 777 /runs"
    ;;
run)
    [ $# -ge 2 ] || usage
    command=("$1" "/runs/$2" "${@:3}")
    everywhere "cd jax_ccm && { PYTHONUNBUFFERED=1 nohup bash launch/supervise.sh ${command[*]@Q} >>train.log 2>&1 </dev/null & echo \$! >train.pid; }"
    ;;
logs) tpu ssh "$name" --worker=0 --command="tail -n 100 -f jax_ccm/train.log" ;;
stop) everywhere "kill -TERM \$(cat jax_ccm/train.pid)" ;;
delete) tpu delete "$name" --quiet ;;
*) usage ;;
esac
