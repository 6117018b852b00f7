"""Sessions without an end, in the positions that the base was trained for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_ccm.memory.cache import raw_capacity
from jax_ccm.nn import ModelConfig, rope
from jax_ccm.rules.types import Kind, MemoryCache, Method


def rebased(config: ModelConfig, cache: MemoryCache, method: Method) -> MemoryCache:
    """The state in which sessions that come near the last position go on as if they had begun with what they hold.

    Where memory forgets its oldest (``overflow="evict"``), the gap between the sink and the oldest entry grows without
    end, and beyond `ModelConfig.positions` a base no longer attends to its sink as it learned to. The gap is closed:
    everything but the sink is moved to where it would stand had the forgotten text never been. Entries keep their
    distances to one another and to the text that comes; their keys are rotated back, once in thousands of tokens.

    Args:
      config: of the base model.
      cache: the sessions.
      method: static. Where keys are rotated at each use (`Method.rope`) by their index in the cache, no position runs
        out.

    Returns:
      The cache. Sessions that have room for the text of another chunk stay as they are.
    """
    if method.rope != "running" or cache.overflow != "evict":
        return cache
    slots = cache.slots
    sink = slots.kind == Kind.SINK
    held = slots.live & ~sink
    oldest = jnp.min(jnp.where(held, slots.position, cache.next_position[:, None]), axis=1)
    gap = oldest - jnp.sum(sink, axis=1)
    gap = jnp.where(cache.next_position + raw_capacity(cache) > config.positions, gap, 0)
    by = -gap[:, None]

    def move(keys):
        k, mixed = keys
        k = rope.moved(config, k, jnp.where(held, by, 0))
        return k, None if mixed is None else rope.moved(config, mixed, jnp.broadcast_to(by, mixed.shape[1:3]))

    # Almost always there is nothing to do.
    k, mixed = jax.lax.cond(jnp.any(gap > 0), move, lambda keys: keys, (cache.k, cache.mixed_k))

    def at(x):
        return jnp.where(held, x + by, x)

    slots = dataclasses.replace(slots, index=at(slots.index), position=at(slots.position))
    return dataclasses.replace(cache, k=k, mixed_k=mixed, slots=slots, rebased=cache.rebased + gap)
