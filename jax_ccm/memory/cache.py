"""The cache: a fixed-shape state of many sessions, and the ways it changes.

Live slots stand in front, ordered by `Slots.index`: sinks, memory from old to new (and text that is kept, between),
raw text. Raw text is appended behind; when a chunk is closed its memory is written and everything that the rule hides
from then on is removed.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, Transformer
from jax_ccm.rules.types import Kind, MemoryCache, Method, Slots
from jax_ccm.rules.visibility import is_in


def check_memory_capacity(method: Method, memory_capacity: int) -> None:
    """Refuses, by `UserError`, a capacity that does not hold what the method writes for one chunk."""
    if memory_capacity < (least := method.memory_slots(1 + method.recent)):
        raise UserError(
            f"memory_capacity is {memory_capacity}, but method {method.name!r} writes {least} "
            f"slots for a chunk; give at least that, times the number of chunks to remember"
        )


def init_cache(
    model: Transformer | ModelConfig,
    method: Method,
    batch: int,
    *,
    memory_capacity: int,
    raw_capacity: int,
    dtype=None,
    overflow: Literal["error", "evict"] = "error",
) -> MemoryCache:
    """An empty cache.

    Args:
      model: the decoder that will read into it; its config alone serves where there are no weights, as in planning.
      method: the compression method.
      batch: B, number of sessions.
      memory_capacity: most memory slots of a session; the sink has a slot of its own.
      raw_capacity: most raw text tokens of a session: the open chunk, or all text that the method keeps.
      dtype: of keys and values; None for the model's own, or for float32, that of a `Transformer` made from the config.
      overflow: when memory is full, make the session invalid ("error"; `check` raises) or drop its oldest ("evict").

    Raises:
      UserError: for capacities that cannot hold one chunk's memory.
    """
    config, own = (model, jnp.float32) if isinstance(model, ModelConfig) else (model.config, model.dtype)
    dtype = jnp.dtype(own if dtype is None else dtype)
    if overflow not in ("error", "evict"):
        raise UserError(f"overflow is {overflow!r}; allowed: 'error' (refuse) or 'evict' (drop the oldest memory)")
    check_memory_capacity(method, memory_capacity)
    if raw_capacity < 1:
        raise UserError(f"raw_capacity is {raw_capacity}; it must hold at least the longest chunk")
    if method.chunk is not None and raw_capacity % method.chunk:
        raise UserError(
            f"raw_capacity is {raw_capacity}; method {method.name!r} takes {method.chunk} tokens at a time, so give a "
            f"multiple of that, such as {-(-raw_capacity // method.chunk) * method.chunk}"
        )
    # Sinks have slots besides both capacities.
    size = memory_capacity + raw_capacity + int(method.sink)
    shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
    mixed = (*shape[:2], method.mixed_slots, *shape[3:])

    # Every array is its own buffer, so that a cache may be donated.
    def zeros(*shape):
        return jnp.zeros(shape, jnp.int32)

    def make():
        return MemoryCache(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            slots=Slots(*(zeros(batch, size) for _ in range(4))),
            tokens=zeros(batch),
            rebased=zeros(batch),
            chunks=zeros(batch),
            logits=jnp.zeros((batch, config.vocab_size), jnp.float32),
            ids=None if method.starts_from is None else zeros(batch, size),
            accumulated_attention=jnp.zeros(shape[:-1], jnp.float32)
            if method.eviction and method.eviction.decay is not None
            else None,
            mixed_k=jnp.zeros(mixed, jnp.float32) if method.mix is not None else None,
            mixed_v=jnp.zeros(mixed, jnp.float32) if method.mix is not None else None,
            lost=zeros(batch),
            spoiled=jnp.zeros(batch, bool),
            memory_capacity=memory_capacity,
            overflow=overflow,
        )

    return sharding.sharded_init(make, sharding.cache_shardings)


def raw_capacity(cache: MemoryCache) -> int:
    """Places that raw text may take."""
    # Sinks are among it, here and in `append`.
    return cache.k.shape[2] - cache.memory_capacity


def append(cache: MemoryCache, k, v, slots: Slots, ids=None, attention=None) -> MemoryCache:
    """Appends entries behind the live ones.

    Args:
      cache: the state.
      k, v: ``[L, B, C, K, H]``.
      slots: `Slots` of ``[B, C]``; those of kind PAD are left out.
      ids: ``int32 [B, C]`` for `MemoryCache.ids`.
      attention: ``float32 [L, B, C, K]`` for `MemoryCache.accumulated_attention`.

    Returns:
      The cache. Entries that find no room are counted in `MemoryCache.lost`.
    """
    chex.assert_equal_shape_prefix([cache.k[:, :, 0], k[:, :, 0]], 2)
    # Live slots stand in front, so that their number is the first free place.
    used = jnp.sum(cache.slots.live, axis=1, keepdims=True)
    raw = jnp.sum(cache.slots.live & (cache.slots.kind != Kind.MEMORY), axis=1, keepdims=True)
    rank = jnp.cumsum(slots.live, axis=1) - 1
    fits = slots.live & (raw + rank < raw_capacity(cache))
    # What does not fit, and padding, gets a place behind the end, which the scatter drops.
    place = jnp.where(fits, used + rank, cache.k.shape[2])

    def put(old, new):
        return put_rows(old, new, place)

    # Layer by layer: with all layers of a slot as one entry a compiler would turn the cache around, into a second one.
    indices = jnp.broadcast_to(place, (cache.k.shape[0], *place.shape))

    def put_layers(old, new):
        return jax.vmap(put_rows)(old, new, indices)

    return dataclasses.replace(
        cache,
        k=put_layers(cache.k, k),
        v=put_layers(cache.v, v),
        slots=Slots(*(put(old, new) for old, new in zip(fields(cache.slots), fields(slots), strict=True))),
        ids=None if cache.ids is None else put(cache.ids, ids),
        accumulated_attention=None
        if cache.accumulated_attention is None
        else put_layers(cache.accumulated_attention, attention),
        lost=cache.lost + jnp.sum(slots.live & ~fits, axis=1),
    )


def with_room(cache: MemoryCache, count: int) -> MemoryCache:
    """The state with room for so many more raw tokens; it is copied."""

    def behind(x, axis):
        return jnp.pad(x, [(0, count if number == axis else 0) for number in range(x.ndim)])

    attention = cache.accumulated_attention
    return dataclasses.replace(
        cache,
        k=behind(cache.k, 2),
        v=behind(cache.v, 2),
        slots=cache.slots.map(lambda x: behind(x, 1)),
        ids=None if cache.ids is None else behind(cache.ids, 1),
        accumulated_attention=None if attention is None else behind(attention, 2),
    )


# Row by row: with row numbers as indices the compiler would gather the sessions of all devices.
put_rows = jax.vmap(lambda old, new, place: old.at[place].set(new.astype(old.dtype), mode="drop"))


def open_raw(cache: MemoryCache, method: Method):
    """``bool [B, S]``: raw text (and a sink) of each row's open segment, as far as closing it would compress it."""
    kinds = (*method.compresses, Kind.SINK)
    return is_in(cache.slots.kind, kinds) & (cache.slots.segment == cache.chunks[:, None])


