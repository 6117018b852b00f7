"""Attention over a row's own tokens and a memory: the one door to every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_ccm.layout import visible
from jax_ccm.types import Rule, Slots

IMPLEMENTATIONS = ("xla",)
# Queries that are attended at once: scores take this times S numbers for each head, whatever T.
QUERY_BLOCK = 512


def memory_attention(
    q,
    k,
    v,
    memory_k=None,
    memory_v=None,
    *,
    rule: Rule,
    slots: Slots,
    memory_slots: Slots | None = None,
    implementation: str | None = None,
):
    """Softmax attention of each token to the visible ones among its row and the memory.

    Args:
      q: ``[B, T, N, H]`` queries, rotated.
      k, v: ``[B, T, K, H]`` keys (rotated) and values of the same tokens; N is a multiple of K.
      memory_k, memory_v: ``[B, M, K, H]`` keys and values of the memory, or None.
      rule: who sees whom.
      slots: `Slots` of ``[B, T]``.
      memory_slots: `Slots` of ``[B, M]``.
      implementation: "xla" (the default).

    Returns:
      ``[B, T, N, H]``; zeros for a query that sees nothing.

    Raises:
      ValueError: for shapes that do not fit or an unknown implementation.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if q.shape[2] % k.shape[2] or q.shape[:2] != k.shape[:2] or k.shape != v.shape:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together: expected [B, T, N, H] and "
            "twice [B, T, K, H] with N a multiple of K"
        )
    seen = slots
    if memory_k is not None and memory_v is not None and memory_slots is not None:
        k = jnp.concatenate([memory_k, k], axis=1)
        v = jnp.concatenate([memory_v, v], axis=1)
        seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), memory_slots, slots)
    # Heads in front, so that the products are plain matrix products.
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    # Recomputed in the backward pass: what is kept for it grows with T and S, not with T x S.
    attend = jax.checkpoint(functools.partial(_attend, rule=rule))
    length = q.shape[1]
    if length <= QUERY_BLOCK:
        return attend(q, slots, k, v, seen)
    blocks = -(-length // QUERY_BLOCK)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, blocks * QUERY_BLOCK - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    # Queries that the last block lacks are of kind PAD and see nothing.
    out = jax.lax.map(lambda block: attend(*block, k, v, seen), (split(q), jax.tree.map(split, slots)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def _attend(q, slots: Slots, k, v, seen: Slots, *, rule: Rule):
    """Attention of a block of queries ``[B, T, N, H]`` to all keys and values ``[B, K, S, H]``."""
    batch, length, heads, size = q.shape
    kv_heads = k.shape[1]
    # The query heads of a group share their keys as rows of one matrix.
    rows = (batch, kv_heads, heads // kv_heads * length)
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, -1, size), 1, 3).reshape(*rows, size)
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = scores.reshape(batch, kv_heads, -1, length, k.shape[2])
    mask = visible(rule, slots, seen)[:, None, None]
    # A query that sees nothing (padding) must give zeros and finite gradients, not NaN.
    scores = jnp.where(mask, scores, -1e30)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    # Divided after the product: T x H numbers instead of T x S.
    weights = weights.astype(v.dtype).reshape(*rows, -1)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, -1, length, size) / total
    out = jnp.moveaxis(out.astype(v.dtype), 3, 1)
    return out.reshape(batch, length, heads, size)
