"""Losses over scored tokens only: the vocabulary projection is computed nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_ccm.nn.transformer import Transformer
from jax_ccm.sharding import constrain
from jax_ccm.types import Batch, Kind, Method


def scored_logits(model: Transformer, hidden, batch: Batch):
    """Logits that predict the scored tokens, ``float32 [B, Q, V]``, from hidden states ``[B, T, D]``."""
    hidden = constrain(jnp.take_along_axis(hidden, batch.places[:, :, None], axis=1), "rows")
    return constrain(model.logits(hidden), "rows", None, "vocab")


def scored_losses(model: Transformer, hidden, batch: Batch):
    """Negative log-likelihood in nats of each scored token, ``float32 [B, Q]``, 0 on padding."""
    logits = scored_logits(model, hidden, batch)
    target = jnp.take_along_axis(logits, batch.targets[:, :, None], axis=2)[:, :, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - target) * batch.weights


def repeated(batch: Batch):
    """``bool [B, Q]``: the scored tokens that repeat a closed chunk, as opposed to text."""
    return jnp.take_along_axis(batch.slots.kind, batch.places, axis=1) == Kind.REPEAT


def mean_loss(model: Transformer, hidden, batch: Batch, method: Method):
    """Cross-entropy averaged over the scored text tokens of the batch (CCM, equation 4), and their number.

    With `Method.repeat` the mean over the repeated tokens is added, times `Method.repeat_weight` (LoMA,
    ``L_read + L_rep``). Each mean has its own denominator, so that neither changes the weight of the other.
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
