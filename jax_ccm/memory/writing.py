"""What a cache holds after a chunk is closed: appended, blended, pooled or selected."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.memory.cache import fields, raw_capacity
from jax_ccm.rules.types import TEXT, Kind, MemoryCache, Method, Slots
from jax_ccm.rules.visibility import is_in, reachable


def best(cache: MemoryCache, method: Method, selected, closing):
    """What an eviction policy writes: the best of the memory and of the raw text that is being closed, by score.

    Each head of each layer chooses for itself; the entries keep the rotation that they had. Index and position of a
    slot are those of what the first head of the first layer keeps there.

    Args:
      cache: the state.
      method: the compression method.
      selected: ``bool [B, S]``, raw text that makes the chunk.
      closing: ``bool [B]``, rows that close one.

    Returns:
      k, v ``[L, B, n, K, H]`` and attention ``[L, B, n, K]`` or None, with n = `MemoryCache.memory_capacity`; `Slots`
      of ``[B, n]``, kind MEMORY or PAD; and ``int32 [B]``, how many more would have been kept with more capacity.
    """
    policy = method.eviction
    assert policy is not None
    old = cache.slots
    # Memory of earlier chunks competes again.
    candidates = (selected | (old.kind == Kind.MEMORY)) & (old.kind != Kind.SINK) & closing[:, None]
    scores = policy.score(cache.k, cache.accumulated_attention, old.index, candidates)
    # What is no candidate comes last, and `wanted` is at most the number of candidates.
    scores = jnp.where(candidates[None, :, :, None], scores.astype(jnp.float32), -jnp.inf)
    size = min(cache.memory_capacity, old.kind.shape[1])
    order = jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(scores, 2, 3), size)[1], 3, 2)  # [L, B, n, K]
    wanted = jnp.minimum(policy.slots * (1 if policy.constant else cache.chunks + 1), jnp.sum(candidates, axis=1))
    live = jnp.arange(size) < wanted[:, None]

    def take(x):
        return jnp.take_along_axis(x, order[..., None], axis=2)

    attention = (
        None if cache.accumulated_attention is None else jnp.take_along_axis(cache.accumulated_attention, order, axis=2)
    )

    def slot(x):
        return jnp.take_along_axis(x, order[0, :, :, 0], axis=1)

    # Of this chunk, whatever the entries were read with: the rule sees memory of the last closed chunk only, so that
    # the selection before is removed.
    slots = Slots(
        jnp.where(live, Kind.MEMORY, Kind.PAD),
        jnp.broadcast_to(cache.chunks[:, None], live.shape),
        slot(old.index),
        slot(old.position),
    )
    return take(cache.k), take(cache.v), attention, slots, jnp.maximum(wanted - size, 0)


def write(
    cache: MemoryCache, method: Method, k, v, slots: Slots, closing, attention=None, *, whole: bool
) -> MemoryCache:
    """Closes a chunk in some rows: enters its memory and removes what the rule hides from now on.

    Args:
      cache: the state, its raw slots labelled with the segment that they belong to after this.
      method: the compression method.
      k, v: ``[L, B, n, K, H]`` keys and values of the closing tokens that write memory; n may be 0.
      slots: `Slots` of ``[B, n]`` for them, kind MEMORY.
      closing: ``bool [B]``, rows that close a chunk; the others keep their memory.
      attention: ``float32 [L, B, n, K]`` for `MemoryCache.accumulated_attention`.
      whole: as for `closed`.
    """
    after, store = closed(cache, method, slots, closing, whole=whole)
    live = slots.live[None, :, :, None, None]  # [1, B, n, 1, 1]
    # Entries that no token wrote may be anything; they are never stored.
    finite = [jnp.all(jnp.isfinite(x) | ~live, axis=(0, 2, 3, 4)) for x in (k, v)]
    after = dataclasses.replace(after, spoiled=after.spoiled | ~(finite[0] & finite[1]))
    # The accumulated attention goes with the keys; only methods without a mixture ask for it.
    old, new = cache.stored, (k, v)
    if cache.accumulated_attention is not None:
        old, new = (*old, cache.accumulated_attention), (*new, attention)

    def layer(number, whole):
        # In place: a copy of the whole cache would halve the sessions that fit.
        def at(arrays):
            return tuple(x[number] for x in arrays)

        def update(x, layer):
            return jax.lax.dynamic_update_index_in_dim(x, layer, number, 0)

        return tuple(map(update, whole, store(at(whole), at(new))))

    done = jax.lax.fori_loop(0, k.shape[0], layer, old)
    return (
        after.storing(done)
        if cache.accumulated_attention is None
        else dataclasses.replace(after.storing(done[:2]), accumulated_attention=done[2])
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
      their mixtures ``float32 [B, groups * n, ...]``.

    Raises:
      UserError: for a cache that was made for another method.
    """
    old, size, count = cache.slots, cache.k.shape[2], slots.kind.shape[1]
    # Where no chunk is old enough yet (`Method.recent`), one is closed and nothing is written.
    blend = _blending(cache, method, count, closing & jnp.any(slots.live, axis=1) if method.recent else closing)

    def join(a, b):
        return jnp.concatenate([a, b], axis=1)

    # The slots of the cache, and behind them what is written.
    both = Slots(*(join(a, b) for a, b in zip(fields(old), fields(slots), strict=True)))
    kept = reachable(method.rule, both, cache.chunks + 1, cache.next_position) & both.live
    is_new = jnp.arange(both.kind.shape[1]) >= size
    # Rows that close nothing keep all of theirs and get nothing new.
    kept = jnp.where(closing[:, None], kept, both.live & ~is_new)
    memory = kept & (both.kind == Kind.MEMORY)
    # Memory stands in order of age: the oldest are those of the lowest rank.
    rank = jnp.cumsum(memory, axis=1)
    excess = jnp.maximum(rank[:, -1] - cache.memory_capacity, 0)
    # "error" turns away what is new, and the session is invalid; "evict" drops what is oldest.
    refused = rank > cache.memory_capacity if cache.overflow == "error" else rank <= excess[:, None]
    kept = kept & ~(memory & refused)
    # By index: what is written takes the place of the text that it stands for.
    order = jnp.argsort(jnp.where(kept, both.index, jnp.iinfo(jnp.int32).max), axis=1, stable=True)[:, :size]

    def take(x):
        return jnp.take_along_axis(x, order, axis=1)

    live = take(kept)
    placed = Slots(
        jnp.where(live, take(both.kind), Kind.PAD),
        *(jnp.where(live, take(x), 0) for x in (both.segment, both.index, both.position)),
    )

    # What is written is no text.
    ids = None if cache.ids is None else jnp.where(live, take(join(cache.ids, jnp.zeros_like(slots.kind))), 0)
    # Whole on the devices that share a row: otherwise they exchange masks of the shape of a layer.
    order, live, enters = (sharding.constrain(x, "rows") for x in (order, live, order >= size))
    stays = whole and method.forgets_text and cache.overflow == "error"

    def place(own, new):
        def inner(a):
            return a.reshape(*a.shape, *(1,) * (own.ndim - 2))

        def each(x, place):
            return jnp.take_along_axis(x, inner(jnp.clip(place, 0, x.shape[1] - 1)), axis=1)

        entered = each(new.astype(own.dtype), order - size) if count else jnp.zeros_like(own)
        # What stays is not even read from elsewhere, so that a layer can change in place.
        entries = jnp.where(inner(enters), entered, own if stays else each(own, order))
        # Zeros where nothing is live: a weight of 0 does not undo a NaN.
        return jnp.where(inner(live), entries, 0)

    def store(own, new):
        own, mixed = own[: len(new)], own[len(new) :]
        if mixed:
            mixed, new = zip(*map(blend, mixed, new), strict=True)
        return (*map(place, own, new), *mixed)

    lost = cache.lost + (excess if cache.overflow == "error" else jnp.zeros_like(excess))
    return dataclasses.replace(cache, slots=placed, ids=ids, chunks=cache.chunks + closing, lost=lost), store


