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
from jax_ccm.rules.rows import is_in, reachable
from jax_ccm.rules.types import TEXT, Kind, MemoryCache, Method, Slots


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
      model: the decoder that will read into it; its config serves where there are no weights.
      method: the compression method.
      batch: B, number of sessions.
      memory_capacity: most memory slots of a session; the sink has a place of its own.
      raw_capacity: most raw text tokens of a session: the open chunk, or all text that the method keeps.
      dtype: of keys and values; None for the model's own. A config has none: give one with it.
      overflow: when memory is full, make the session invalid ("error"; `check` raises) or drop its oldest ("evict").

    Raises:
      UserError: for capacities that cannot hold one chunk's memory, or a config without a dtype.
    """
    config, dtype = _sizes(model, dtype)
    if overflow not in ("error", "evict"):
        raise UserError(f"overflow is {overflow!r}; allowed: 'error' (refuse) or 'evict' (drop the oldest memory)")
    if memory_capacity < method.memory_slots(1):
        raise UserError(
            f"memory_capacity is {memory_capacity}, but method {method.name!r} writes {method.memory_slots(1)} "
            f"slots for a chunk; give at least that, times the number of chunks to remember"
        )
    if raw_capacity < 1:
        raise UserError(f"raw_capacity is {raw_capacity}; it must hold at least the longest chunk")
    if method.chunk is not None and raw_capacity % method.chunk:
        raise UserError(
            f"raw_capacity is {raw_capacity}; method {method.name!r} takes {method.chunk} tokens at a time, so give a "
            f"multiple of that, such as {-(-raw_capacity // method.chunk) * method.chunk}"
        )
    size = memory_capacity + raw_capacity + int(method.sink)
    shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
    mixed = (*shape[:2], method.mixed_slots, *shape[3:])
    # Every array is its own buffer, so that a cache may be donated.
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    make = lambda: MemoryCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        slots=Slots(*(zeros(batch, size) for _ in range(4))),
        tokens=zeros(batch),
        chunks=zeros(batch),
        logits=jnp.zeros((batch, config.vocab_size), jnp.float32),
        received=jnp.zeros(shape[:-1], jnp.float32) if method.keep and method.keep.decay is not None else None,
        mixed_k=jnp.zeros(mixed, jnp.float32) if method.mix is not None else None,
        mixed_v=jnp.zeros(mixed, jnp.float32) if method.mix is not None else None,
        lost=zeros(batch),
        spoiled=jnp.zeros(batch, bool),
        memory_capacity=memory_capacity,
        overflow=overflow,
    )
    return sharding.born(make, sharding.cache_shardings)


def _sizes(model: Transformer | ModelConfig, dtype) -> tuple[ModelConfig, jnp.dtype]:
    """Sizes of a model, and the type of its cache."""
    if not isinstance(model, ModelConfig):
        return model.config, jnp.dtype(model.dtype if dtype is None else dtype)
    if dtype is None:
        raise UserError("a config does not say of which type keys and values are; give the model, or a dtype with it")
    return model, jnp.dtype(dtype)


def raw_capacity(cache: MemoryCache) -> int:
    """Places that raw text may take."""
    return cache.k.shape[2] - cache.memory_capacity


def append(cache: MemoryCache, k, v, slots: Slots, received=None) -> MemoryCache:
    """Appends entries behind the live ones.

    Args:
      cache: the state.
      k, v: ``[L, B, C, K, H]``.
      slots: `Slots` of ``[B, C]``; those of kind PAD are left out.
      received: ``float32 [L, B, C, K]`` for `MemoryCache.received`.

    Returns:
      The cache. Entries that find no room are counted in `MemoryCache.lost`.
    """
    chex.assert_equal_shape_prefix([cache.k[:, :, 0], k[:, :, 0]], 2)
    used = jnp.sum(cache.slots.live, axis=1, keepdims=True)
    raw = jnp.sum(cache.slots.live & (cache.slots.kind != Kind.MEMORY), axis=1, keepdims=True)
    rank = jnp.cumsum(slots.live, axis=1) - 1
    fits = slots.live & (raw + rank < raw_capacity(cache))
    place = jnp.where(fits, used + rank, cache.k.shape[2])
    put = lambda old, new: put_rows(old, new, place)
    # Layer by layer: with all layers of a slot as one entry a compiler would turn the cache around, into a second one.
    places = jnp.broadcast_to(place, (cache.k.shape[0], *place.shape))
    put_layers = lambda old, new: jax.vmap(put_rows)(old, new, places)
    return dataclasses.replace(
        cache,
        k=put_layers(cache.k, k),
        v=put_layers(cache.v, v),
        slots=Slots(*(put(old, new) for old, new in zip(_fields(cache.slots), _fields(slots), strict=True))),
        received=None if cache.received is None else put_layers(cache.received, received),
        lost=cache.lost + jnp.sum(slots.live & ~fits, axis=1),
    )


# Row by row: with row numbers as indices the compiler would gather the sessions of all devices.
put_rows = jax.vmap(lambda old, new, place: old.at[place].set(new.astype(old.dtype), mode="drop"))


def best(cache: MemoryCache, method: Method, selected, closing):
    """What a selection (`Method.keep`) writes: the worthiest of the memory and the raw text that is being closed.

    Each head of each layer chooses for itself; the entries keep the rotation that they had. Index and position of a
    slot are those of what the first head of the first layer keeps there.

    Args:
      cache: the state.
      method: the compression method.
      selected: ``bool [B, S]``, raw text that makes the chunk.
      closing: ``bool [B]``, rows that close one.

    Returns:
      k, v ``[L, B, n, K, H]`` and received ``[L, B, n, K]`` or None, with n = `MemoryCache.memory_capacity`; `Slots` of
      ``[B, n]``, kind MEMORY or PAD; and ``int32 [B]``, how many more would have been kept with more capacity.
    """
    keep = method.keep
    assert keep is not None
    old = cache.slots
    candidates = (selected | (old.kind == Kind.MEMORY)) & (old.kind != Kind.SINK) & closing[:, None]
    worth = keep.worth(cache.k, cache.received, old.index, candidates)
    worth = jnp.where(candidates[None, :, :, None], worth.astype(jnp.float32), -jnp.inf)
    size = min(cache.memory_capacity, old.kind.shape[1])
    order = jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(worth, 2, 3), size)[1], 3, 2)  # [L, B, n, K]
    wanted = jnp.minimum(keep.slots * (1 if keep.constant else cache.chunks + 1), jnp.sum(candidates, axis=1))
    live = jnp.arange(size) < wanted[:, None]
    take = lambda x: jnp.take_along_axis(x, order[..., None], axis=2)
    received = None if cache.received is None else jnp.take_along_axis(cache.received, order, axis=2)
    slot = lambda x: jnp.take_along_axis(x, order[0, :, :, 0], axis=1)
    slots = Slots(
        jnp.where(live, Kind.MEMORY, Kind.PAD),
        jnp.broadcast_to(cache.chunks[:, None], live.shape),
        slot(old.index),
        slot(old.position),
    )
    return take(cache.k), take(cache.v), received, slots, jnp.maximum(wanted - size, 0)


def write(
    cache: MemoryCache, method: Method, k, v, slots: Slots, closing, received=None, *, whole: bool
) -> MemoryCache:
    """Closes a chunk in some rows: enters its memory and removes what the rule hides from now on.

    Args:
      cache: the state, its raw slots labelled with the segment that they belong to after this.
      method: the compression method.
      k, v: ``[L, B, n, K, H]`` keys and values of the closing tokens that write memory; n may be 0.
      slots: `Slots` of ``[B, n]`` for them, kind MEMORY.
      closing: ``bool [B]``, rows that close a chunk; the others keep their memory.
      received: ``float32 [L, B, n, K]`` for `MemoryCache.received`.
      whole: as for `closed`.
    """
    after, store = closed(cache, method, slots, closing, whole=whole)
    live = slots.live[None, :, :, None, None]
    finite = [jnp.all(jnp.isfinite(x) | ~live, axis=(0, 2, 3, 4)) for x in (k, v)]
    after = dataclasses.replace(after, spoiled=after.spoiled | ~(finite[0] & finite[1]))
    # What is received goes with the keys; only methods without a mixture ask for it.
    old, new = cache.stored, (k, v)
    if cache.received is not None:
        old, new = (*old, cache.received), (*new, received)

    def layer(number, whole):
        # In place: a copy of the whole cache would halve the sessions that fit.
        at = lambda arrays: tuple(x[number] for x in arrays)
        update = lambda x, layer: jax.lax.dynamic_update_index_in_dim(x, layer, number, 0)
        return tuple(map(update, whole, store(at(whole), at(new))))

    done = jax.lax.fori_loop(0, k.shape[0], layer, old)
    return (
        after.storing(done)
        if cache.received is None
        else dataclasses.replace(after.storing(done[:2]), received=done[2])
    )


def closed(cache: MemoryCache, method: Method, slots: Slots, closing, *, whole: bool):
    """The slots and counters of a cache whose chunk is closed, and what happens to the entries of each layer.

    Appending methods add the entries as slots; mixtures blend them into the memory slot by slot,
    ``memory = (1 - a) memory + a new`` with ``a = mix.rate(number of this chunk)`` (CCM, equation 3), in float32: in
    bfloat16 a mean of a few hundred chunks would round the next one away. Live entries then stand in front, in order
    of index.

    Args:
      cache: the state, its raw slots labelled with the segment that they belong to after this.
      method: the compression method.
      slots: `Slots` of ``[B, n]`` for what is written, kind MEMORY.
      closing: ``bool [B]``, rows that close a chunk; the others keep their memory.
      whole: static, whether rows that close a chunk close all of their open text; what stays open has to move.

    Returns:
      The cache with what it stored before, and ``store(own, new) -> own`` that makes the new arrays of a layer: ``own``
      are arrays ``[B, S, ...]`` to which arrays ``new`` of ``[B, n, ...]`` are written, and, where the method mixes,
      their mixtures ``float32 [B, n, ...]``.

    Raises:
      UserError: for a cache that was made for another method.
    """
    old, size, count = cache.slots, cache.k.shape[2], slots.kind.shape[1]
    blend = _blending(cache, method, count, closing)
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    both = Slots(*(join(a, b) for a, b in zip(_fields(old), _fields(slots), strict=True)))
    kept = reachable(method.rule, both, cache.chunks + 1, cache.tokens) & both.live
    is_new = jnp.arange(both.kind.shape[1]) >= size
    kept = jnp.where(closing[:, None], kept, both.live & ~is_new)
    memory = kept & (both.kind == Kind.MEMORY)
    # Memory stands in order of age: the oldest are those of the lowest rank.
    rank = jnp.cumsum(memory, axis=1)
    excess = jnp.maximum(rank[:, -1] - cache.memory_capacity, 0)
    refused = rank > cache.memory_capacity if cache.overflow == "error" else rank <= excess[:, None]
    kept = kept & ~(memory & refused)
    order = jnp.argsort(jnp.where(kept, both.index, jnp.iinfo(jnp.int32).max), axis=1, stable=True)[:, :size]
    take = lambda x: jnp.take_along_axis(x, order, axis=1)
    live = take(kept)
    placed = Slots(
        jnp.where(live, take(both.kind), Kind.PAD),
        *(jnp.where(live, take(x), 0) for x in (both.segment, both.index, both.position)),
    )

    # Whole on the devices that share a row: otherwise they exchange masks of the shape of a layer.
    order, live, enters = (sharding.constrain(x, "rows") for x in (order, live, order >= size))
    stays = whole and method.forgets_text and cache.overflow == "error"

    def place(own, new):
        inner = lambda a: a.reshape(*a.shape, *(1,) * (own.ndim - 2))
        each = lambda x, place: jnp.take_along_axis(x, inner(jnp.clip(place, 0, x.shape[1] - 1)), axis=1)
        entered = each(new.astype(own.dtype), order - size) if count else jnp.zeros_like(own)
        # What stays is not even read from elsewhere, so that a layer can change in place.
        entries = jnp.where(inner(enters), entered, own if stays else each(own, order))
        return jnp.where(inner(live), entries, 0)

    def store(own, new):
        own, mixed = own[: len(new)], own[len(new) :]
        if mixed:
            new = mixed = tuple(map(blend, mixed, new))
        return (*map(place, own, new), *mixed)

    lost = cache.lost + (excess if cache.overflow == "error" else jnp.zeros_like(excess))
    return dataclasses.replace(cache, slots=placed, chunks=cache.chunks + closing, lost=lost), store


def _blending(cache: MemoryCache, method: Method, count: int, closing):
    """``(mixed, new) -> mixed`` for a layer's mixture ``float32 [B, n, K, H]`` and what a chunk writes."""
    held = 0 if cache.mixed_k is None else cache.mixed_k.shape[2]
    if held != (count if method.mix is not None else 0):
        raise UserError(
            f"method {method.name!r} mixes {count if method.mix is not None else 0} slots, this cache has {held} that "
            "are mixed: it was made for another method. Make one with `init_cache` for this method"
        )
    if method.mix is None:
        return lambda mixed, new: new  # there is no mixture
    column = lambda x: x[:, None, None, None]
    rate = column(method.mix.rate(cache.chunks + 1).astype(jnp.float32))
    return lambda mixed, new: jnp.where(column(closing), (1 - rate) * mixed + rate * new, mixed)


