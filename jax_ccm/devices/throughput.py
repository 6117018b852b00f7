"""The papers' throughput: samples/s at the largest batch that fits, by what the memory of the demonstrations is.

A sample is one more demonstration, behind all but one of them, and a question about all: the demonstration is read and
written into memory, the question is read up to the first token of its answer.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
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
from jax_ccm.nn import AdapterConfig, Transformer, abstract_transformer
from jax_ccm.rules.types import Chunk, MemoryCache

PRECISION = "bfloat16"
# Without logits, which nobody asks for behind a demonstration.
read = jax.jit(prefill, static_argnames="method", donate_argnames="cache")


def rows(size: Size) -> Rows:
    """Full context, CCM-concat and CCM-merge, each at powers of two of rows until one does not fit."""
    name, shape = size.demonstrated
    systems = {
        "full context": Baseline("full", build("full"), "all text"),
        "CCM-concat": Baseline("concat", build("ccm_concat", comp_tokens=size.slots), "slots of each demonstration"),
        "CCM-merge": Baseline("merge", build("ccm_merge", comp_tokens=size.slots), "slots in all"),
    }
    adapter = AdapterConfig(tokens=systems["CCM-merge"].method.num_embeddings)
    model = functools.cache(lambda: models.arbitrary(shape, adapter, PRECISION))
    for system, way in systems.items():
        yield from _batches({"model": name, "system": system}, model, adapter, way, size)


def _batches(labels: dict[str, Any], model: Callable[[], Transformer], adapter: Any, way: Baseline, size: Size) -> Rows:
    """Batches twice as large as those before while they fit, or half as large until one fits."""
    abstract = abstract_transformer(size.demonstrated[1], adapter, PRECISION)
    each = jax.eval_shape(lambda: way.cache(abstract, 1, turns=size.demonstrations, turn=size.demonstration)).nbytes
    slots = len(baselines.slots_after(way.method, size.demonstrations, size.demonstration).kind)
    # The sessions of the first take half of the room that the weights leave: what else is needed decides.
    room = models.bytes_limit() - turns.weights_bytes(abstract)
    batch = min(1 << int(np.log2(max(room / 2 / each, 1))), size.most or sys.maxsize)
    fits: dict[int, bool] = {}

    def measure(batch: int) -> dict[str, Any]:
        try:
            with sharding.use(models.one_device()):
                found = _measured(model(), way, batch, size)
        except Exception as e:
            if is_out_of_memory(e):
                fits[batch] = False
            raise
        fits[batch] = True
        return found | {"slots": slots, "bytes_of_a_session": each, "precision": PRECISION}

    while batch and batch not in fits and batch <= (size.most or batch):
        yield labels | {"batch": batch}, functools.partial(measure, batch)
        if batch not in fits:
            return  # it failed, or there was no time
        batch = 2 * batch if fits[batch] else batch // 2


def _measured(model: Transformer, way: Baseline, batch: int, size: Size) -> dict[str, Any]:
    method, tokens = way.method, size.demonstration
    piece = Chunk(np.ones((batch, tokens), np.int32), np.ones((batch, tokens), bool))
    abstract = jax.eval_shape(lambda: way.cache(model, batch, turns=size.demonstrations, turn=tokens))
    close = turns.read_and_close if method.remembers else read
    limit, needed, programs = models.bytes_limit(), 0, []
    for call in (close, turns.ask):
        # What does not fit is known before anything of its size is allocated.
        programs.append(call.lower(model, abstract, piece, method=method).compile())
        needed = max(needed, turns.compiled_bytes(programs[-1]))
        if needed > limit:
            raise DoesNotFit(f"{needed / 2**30:.1f} GiB, as compiled; the device has {limit / 2**30:.1f}")
    demonstration, question = programs
    cache: MemoryCache = turns.as_left(model, way.cache(model, batch, turns=size.demonstrations, turn=tokens))
    before = functools.partial(baselines.fill, method=method, turns=size.demonstrations - 1, turn=tokens)
    samples: dict[str, list[turns.Sample]] = {"demonstration": [], "question": []}
    for number in range(1 + size.rounds):
        # The same number of demonstrations before each sample.
        cache = jax.block_until_ready(before(cache))
        first, cache = turns.timed(lambda cache=cache: demonstration(model, cache, piece))
        second, (cache, _) = turns.timed(lambda cache=cache: question(model, cache, piece))
        if number:  # the first warms up
            samples["demonstration"].append(first)
            samples["question"].append(second)
    taken = {name: turns.summary(x, "wall")["seconds"] for name, x in samples.items()}
    return {
        "seconds": taken, "samples_per_second": batch / sum(taken.values()),
        "questions_per_second": batch / taken["question"], "bytes": needed,
    }  # fmt: skip
