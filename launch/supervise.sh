#!/usr/bin/env bash
# Training as schedulers want it: exit 0 only when the run is finished.
#   bash launch/supervise.sh [--dry-run] CONFIG.yaml WORKDIR [--train.steps 100 ...]
# A run that SIGTERM stopped has saved itself and exits 75 (EX_TEMPFAIL): the same command goes on with it. Other codes
# are those of jax_ccm.train: 2 a mistake in the config, 1 a failure.
# PYTHON: interpreter (default: that of .venv if there is one, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

dry=""
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ $# -ge 2 ] || usage
config=$1 workdir=$2
shift 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

command=("$python" -m jax_ccm.train "$config" --workdir "$workdir" "$@")
if [ -n "$dry" ]; then run "${command[@]}"; exit; fi
pid=""
asked=""
stop() { asked=1; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true; }
trap 'signalled=1; stop' TERM INT
"${command[@]}" &
pid=$!
# A signal that came before the run had its number.
[ -z "$asked" ] || stop
code=0
wait_for "$pid" || code=$?
if [ "$code" -eq 0 ] && ! grep -q '"status": "finished"' "$workdir/summary.json"; then
    code=75
fi
exit "$code"