def pooled(cache: MemoryCache, method: Method, closing):
    """What pooling writes when a chunk is closed: means over the text that no later segment sees (`Method.pool`).

    Keys are averaged as they stand in the cache, rotated by the positions of their tokens: the score of a slot is then
    the mean of the scores of its tokens. (The Compressive Transformer pools before it adds relative positions.)

    Args:
      cache: the state, its raw slots labelled with the segment that they belong to.
      method: the compression method; without `Method.pool` nothing is written.
      closing: ``bool [B]``, rows that close a chunk.

    Returns:
      Keys and values ``[L, B, W, K, H]`` and `Slots` of ``[B, W]`` for `write`; W slots are enough for all raw text.
    """
    size = method.pool or 1
    width = -(-raw_capacity(cache) // size) if method.pool else 0
    slots = cache.slots
    hidden = is_in(slots.kind, TEXT) & ~reachable(method.rule, slots, cache.chunks + 1, cache.tokens)
    hidden = hidden & closing[:, None]
    order = jnp.argsort(~hidden, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, max(width * size - order.shape[1], 0))))[:, : width * size]
    used = (jnp.arange(width * size) < jnp.sum(hidden, axis=1, keepdims=True)).reshape(order.shape[0], width, size)
    count = jnp.sum(used, axis=2)
    share = used / jnp.maximum(count, 1)[:, :, None]

    def mean(x):
        parts = jnp.take_along_axis(x, order[None, :, :, None, None], axis=2).astype(jnp.float32)
        parts = parts.reshape(*x.shape[:2], width, size, *x.shape[3:])
        return jnp.einsum("bwc,lbwckh->lbwkh", share, parts)

    pick = lambda x: jnp.max(
        jnp.where(used, jnp.take_along_axis(x, order, axis=1).reshape(used.shape), 0), axis=2, initial=0
    )
    kind = jnp.where(count > 0, Kind.MEMORY, Kind.PAD)
    entries = Slots(kind, pick(slots.segment), pick(slots.index), pick(slots.position))
    return mean(cache.k), mean(cache.v), entries


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
            "(NaN or infinity). Weights may be damaged, or too large for the type that they were loaded in; float32 "
            "or bfloat16 hold what float16 does not. Start these sessions anew (`cache.reset`), or from a copy of "
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
    found = jax.tree.map(lambda x: jnp.take(x, rows, axis=_row_axis(x), mode="clip"), cache)
    return found if isinstance(rows, np.ndarray) else _where((rows >= 0) & (rows < batch), found)


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
    return _where(~rows, cache)


def _where(rows, cache: MemoryCache) -> MemoryCache:
    """The cache with all sessions but ``rows`` (bool ``[B]``) made empty."""

    def clear(x):
        mask = rows.reshape((1,) * _row_axis(x) + (-1,))
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(clear, cache)


def _row_axis(x) -> int:
    """Where an array of the cache has its sessions: behind the layers, or in front."""
    return 1 if x.ndim >= 4 else 0


def _fields(slots: Slots) -> tuple:
    return slots.kind, slots.segment, slots.index, slots.position
