"""Work by formula: a compiler counts the body of a loop once, so its own numbers do not serve."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jax_ccm.config.schema import Config
from jax_ccm.nn import ModelConfig
from jax_ccm.numerics import Precision
from jax_ccm.planning.chips import Chip
from jax_ccm.planning.measure import Need
from jax_ccm.rules.batch import Batch


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one run of a program.

    Attributes:
      flops: of all devices, a multiplication and an addition being two.
      hbm_bytes: that each device must read at least: its weights as often as they are used, and its cache.
    """

    flops: float
    hbm_bytes: float

    def times(self, chip: Chip, devices: int, need: Need) -> dict[str, float]:
        """Seconds that peak rates allow: "compute", "memory", "links", and "roofline", the longest of them."""
        sent = sum(c.sent for c in need.collectives)
        seconds = {
            "compute": self.flops / (devices * chip.flops),
            "memory": self.hbm_bytes / chip.hbm_bandwidth,
            "links": sent / chip.link_bandwidth,
        }
        return seconds | {"roofline": max(seconds.values())}


def training_cost(config: Config, shape: ModelConfig, batch: Batch, accumulation: int, tensor: int) -> Cost:
    """A training step of ``accumulation`` micro-batches (without its leading axis: ``[B, ...]``).

    Frozen weights cost two passes, forward and the gradient of activations; trained ones a third. In the backward pass
    attention is computed once more, with ``remat: all`` all of a layer, and logits where the head is trained.
    """
    rows, length = batch.tokens.shape
    memory = 0 if batch.memory is None else batch.memory.source.shape[1]
    trained = config.train.trainable == "all"
    again = config.train.remat == "all"
    passes = 2 + trained + again
    layers = passes * shape.forward_flops(rows * length, 0, 0)
    # What the rule hides is computed nonetheless.
    # Forward, once more in the backward pass, and two products for each there.
    attention = (4 + again) * shape.forward_flops(0, rows * length * (length + memory), 0)
    head = (4 if trained else 2) * shape.forward_flops(0, 0, rows * batch.indices.shape[1])
    itemsize = jnp.dtype(Precision.of(config.model.precision).params).itemsize
    read = accumulation * passes * (shape.layer_weights + shape.hidden_size * shape.vocab_size) * itemsize / tensor
    return Cost(accumulation * (layers + attention + head), read)


def serving_cost(
    shape: ModelConfig, sessions: int, tokens: int, slots: int, cache_bytes: int, weight_bytes: int, logits: bool
) -> Cost:
    """``tokens`` tokens of each session run over ``slots`` slots of its cache.

    Args:
      shape: the model.
      sessions: over all devices.
      tokens: run for each session.
      slots: of a session's cache.
      cache_bytes, weight_bytes: of each device.
      logits: whether the next token is predicted.
    """
    flops = shape.forward_flops(tokens, tokens * (slots + tokens), int(logits))
    return Cost(sessions * flops, weight_bytes + cache_bytes)
