"""A few queries of many heads, as in decoding: the heads that share a key become queries of one head."""

from __future__ import annotations

import jax.numpy as jnp

from jax_ccm.types import Slots


def heads_as_rows(q, slots: Slots, kv_heads: int):
    """Queries ``[B, T, N, H]`` as ``[B, T G, K, H]``, with G = N / K, and their slots ``[B, T]`` as ``[B, T G]``."""
    batch, length, heads, size = q.shape
    group = heads // kv_heads
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, size), 3, 2)
    return q.reshape(batch, length * group, kv_heads, size), slots.map(lambda x: jnp.repeat(x, group, axis=1))


def rows_as_heads(out, length: int):
    """``[B, T G, K, H]`` as ``[B, T, N, H]`` again, for T of ``length``."""
    batch, rows, kv_heads, size = out.shape
    out = out.reshape(batch, length, rows // length, kv_heads, size)
    return jnp.moveaxis(out, 2, 3).reshape(batch, length, -1, size)