def _blending(cache: MemoryCache, method: Method, count: int, closing):
    """``(mixed, new) -> mixed, state`` for a layer's mixtures and what a chunk writes.

    Mixtures are ``float32 [B, groups * n, K, H]``, and what a chunk writes ``[B, n, K, H]``. The state, of that shape,
    is that of the mixture which the chunk has entered (`Method.groups`).
    """
    held = 0 if cache.mixed_k is None else cache.mixed_k.shape[2]
    if held != method.mixed_slots:
        raise UserError(
            f"method {method.name!r} mixes {method.mixed_slots} slots, this cache has {held} that are mixed: it was "
            "made for another method. Make one with `init_cache` for this method"
        )
    if method.mix is None:
        return lambda mixed, new: (new, new)  # there is no mixture

    def column(x):
        return x[:, None, None, None]

    # Chunks are counted as they become memory, which with `Method.recent` is so many chunks later.
    number = jnp.maximum(cache.chunks - method.recent, 0)
    # ``a_t`` of the formula, by the number of the chunk within its own mixture.
    rate = column(method.mix.rate(number // method.groups + 1).astype(jnp.float32))
    group = jnp.arange(method.groups) == (number % method.groups)[:, None]  # [B, groups]

    def blend(mixed, new):
        groups = mixed.reshape(mixed.shape[0], method.groups, count, *mixed.shape[2:])  # [B, groups, n, K, H]
        entered = (group & closing[:, None])[:, :, None, None, None]
        groups = jnp.where(entered, (1 - rate[:, None]) * groups + rate[:, None] * new[:, None], groups)
        state = jnp.sum(jnp.where(group[:, :, None, None, None], groups, 0), axis=1)
        return groups.reshape(mixed.shape), state

    return blend


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
    # As many slots as all raw text could need, so that shapes do not depend on the text.
    width = -(-raw_capacity(cache) // size) if method.pool else 0
    slots = cache.slots
    hidden = is_in(slots.kind, TEXT) & ~reachable(method.rule, slots, cache.chunks + 1, cache.next_position)
    hidden = hidden & closing[:, None]
    # Text that becomes hidden in front, in its order, and cut into shares of `size`.
    order = jnp.argsort(~hidden, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, max(width * size - order.shape[1], 0))))[:, : width * size]
    # [B, W, c], of each slot.
    used = (jnp.arange(width * size) < jnp.sum(hidden, axis=1, keepdims=True)).reshape(order.shape[0], width, size)
    count = jnp.sum(used, axis=2)
    share = used / jnp.maximum(count, 1)[:, :, None]

    def mean(x):
        # In float32 and rounded when stored, as in the parallel forward (`nn.layer.pack`).
        parts = jnp.take_along_axis(x, order[None, :, :, None, None], axis=2).astype(jnp.float32)
        parts = parts.reshape(*x.shape[:2], width, size, *x.shape[3:])
        return jnp.einsum("bwc,lbwckh->lbwkh", share, parts, precision=jax.lax.Precision.HIGHEST)

    def pick(x):
        # Of the last token of a share, as in `rows`: index and position ascend.
        return jnp.max(jnp.where(used, jnp.take_along_axis(x, order, axis=1).reshape(used.shape), 0), axis=2, initial=0)

    kind = jnp.where(count > 0, Kind.MEMORY, Kind.PAD)
    entries = Slots(kind, pick(slots.segment), pick(slots.index), pick(slots.position))
    return mean(cache.k), mean(cache.v), entries


def observed(cache: MemoryCache, attention, faded, rows) -> MemoryCache:
    """The state after its entries have received attention ``float32 [L, B, S, K]`` in ``rows`` (``bool [B]``).

    Of what they received before a share ``faded``, ``float32 [B]``, is left.
    """
    before = cache.accumulated_attention
    assert before is not None
    total = before * faded[None, :, None, None] + attention
    return dataclasses.replace(cache, accumulated_attention=jnp.where(rows[None, :, None, None], total, before))
