"""Endless text through a fixed-size state: losses token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_ccm.nn.transformer import Transformer
from jax_ccm.steps import stream_step
from jax_ccm.types import Array, Chunk, MemoryCache, Method


def stream(
    model: Transformer, cache: MemoryCache, tokens, targets, valid, *, method: Method, window: int, closes: Array
):
    """Feeds text token by token, compressing whenever the window is full (CCM, section 4.3).

    Args:
      model: the decoder with its adapter.
      cache: the sessions; see `steps.stream_step`.
      tokens: ``int32 [B, T]``.
      targets: ``int32 [B, T]``, the token after each.
      valid: ``bool [B, T]``.
      method: static.
      window: live slots at which a row compresses; static.
      closes: how many of the oldest raw tokens are then compressed.

    Returns:
      The cache, and the negative log-likelihood of the targets, ``float32 [B, T]``, 0 where not valid.
    """

    def body(cache, scanned):
        token, target, use = scanned
        cache, logits = stream_step(
            model, cache, Chunk(token[:, None], use[:, None]), method=method, window=window, closes=closes
        )
        logits = logits[:, 0]
        score = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return cache, (jax.nn.logsumexp(logits, axis=-1) - score) * use

    cache, losses = jax.lax.scan(body, cache, (jnp.swapaxes(tokens, 0, 1), jnp.swapaxes(targets, 0, 1), valid.T))
    return cache, losses.T
