"""``python -P peer.py FILE.py``: steps of a program that is compared with ours, in a process of its own.

A script for an interpreter that has what FILE needs and need not have jax_ccm: it imports nothing of the library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Step = Callable[[], Callable[[], Mapping[str, Any]]]


def serve(make: Callable[[Mapping[str, Any]], tuple[dict[str, Any], dict[str, Step]]]) -> None:
    """Runs steps when it is told to, so that processes take turns and never compute at the same time.

    A line on standard input holds the settings, each further one the name of a step. Each is answered by a line: what
    `make` says of itself and the names of its steps; then what a step took, or why it failed.

    Args:
      make: ``settings -> (about, {name: step})``. A step gives a function that says what was found, as JSON values,
        which is called when time has been taken.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    settings = json.loads(sys.stdin.readline())
    # For libraries, too, that take no number of threads but count the cores.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
    try:
        about, steps = make(settings)
    except ImportError as e:
        # Only what `make` imports: the caller knows what to do about a package that is not there.
        return answer(error=f"{sys.executable} lacks {e.name}")
    answer(about=about, steps=list(steps))
    for line in sys.stdin:
        try:
            wall, cpu = time.perf_counter(), time.process_time()
            told = steps[line.strip()]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        except Exception as e:  # out of memory, no compiler: a result, too
            traceback.print_exc()
            answer(error=f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}")
            continue
        answer(wall=wall, cpu=cpu, **told())


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("steps", sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    serve(module.make)
