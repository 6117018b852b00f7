"""The papers' throughput: samples/s at the largest batch that fits, by what the memory of the demonstrations is.

A sample is one more demonstration, behind all but one of them, and a question about all: the demonstration is read and
written into memory, the question is read up to the first token of its answer.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from jax_ccm.benchmarks import baselines, turns
from jax_ccm.benchmarks.baselines import Baseline
from jax_ccm.devices import models
from jax_ccm.devices.record import DoesNotFit, Rows, is_out_of_memory
from jax_ccm.devices.settings import Size
from jax_ccm.distributed import sharding
from jax_ccm.memory.closing import prefill
from jax_ccm.methods import build
from jax_ccm.nn import Transformer
from jax_ccm.rules.types import Chunk, MemoryCache

PRECISION = "bfloat16"
# Without logits, which nobody asks for behind a demonstration.
read = jax.jit(prefill, static_argnames="method", donate_argnames="cache")


def rows(size: Size) -> Rows:
    """Full context, CCM-concat and CCM-merge."""
    name, shape = size.demonstrated
    systems = {
        "full context": Baseline("full", build("full"), "all text"),
        "CCM-concat": Baseline("concat", build("ccm_concat", comp_tokens=size.slots), "slots of each demonstration"),
        "CCM-merge": Baseline("merge", build("ccm_merge", comp_tokens=size.slots), "slots in all"),
    }
    model = functools.cache(lambda: models.for_method(systems["CCM-merge"].method, shape, PRECISION))
    for system, way in systems.items():
        yield {"model": name, "system": system}, functools.partial(_largest, model, way, size)


def _largest(model: Any, way: Baseline, size: Size) -> dict[str, Any]:
    """The largest power of two of rows that fits.

    Raises:
      DoesNotFit: if not even one row does.
    """
    with sharding.use(models.one_device()):
        given = model()
        room = models.bytes_limit() - turns.weights_bytes(given)
        each = jax.eval_shape(lambda: way.cache(given, 1, turns=size.demonstrations, turn=size.demonstration)).nbytes
        # The first power of two whose sessions would take half of the room: what else is needed decides.
        batch = 1 << max(int(np.log2(max(room / 2 / each, 1))), 0)
        if size.most is not None:
            batch = min(batch, size.most)
        best, tried, found = 0, {}, {}
        while batch and batch not in tried and (size.most is None or batch <= size.most):
            result = _tried(given, way, batch, size)
            tried[batch] = result if isinstance(result, str) else "fits"
            print(f"throughput: {way.name}, {batch} rows: {tried[batch]}", flush=True)
            if isinstance(result, str):
                if best:
                    break
                batch //= 2
                continue
            best, found = batch, result
            if any(told != "fits" for told in tried.values()):
                break  # found from above
            batch *= 2
        if not best:
            raise DoesNotFit(f"not one row fits: {tried.get(1)}")
    return found | {"tried": tried, "slots": _slots(way, size), "bytes_of_a_session": each, "precision": PRECISION}


def _slots(way: Baseline, size: Size) -> int:
    """Slots of context that a question sees."""
    return len(baselines.slots_after(way.method, size.demonstrations, size.demonstration).kind)


def _tried(model: Transformer, way: Baseline, batch: int, size: Size) -> dict[str, Any] | str:
    """What a batch of so many rows took, or why it does not fit."""
    try:
        return _measured(model, way, batch, size)
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        return (str(e).strip().splitlines() or ["out of memory"])[0][:200]


def _measured(model: Transformer, way: Baseline, batch: int, size: Size) -> dict[str, Any]:
    method, tokens = way.method, size.demonstration
    piece = Chunk(np.ones((batch, tokens), np.int32), np.ones((batch, tokens), bool))
    abstract = jax.eval_shape(lambda: way.cache(model, batch, turns=size.demonstrations, turn=tokens))
    close = turns.read_and_close if method.remembers else read
    programs = [call.lower(model, abstract, piece, method=method).compile() for call in (close, turns.ask)]
    needed, limit = max(map(turns.compiled_bytes, programs)), models.bytes_limit()
    if needed > limit:
        raise DoesNotFit(f"{needed / 2**30:.1f} GiB, as compiled; the device has {limit / 2**30:.1f}")
    demonstration, question = programs
    cache: MemoryCache = turns.as_left(model, way.cache(model, batch, turns=size.demonstrations, turn=tokens))
    before = functools.partial(baselines.fill, method=method, turns=size.demonstrations - 1, turn=tokens)
    samples: dict[str, list[turns.Sample]] = {"demonstration": [], "question": []}
    for number in range(1 + size.rounds):
        cache = jax.block_until_ready(before(cache))
        first, cache = turns.timed(lambda cache=cache: demonstration(model, cache, piece))
        second, (cache, _) = turns.timed(lambda cache=cache: question(model, cache, piece))
        if number:  # the first warms up
            samples["demonstration"].append(first)
            samples["question"].append(second)
    taken = {name: turns.summary(x, "wall")["seconds"] for name, x in samples.items()}
    return {
        "batch": batch, "seconds": taken, "samples_per_second": batch / sum(taken.values()),
        "questions_per_second": batch / taken["question"], "bytes": needed,
    }  # fmt: skip