def check(cache: MemoryCache, rows=None) -> None:
    """Raises if a session is invalid: it lost something for want of room, or is spoiled. Reads both back to the host.

    Args:
      cache: the sessions.
      rows: ``bool [B]``, those that are asked about; None for all.

    Raises:
      UserError: naming the rows and the remedies.
    """
    rows = np.ones(cache.tokens.shape[0], bool) if rows is None else np.asarray(rows)
    if (spoiled := np.flatnonzero(np.asarray(cache.spoiled) & rows)).size:
        raise UserError(
            f"sessions {spoiled.tolist()} are spoiled: reading or closing their text gave numbers that are not finite "
            "(NaN or infinity), or text was to be kept behind other text by a method that keeps what a session begins "
            "with. Weights may be damaged, or too large for the type that they were loaded in; float32 or bfloat16 "
            "hold what float16 does not. Start these sessions anew (`cache.reset`), or from a copy of "
            "before that text"
        )
    lost = np.asarray(cache.lost)
    if not (lost.astype(bool) & rows).any():
        return
    rows = np.flatnonzero(lost.astype(bool) & rows)
    raise UserError(
        f"sessions {rows.tolist()} needed {lost[rows].tolist()} more slots than the cache has (memory "
        f"{cache.memory_capacity}, raw text {raw_capacity(cache)}). Use a larger memory_capacity for more chunks, a "
        "larger raw_capacity for longer chunks, or overflow='evict' to drop the oldest memory"
    )


