"""Losses over scored tokens only: the vocabulary projection is computed nowhere else."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jax_ccm.distributed.sharding import constrain
from jax_ccm.nn.transformer import Transformer, capped
from jax_ccm.rules.types import Batch, Kind, Method

# Logits that exist at once, forward and backward: 64 MiB of float32, unless a few columns of the batch are more.
BLOCK = 2**24
COLUMNS = 16


def scored_logits(model: Transformer, hidden, batch: Batch):
    """Logits that predict the scored tokens, ``float32 [B, Q, V]``, from hidden states ``[B, T, D]``."""
    hidden = constrain(jnp.take_along_axis(hidden, batch.indices[:, :, None], axis=1), "rows")
    return constrain(model.logits(hidden), "rows", None, "vocab")


def scored_losses(model: Transformer, hidden, batch: Batch):
    """Negative log-likelihood in nats of each scored token, ``float32 [B, Q]``, 0 on padding."""
    hidden = constrain(jnp.take_along_axis(hidden, batch.indices[:, :, None], axis=1), "rows")
    head, axes = model.head
    return (
        token_losses(axes, hidden, head.astype(model.precision.compute), batch.targets, model.config.logit_cap)
        * batch.weights
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def token_losses(axes: str, hidden, head, targets, cap: float | None = None):
    """Negative log-likelihood in nats of each target, without ever holding all logits.

    Logits are made in blocks of columns. Where the head is frozen, as in training an adapter, the gradient of each
    block is made at once, in the forward pass, and its logits are never needed again; where it is trained they are made
    a second time in the backward pass.

    Args:
      axes: of the head, "vd" or "dv".
      hidden: ``[B, Q, D]``.
      head: ``[V, D]`` or ``[D, V]``.
      targets: ``int32 [B, Q]``.
      cap: static; if set, logits are ``cap * tanh(logit / cap)`` (Gemma 2).

    Returns:
      ``float32 [B, Q]``.
    """
    step = lambda block: _likelihood(_logits(axes, block[0], head, cap), block[1])[0]
    return _by_blocks(step, head, axes, hidden, targets)


def _forward(axes, hidden, head, targets, cap):
    trained = head.perturbed
    hidden, head, targets = hidden.value, head.value, targets.value

    def step(block):
        hidden, targets = block
        logits = _logits(axes, hidden, head, cap)
        losses, total = _likelihood(logits, targets)
        if trained:
            return losses, total
        return losses, _to_hidden(axes, _slope(logits, total, targets, cap), head).astype(hidden.dtype)

    losses, kept = _by_blocks(step, head, axes, hidden, targets)
    return losses, ((hidden, head, targets, kept) if trained else (kept,))


def _backward(axes, cap, residuals, g):
    if len(residuals) == 1:
        (slope,) = residuals
        return g[:, :, None].astype(slope.dtype) * slope, None, None
    hidden, head, targets, totals = residuals

    def step(gradient, block):
        hidden, targets, total, g = block
        slope = _slope(_logits(axes, hidden, head, cap), total, targets, cap) * g[:, :, None]
        order = {"v": slope, "d": hidden}
        terms = [f"bq{axis}" for axis in axes]
        found = jnp.einsum(
            f"{','.join(terms)}->{axes}", *(order[axis] for axis in axes), preferred_element_type=jnp.float32
        )
        return gradient + found, _to_hidden(axes, slope, head).astype(hidden.dtype)

    blocks, size = _blocks(head, axes, targets)
    zero = jnp.zeros(head.shape, jnp.float32)
    split = functools.partial(_split, blocks=blocks, size=size)
    gradient, slopes = jax.lax.scan(step, zero, tuple(map(split, (hidden, targets, totals, g))))
    return _joined(slopes, targets.shape[1]), gradient.astype(head.dtype), None


token_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(axes: str, hidden, head, cap: float | None):
    logits = jnp.einsum(f"bqd,{axes}->bqv", hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)
    return constrain(capped(logits, cap), "rows", None, "vocab")


def _likelihood(logits, targets):
    """Losses and the logarithms of the normalisers, ``[B, q]`` each."""
    total = jax.nn.logsumexp(logits, axis=-1)
    return total - jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0], total


def _slope(logits, total, targets, cap: float | None):
    """The gradient of the losses for logits before the cap: probabilities, less 1 at the target, times its slope."""
    hit = jnp.arange(logits.shape[-1]) == targets[:, :, None]
    slope = jnp.exp(logits - total[:, :, None]) - hit
    return slope if cap is None else slope * (1 - (logits / cap) ** 2)


def _to_hidden(axes: str, slope, head):
    return jnp.einsum(f"bqv,{axes}->bqd", slope.astype(head.dtype), head, preferred_element_type=jnp.float32)


def _blocks(head, axes: str, targets) -> tuple[int, int]:
    """How many blocks of how many columns."""
    batch, columns = targets.shape
    most = max(BLOCK // (batch * head.shape[axes.index("v")]), COLUMNS)
    blocks = math.ceil(columns / most)
    return blocks, math.ceil(columns / max(blocks, 1))


def _split(x, *, blocks: int, size: int):
    """``[B, Q, ...]`` as ``[blocks, B, size, ...]``, zeros behind."""
    x = jnp.pad(x, [(0, 0), (0, blocks * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _joined(x, columns: int):
    """``[blocks, B, size, ...]`` as ``[B, columns, ...]``."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :columns]


def _by_blocks(step, head, axes: str, hidden, targets):
    """``step`` of hidden states and targets, block by block."""
    blocks, size = _blocks(head, axes, targets)
    if blocks <= 1:
        return step((hidden, targets))
    found = jax.lax.map(step, tuple(_split(x, blocks=blocks, size=size) for x in (hidden, targets)))
    return jax.tree.map(lambda x: _joined(x, targets.shape[1]), found)


def repeated(batch: Batch):
    """``bool [B, Q]``: the scored tokens that repeat a closed chunk, as opposed to text."""
    return jnp.take_along_axis(batch.slots.kind, batch.indices, axis=1) == Kind.REPEAT


def mean_loss(model: Transformer, hidden, batch: Batch, method: Method):
    """Cross-entropy averaged over the scored text tokens of the batch (CCM, equation 4), and their number.

    With `Method.repeat` the mean over the repeated tokens is added, times `Method.repeat_weight` (LoMA,
    ``L_read + L_rep``). Each mean has its own denominator, so that neither changes the weight of the other.

    Args:
      model: the decoder, for its projection to the vocabulary.
      hidden: ``[B, T, D]``, what `parallel_forward` returned for the batch.
      batch: the rows.
      method: static.

    Returns:
      Two scalars, float32: the loss in nats, and how many text tokens it is of.
    """
    losses = scored_losses(model, hidden, batch)
    text = batch.weights
    total = 0.0
    if method.repeat is not None:
        again = batch.weights * repeated(batch)
        text = text - again
        total = method.repeat_weight * jnp.sum(losses * again) / jnp.maximum(jnp.sum(again), 1.0)
    count = jnp.sum(text)
    return jnp.sum(losses * text) / jnp.maximum(count, 1.0) + total, count
