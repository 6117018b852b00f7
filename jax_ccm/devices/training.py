"""Training: tokens/s, and the share of the device's peak that the work it needs takes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jax_ccm import bench
from jax_ccm.benchmarks import turns
from jax_ccm.devices import models
from jax_ccm.devices.record import Rows, Unavailable, is_out_of_memory
from jax_ccm.devices.settings import Size
from jax_ccm.distributed import sharding
from jax_ccm.nn import ModelConfig
from jax_ccm.numerics import Precision
from jax_ccm.planning import ahead, chips


def rows(size: Size) -> Rows:
    """Training steps of each decoder, first with plain products, then with the kernel."""
    for attention in ("xla", "pallas"):
        for name, shape in size.trained.items():
            labels = {"model": name, "attention": attention, "tokens of a row": size.tokens}
            yield labels, functools.partial(_steps, shape, attention, size)


def _steps(shape: ModelConfig, attention: str, size: Size) -> dict[str, Any]:
    """The step of the most rows that fit, of as many as are asked for, halved until they do."""
    if attention == "pallas" and jax.default_backend() == "cpu":
        raise Unavailable("on a CPU the kernel is interpreted, which is for tests")
    count = size.rows
    while True:
        try:
            return _step(shape, attention, count, size)
        except Exception as e:
            if count == 1 or not is_out_of_memory(e):
                raise
        # Outside of the handler: its error holds on to the arrays of the step that failed.
        count //= 2


def _step(shape: ModelConfig, attention: str, count: int, size: Size) -> dict[str, Any]:
    config = dataclasses.replace(
        ahead.TRAINING,
        data=dataclasses.replace(ahead.TRAINING.data, batch_size=count),
        train=dataclasses.replace(ahead.TRAINING.train, attention=attention),
    )
    made = models.experiment(config, shape)
    with sharding.use(made.mesh):
        step, sizes, flops = bench.training_step(made, size.tokens)
        product, product_flops = turns.matrix_product(Precision.of(config.model.precision))
        calls = {"step": step, "product": product}
        turns.interleaved(calls, 2)  # compiled, and warm
        found = {name: turns.summary(x, "wall") for name, x in turns.interleaved(calls, size.rounds).items()}
    seconds, rate = found["step"]["seconds"], product_flops / found["product"]["seconds"]
    chip = chips.named(jax.devices()[0].device_kind)
    return sizes | {
        "precision": config.model.precision, "method": made.method.name, "seconds": seconds, "flops": flops,
        "tokens_per_second": sizes["tokens"] / seconds,
        "matrix_flops_per_second": rate, "of_matrix_rate": flops / seconds / rate,
        "peak_flops_per_second": chip.flops if chip else None, "mfu": flops / seconds / chip.flops if chip else None,
    }  # fmt: skip