def select(cache: MemoryCache, rows) -> MemoryCache:
    """Sessions of the cache, in an order: one that is named twice is forked.

    Args:
      cache: the sessions.
      rows: integers ``[R]``, from 0. Under jit, where it cannot be refused, a row that does not exist gives an empty
        session.

    Raises:
      UserError: for rows that do not exist, or are not integers in a row.
    """
    batch = cache.tokens.shape[0]
    rows = rows if isinstance(rows, Tracer) else np.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise UserError(f"rows are {rows.dtype} {list(rows.shape)}; give the numbers of sessions, integers [R]")
    if isinstance(rows, np.ndarray) and len(wrong := rows[(rows < 0) | (rows >= batch)]):
        raise UserError(f"there is no session {wrong[0]}; the cache has {batch}, numbered from 0 to {batch - 1}")
    # Under jit numbers cannot be refused; clipped ones are made empty below.
    found = jax.tree.map(lambda x: jnp.take(x, rows, axis=_row_axis(x), mode="clip"), cache)
    if isinstance(rows, np.ndarray):
        return found
    return choose((rows < 0) | (rows >= batch), _zeros(found), found)


def take_row(cache: MemoryCache, row) -> MemoryCache:
    """One session, as a cache of one row; ``row`` may be traced, so that one program serves all rows."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, _row_axis(x)), cache)


def put_row(cache: MemoryCache, one: MemoryCache, row) -> MemoryCache:
    """The cache with a session of `take_row` in one of its rows."""

    def put(x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, new, row, _row_axis(x))

    return jax.tree.map(put, cache, one)


def reset(cache: MemoryCache, rows) -> MemoryCache:
    """The cache with the sessions ``rows`` (bool ``[B]``) made empty.

    Raises:
      UserError: for rows of another shape or type.
    """
    rows = jnp.asarray(rows)
    if rows.shape != cache.tokens.shape or rows.dtype != bool:
        raise UserError(
            f"rows are {rows.dtype} {list(rows.shape)}; give a bool for each of the {len(cache.tokens)} sessions"
        )
    return choose(rows, _zeros(cache), cache)


def remove(cache: MemoryCache, gone) -> MemoryCache:
    """The cache without some of its slots (bool ``[B, S]``); those behind them move up."""
    slots = cache.slots
    live = slots.live & ~jnp.asarray(gone)
    # A stable sort keeps the order of index.
    order = jnp.argsort(~live, axis=1, stable=True)
    live = jnp.take_along_axis(live, order, axis=1)

    def entries(x):
        """Of ``[L, B, S, ...]``; what is dropped leaves no number behind."""

        def front(y):
            return y.reshape(1, *y.shape, *(1,) * (x.ndim - 3))

        # Zeros, since a weight of 0 does not undo a NaN.
        return jnp.where(front(live), jnp.take_along_axis(x, front(order), axis=2), 0)

    def place(x):
        return jnp.where(live, jnp.take_along_axis(x, order, axis=1), 0)

    return dataclasses.replace(
        cache,
        k=entries(cache.k),
        v=entries(cache.v),
        slots=Slots(*map(place, fields(slots))),
        ids=None if cache.ids is None else place(cache.ids),
        accumulated_attention=None if cache.accumulated_attention is None else entries(cache.accumulated_attention),
    )


def choose(rows, here: MemoryCache, there: MemoryCache) -> MemoryCache:
    """The sessions ``rows`` (bool ``[B]``) of one cache, and the others of another of the same sizes."""

    def pick(x, y):
        mask = rows.reshape((1,) * _row_axis(y) + (-1,))
        return jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - mask.ndim)), x, y)

    return jax.tree.map(pick, here, there)


def _zeros(cache: MemoryCache) -> MemoryCache:
    """A zero for each array of a cache, as `choose` takes for empty sessions."""
    return jax.tree.map(lambda x: jnp.zeros((), x.dtype), cache)


def _row_axis(x) -> int:
    """Where an array of the cache has its sessions: behind the layers, or in front."""
    # Keys, values, received attention and mixtures have layers in front; counters, slots and logits do not.
    return 1 if x.ndim >= 4 else 0


def fields(slots: Slots) -> tuple:
    return slots.kind, slots.segment, slots.index, slots.position
