"""llama.cpp's side of the comparison, by llama-cpp-python: a session is loaded, a turn is run, it is saved again.

For an interpreter that has llama-cpp-python, which need not be the one of jax_ccm (`peer.py` runs it): it imports
nothing of the library.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

# Runs, and gives a function that says what was found, which is called when time has been taken.
Step = Callable[[], Callable[[], dict[str, float]]]
# Tokens that are read at once. The binding copies as many rows of logits with each state, whatever is in them.
BATCH = 128


def make(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Step]]:
    """Steps ``"10"``, a turn behind 10 others in the session that is there, and ``"10, carried"``: loaded and saved.

    Args:
      settings: "model", a GGUF file; "turns", for which there are steps; "turn", tokens of each; "prompt" and "reply",
        tokens that a turn reads and makes; "threads".
    """
    import llama_cpp

    about = {"python": platform.python_version(), "llama_cpp_python": llama_cpp.__version__}
    there: dict[int, tuple[Any, Any]] = {}

    def session(turns: int) -> tuple[Any, Any]:
        """A model behind so many turns, and its state. Only the last one is kept: it may be large."""
        if turns not in there:
            # Before the next one is made: both together may not fit.
            there.clear()
            tokens = turns * settings["turn"]
            model = llama_cpp.Llama(
                settings["model"],
                n_ctx=tokens + settings["prompt"] + settings["reply"] + 1,
                n_batch=BATCH,
                n_threads=settings["threads"],
                n_threads_batch=settings["threads"],
                flash_attn=False,  # its default
                verbose=False,
            )
            # Any tokens: what they say costs nothing.
            model.eval([10 + number % 1000 for number in range(tokens)])
            there[turns] = model, model.save_state()
        return there[turns]

    def step(turns: int, carried: bool) -> Callable[[], dict[str, float]]:
        model, state = session(turns)
        start = time.perf_counter()
        if carried:
            model.load_state(state)
        else:
            model.n_tokens = state.n_tokens  # what stands behind is dropped when the turn is read
        model.eval([10] * settings["prompt"])
        token = model.sample(top_k=1, temp=0.0)
        first = time.perf_counter() - start
        for _ in range(settings["reply"]):
            model.eval([token])
            token = model.sample(top_k=1, temp=0.0)
        if carried:
            model.save_state()
        seconds = time.perf_counter() - start
        return lambda: {"first": first, "seconds": seconds, "bytes": state.llama_state_size}

    def of(turns: int, carried: bool) -> Step:
        return lambda: step(turns, carried)

    both = [(turns, carried) for turns in settings["turns"] for carried in (False, True)]
    return about, {f"{turns}{', carried' * carried}": of(turns, carried) for turns, carried in both}
