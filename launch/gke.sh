#!/usr/bin/env bash
# Training on GKE (or any Kubernetes with JobSet): a TPU slice, or GPU nodes.
#   bash launch/gke.sh [--dry-run] tpu|gpu apply CONFIG.yaml WORKDIR [--mesh.fsdp -1 ...]   starts or resumes a run
#   bash launch/gke.sh [--dry-run] tpu|gpu logs|delete                      follow process 0; save and stop
# Needs the JobSet controller in the cluster, an image (launch/Dockerfile), and a volume that all hosts can write
# (ReadWriteMany, such as Filestore). Fills in the ${...} of launch/gke/tpu.yaml and gpu.yaml with these:
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

NAME=${NAME:-jax-ccm}
IMAGE=${IMAGE:-IMAGE_OF_YOURS}       # what launch/Dockerfile built and you pushed
CLAIM=${CLAIM:-runs}                 # name of the PersistentVolumeClaim; WORKDIR is relative to it
HOSTS=${HOSTS:-4}                    # TPU: chips / CHIPS; GPU: nodes
CHIPS=${CHIPS:-}                     # chips or GPUs of a host; default 4 TPU chips, 8 GPUs
ACCELERATOR=${ACCELERATOR:-}         # default tpu-v5-lite-podslice, nvidia-h100-80gb
TOPOLOGY=${TOPOLOGY:-4x4}            # of the TPU slice
RESTARTS=${RESTARTS:-20}             # preemptions and failures that are survived
GRACE=${GRACE:-60}                   # seconds from SIGTERM to SIGKILL (spot nodes: at most 30)

dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ $# -ge 2 ] || usage
kind=$1 action=$2
shift 2
case $kind in
tpu) : "${CHIPS:=4}" "${ACCELERATOR:=tpu-v5-lite-podslice}" ;;
gpu) : "${CHIPS:=8}" "${ACCELERATOR:=nvidia-h100-80gb}" ;;
*) usage ;;
esac

case $action in
apply)
    [ $# -ge 2 ] || usage
    # shellcheck disable=SC2034 # read below by name
    CONFIG=$1 WORKDIR=$2 GRACE_RUN=$((GRACE - 5))
    shift 2
    ARGUMENTS=""
    for argument in "$@"; do ARGUMENTS+=", \"$argument\""; done
    manifest=$(<"launch/gke/$kind.yaml")
    for variable in NAME IMAGE CLAIM HOSTS CHIPS ACCELERATOR TOPOLOGY RESTARTS GRACE GRACE_RUN CONFIG WORKDIR ARGUMENTS; do
        manifest=${manifest//"\${$variable}"/${!variable}}
    done
    if [ -n "$dry" ]; then
        printf "+ kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$manifest"
    else
        kubectl apply -f - <<<"$manifest"
    fi
    ;;
logs) run kubectl logs -f -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
delete) run kubectl delete jobset "$NAME" ;;
*) usage ;;
esac
