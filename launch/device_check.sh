#!/usr/bin/env bash
# What the accelerator of this machine does with jax_ccm: numbers, times, training, turns, the papers' throughput.
#   bash launch/device_check.sh [--dry-run] [PART ...]
# On a TPU VM (one host) or a GPU machine (launch/gpu_check.sh), without network, in eight minutes; on a CPU with tiny sizes.
# Parts: numbers attention training turns throughput (default: all). Each is a process of its own with a time limit of
# its own, and writes OUT/PART.json; one that fails ends no other. OUT/report.md has all as tables.
# PYTHON: interpreter (default: that of .venv if there is one, else python3).  OUT: where results go (default
#   results/PLATFORM/DEVICE).  SIZE: tiny or full (default: full, and tiny on a CPU).
# NUMBERS, ATTENTION, TRAINING, TURNS, THROUGHPUT: seconds that the part may take.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
declare -A seconds=(
    [numbers]=${NUMBERS:-65} [attention]=${ATTENTION:-100} [training]=${TRAINING:-105} [turns]=${TURNS:-90}
    [throughput]=${THROUGHPUT:-100}
)
all=(numbers attention training turns throughput)
# A process has most of the memory to itself, from its beginning: what fits does not depend on how it was cut before.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
for part in "$@"; do
    case " ${all[*]} " in
    *" $part "*) ;;
    *) usage ;;
    esac
done
[ $# -gt 0 ] || set -- "${all[@]}"
options=()
[ -z "${OUT:-}" ] || options+=(--out "$OUT")

failed=()
for part in "$@"; do
    limit=${seconds[$part]} code=0
    # No row is begun in the last fifth; what still runs at the end is killed, and its rows so far are kept.
    run timeout --foreground --kill-after=5 "$limit" "$python" -m jax_ccm.devices.check "$part" "${options[@]}" \
        --size "${SIZE:-auto}" --limit "$((limit * 4 / 5))" || code=$?
    case $code in
    0) ;;
    130) exit 130 ;; # Ctrl-C
    124 | 137) failed+=("$part (stopped after $limit s)") ;;
    *) failed+=("$part (exit $code)") ;;
    esac
done
code=0
run timeout --foreground --kill-after=5 20 "$python" -m jax_ccm.devices.check report "${options[@]}" || code=$?
[ "$code" -eq 0 ] || failed+=("report (exit $code)")

[ -z "$dry" ] || exit 0
if [ ${#failed[@]} -eq 0 ]; then
    echo "device check: all of $* finished"
else
    told=$(printf ', %s' "${failed[@]}")
    echo "device check: not finished: ${told#, }; what they found is in their files" >&2
    exit 1
fi
