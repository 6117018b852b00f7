"""What `bench` measures of a conversation, on a decoder with arbitrary weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jax_ccm.benchmarks import baselines, report
from jax_ccm.benchmarks.settings import Options
from jax_ccm.benchmarks.steps import single_steps
from jax_ccm.benchmarks.turns import after_turns
from jax_ccm.devices import models
from jax_ccm.devices.record import Rows
from jax_ccm.devices.settings import Size
from jax_ccm.distributed import sharding
from jax_ccm.planning import ahead


def rows(size: Size) -> Rows:
    """Single steps beside the device's own rates, then a turn after each number of turns."""
    name, shape = size.base
    config = ahead.TRAINING
    made = functools.cache(lambda: models.experiment(config, shape))
    unstacked = functools.cache(lambda: made().model.unstacked())
    options = Options(
        Path(), turns=size.turns, prompt=size.spoken, reply=size.spoken, chunk=size.read, prefill=size.read,
        rounds=size.rounds, train_rounds=0,
    )  # fmt: skip
    method = config.method
    ways = baselines.compared(
        method.name, method.options(), capacity=config.cache.memory_capacity, window=options.window
    )

    def steps() -> dict[str, Any]:
        with sharding.use(made().mesh):

            def untrained(chunk):
                return (_ for _ in ()).throw(AssertionError("no training step is asked for"))

            found = single_steps(made().model, made().method, made().mesh, unstacked, ways, options, untrained)
        return found | {
            "title": f"{name}, {config.model.precision}, {report.machine(made().mesh)}",
            "options": dataclasses.asdict(options), "baselines": {way.name: way.note for way in ways},
        }  # fmt: skip

    def turn(count: int) -> dict[str, Any]:
        with sharding.use(made().mesh):
            return after_turns(made().model, unstacked, ways, options, count)

    yield {"model": name, "measured": "single steps"}, steps
    for count in size.turns:
        yield {"model": name, "measured": f"a turn after {count:,}"}, functools.partial(turn, count)
