"""What the tokens that write memory start from: their own embeddings, and the mean of those of the text they stand for.

The mean needs no training: whatever words a share of the text holds, its slot begins as their average, and the LoRA has
to learn only what to make of it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_ccm.memory.cache import raw_capacity
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.types import Clause, Kind, MemoryCache, Method, Rule, Slots
from jax_ccm.rules.visibility import visible


def starts_of_row(model: Transformer, batch: Batch, method: Method):
    """Of a parallel forward: ``float32 [B, T, D]``, 0 for tokens that write no memory; None without `starts_from`."""
    if method.starts_from is None or batch.memory is None:
        return None
    source = batch.memory.source
    writing = batch.slots.map(lambda x: jnp.take_along_axis(x, source, axis=1))
    means = _means(model, method.starts_from, writing, batch.tokens, batch.slots)
    # Unused entries of the source point to text, which the clause is not about: they add 0.
    return jax.vmap(lambda source, means: jnp.zeros((batch.tokens.shape[1], means.shape[1])).at[source].add(means))(
        source, means
    )


def starts_of_session(model: Transformer, cache: MemoryCache, closing: Slots, selected, method: Method):
    """Of the recurrence: ``float32 [B, n, D]`` for the tokens that close a chunk; None without `starts_from`.

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      closing: `Slots` of ``[B, n]``, of these tokens.
      selected: ``bool [B, S]``, the text that becomes memory.
      method: the compression method.
    """
    if method.starts_from is None:
        return None
    # Embeddings of the chunk alone, and not of all slots of the cache.
    order = jnp.argsort(~selected, axis=1, stable=True)[:, : raw_capacity(cache)]

    def take(x):
        return jnp.take_along_axis(x, order, axis=1)

    text = dataclasses.replace(cache.slots, kind=jnp.where(selected, cache.slots.kind, Kind.PAD))
    return _means(model, method.starts_from, closing, take(cache.ids), text.map(take))


def _means(model: Transformer, clause: Clause, tokens: Slots, ids, text: Slots):
    """Mean embeddings ``float32 [B, P, D]`` of what a clause shows of text ``[B, S]`` to tokens ``[B, P]``."""
    shown = visible(Rule((clause,)), tokens, text)
    share = shown / jnp.maximum(jnp.sum(shown, axis=2, keepdims=True), 1)
    words = model.embed_tokens(ids).astype(jnp.float32)
    return jnp.einsum("bps,bsd->bpd", share, words, precision=jax.lax.Precision.HIGHEST)
