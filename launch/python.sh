# Sourced by the scripts beside it: sets PYTHON, unless it is set, to the first interpreter that jax_ccm supports.
if [ -z "${PYTHON:-}" ]; then
    for candidate in python3 python3.12 python3.11; do
        # A name on the PATH may be a stub that only says what to install: run it.
        if "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 14)))' 2>/dev/null; then
            PYTHON=$candidate
            break
        fi
    done
fi
if [ -z "${PYTHON:-}" ]; then
    echo "jax_ccm needs Python 3.11 or newer; none was found. Set PYTHON=/path/to/python." >&2
    exit 2
fi
