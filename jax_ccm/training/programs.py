"""What stands around the compiled training step: what it is fed, and what its running out of memory says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jax_ccm.errors import RunError
from jax_ccm.rules.batch import Batch


def grouped(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Groups of micro-batches, stacked along a new leading axis."""
    while True:
        group = [next(batches) for _ in range(count)]
        # [B, ...] -> [A, B, ...]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *group)


def out_of_memory_as_error(call: Any) -> Any:
    """``call``, with the runtime's out-of-memory error turned into one that says what to do."""

    def wrapped(*args: Any) -> Any:
        try:
            return call(*args)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            raise RunError(
                "the device has not enough memory for a training step. Lower data.batch_size and raise "
                f"optimizer.accumulation, set train.remat: all, or lower data.tokens ({str(e).splitlines()[0]})"
            ) from e

    return wrapped
