#!/usr/bin/env bash
# What an NVIDIA GPU does with jax_ccm: launch/device_check.sh, on the first GPU, which must be there.
#   bash launch/gpu_check.sh [--dry-run] [PART ...]
# GPU: which one (default 0).  The variables of launch/device_check.sh: PYTHON, OUT, SIZE, and seconds for each part.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

gpu=${GPU:-0}

dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ -z "$dry" ] &&
    ! { command -v nvidia-smi >/dev/null && nvidia-smi --id="$gpu" --query-gpu=name --format=csv,noheader; }; then
    echo "no NVIDIA GPU $gpu, or no driver for it; GPU=N takes another GPU, launch/device_check.sh any device" >&2
    exit 2
fi
# cuda: without JAX for CUDA the check fails, and does not turn to the processor.
run env CUDA_VISIBLE_DEVICES="$gpu" JAX_PLATFORMS=cuda,cpu bash launch/device_check.sh "$@"
[ -z "$dry" ] || exec bash launch/device_check.sh --dry-run "$@"
