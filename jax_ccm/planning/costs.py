"""Work by formula: a compiler counts the body of a loop once, so its own numbers do not serve."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jax_ccm.config.schema import Config
from jax_ccm.nn import ModelConfig
from jax_ccm.numerics import Precision
from jax_ccm.planning.chips import Chip
from jax_ccm.planning.measure import Need
from jax_ccm.rules.types import Batch


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


def layer_weights(shape: ModelConfig) -> int:
    """Numbers in the matrices of all layers."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (2 * heads + 2 * kv)
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def attention_flops(shape: ModelConfig, queries: int, keys: int) -> float:
    """Scores and weighted sums of all layers, without regard to what is hidden: it is computed nonetheless."""
    return 4.0 * shape.num_layers * queries * keys * shape.num_heads * shape.head_dim


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
    weights = layer_weights(shape)
    layers = 2.0 * passes * weights * rows * length
    attention = (4 + again) * rows * attention_flops(shape, length, length + memory)
    head = 2.0 * (4 if trained else 2) * shape.hidden_size * shape.vocab_size * rows * batch.places.shape[1]
    itemsize = jnp.dtype(Precision.of(config.model.precision).params).itemsize
    read = accumulation * passes * (weights + shape.hidden_size * shape.vocab_size) * itemsize / tensor
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
    layers = 2.0 * layer_weights(shape) * tokens + attention_flops(shape, tokens, slots + tokens)
    head = 2.0 * shape.hidden_size * shape.vocab_size if logits else 0.0
    return Cost(sessions * (layers + head), weight_bytes + cache_bytes)
