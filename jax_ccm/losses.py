"""Losses over scored tokens only: the vocabulary projection is computed nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_ccm.nn.transformer import Transformer
from jax_ccm.types import Batch


def scored_logits(model: Transformer, hidden, batch: Batch):
    """Logits that predict the scored tokens, ``float32 [B, Q, V]``, from hidden states ``[B, T, D]``."""
    return model.logits(jnp.take_along_axis(hidden, batch.places[:, :, None], axis=1))


def scored_losses(model: Transformer, hidden, batch: Batch):
    """Negative log-likelihood in nats of each scored token, ``float32 [B, Q]``, 0 on padding."""
    logits = scored_logits(model, hidden, batch)
    target = jnp.take_along_axis(logits, batch.targets[:, :, None], axis=2)[:, :, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - target) * batch.weights


def mean_loss(model: Transformer, hidden, batch: Batch):
    """Cross-entropy averaged over the scored tokens of the batch (CCM, equation 4), and their number."""
    losses = scored_losses(model, hidden, batch)
    count = jnp.sum(batch.weights)
    return jnp.sum(losses) / jnp.maximum(count, 1.0), count
