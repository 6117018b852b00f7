#!/usr/bin/env bash
# Training on one machine with several GPUs (or none), started again when it fails.
#   bash launch/local.sh [--dry-run] CONFIG.yaml WORKDIR [--train.steps 100 ...]
# GPUS: devices to use, such as 0,1,2,3 (default: all).
# PROCESSES: 1 (default) is one process for all GPUs, which is the quickest on one machine. More: that many processes with
#   an equal share of the GPUs each, as on several machines; also a way to try many processes on a CPU.
# RETRIES: how often a failed run is started again (default 3); each goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

gpus=${GPUS:-}
processes=${PROCESSES:-1}
retries=${RETRIES:-3}
port=${PORT:-8476}

dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ $# -ge 2 ] || usage

if [ -z "$gpus" ] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)
fi
IFS=, read -ra devices <<<"$gpus"
share=$((${#devices[@]} / processes))
if [ $((share * processes)) -ne "${#devices[@]}" ]; then
    echo "PROCESSES=$processes does not divide the ${#devices[@]} GPUs $gpus; give a number that does" >&2
    exit 2
fi

# Starts process $1 with its share of the GPUs.
start() {
    local number=$1 environment=()
    shift
    if [ -n "$gpus" ]; then
        local mine
        mine=$(IFS=,; echo "${devices[*]:number*share:share}")
        environment+=("CUDA_VISIBLE_DEVICES=$mine")
    fi
    if [ "$processes" -gt 1 ]; then
        environment+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$number")
    fi
    if [ -n "$dry" ]; then run env "${environment[@]}" bash launch/supervise.sh "$@"; else
        exec env "${environment[@]}" bash launch/supervise.sh "$@"
    fi
}

pids=()
stop() { [ ${#pids[@]} -eq 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap 'stopped=1; signalled=1; stop' TERM INT
stopped=""
for attempt in $(seq 0 "$retries"); do
    pids=()
    for number in $(seq 0 $((processes - 1))); do
        if [ -n "$dry" ]; then start "$number" "$@"; continue; fi
        start "$number" "$@" &
        pids+=($!)
    done
    # A signal that came while they were being started.
    [ -z "$stopped" ] || stop
    code=0
    for _ in "${pids[@]}"; do
        found=0
        wait_for -n || found=$?
        # The first that fails says why; the others cannot go on without it.
        if [ "$found" -ne 0 ] && [ "$code" -eq 0 ]; then code=$found; stop; fi
    done
    # 2 is a mistake in the config: nothing to gain from another try.
    if [ -n "$dry" ] || [ -n "$stopped" ] || [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then exit "$code"; fi
    echo "attempt $((attempt + 1)) ended with code $code" >&2
done
exit "$code"
