"""The heart: one parallel forward for training, and the same computation as a recurrence for inference.

In the notation of CCM (Kim et al., ICLR 2024, section 3), for time step t::

    h(t)   = g_comp(Mem(t-1), c(t))        compress: run the compression tokens on the memory and the chunk
    Mem(t) = g_update(Mem(t-1), h(t))      writing.closed: append, or (1 - a_t) Mem(t-1) + a_t h(t)
    O(t)   = f(I(t) | Mem(t))              read: run the input on the memory

All functions are pure; model, cache and batch are pytrees, `method` is static.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_ccm.errors import UserError
from jax_ccm.memory import labels, writing
from jax_ccm.memory.cache import append, open_raw, raw_capacity
from jax_ccm.memory.rebasing import rebased
from jax_ccm.memory.starts import starts_of_row, starts_of_session
from jax_ccm.nn.linear import Gate
from jax_ccm.nn.transformer import Remat, Transformer
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.rows import WITH_SINK
from jax_ccm.rules.types import RAW, Array, Chunk, Kind, MemoryCache, Method, Slots
from jax_ccm.rules.visibility import gate, is_in


def parallel_forward(
    model: Transformer,
    batch: Batch,
    *,
    method: Method,
    dropout_key=None,
    remat: Remat = "none",
):
    """All chunks of a session at once: what the recurrence computes, in one causal pass.

    Args:
      model: the decoder with its adapter.
      batch: laid out by `rows.batch` for the same method.
      method: static.
      dropout_key: PRNG key for the dropout on the LoRA's input; None in evaluation.
      remat: what the backward pass recomputes, as for `Transformer`.

    Returns:
      Hidden states after the final norm, ``[B, T, D]``.
    """
    return _parallel(model, batch, method, dropout_key, remat)[0]


def parallel_forward_with_attention(
    model: Transformer,
    batch: Batch,
    *,
    method: Method,
    dropout_key=None,
    remat: Remat = "none",
):
    """`parallel_forward`, and what attention gives each scored token in each layer.

    Args:
      model, batch, method, dropout_key, remat: as for `parallel_forward`.

    Returns:
      Hidden states ``[B, T, D]``; and attention outputs ``[L, B, Q, N, H]`` of the tokens at `Batch.indices`, before
      the output projection.
    """
    return _parallel(model, batch, method, dropout_key, remat, attended_at=batch.indices)


def _parallel(model: Transformer, batch: Batch, method: Method, dropout_key, remat: Remat, attended_at=None):
    gated = gate(method, batch.slots)
    if gated is not None and batch.memory is not None and set(method.gate) <= set(method.writes):
        # Only tokens that write memory need the LoRA: it is run on them alone. Unused entries of the source point to
        # the first place of the row, which no such token can have.
        gated = Gate(jnp.take_along_axis(gated, batch.memory.source, axis=1), batch.memory.source)
    hidden, _, attended = model(
        batch.tokens,
        batch.slots,
        gated,
        rule=method.rule,
        memory=batch.memory,
        starts=starts_of_row(model, batch, method),
        dropout_key=dropout_key,
        remat=remat,
        attended_at=attended_at,
    )
    return hidden, attended


def read(
    model: Transformer,
    cache: MemoryCache,
    chunk: Chunk,
    *,
    method: Method,
    query: bool = False,
):
    """Appends raw text to each session; it attends to the memory and to the raw text before it.

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      chunk: the text; rows without a valid token are left as they are.
      method: static.
      query: the text is the input to answer, or the answer, not context (they differ in methods whose chunks do not
        see memory).

    Returns:
      The cache, with the pending logits of each row's last token; and logits ``float32 [B, C, V]`` after each token
      (not computed under jit if unused). A row with a hidden state that is not finite keeps nothing of the text and
      is spoiled (`MemoryCache.spoiled`), and one with text to keep where the method cannot (`Method.kept_kind`) is
      spoiled, too.

    Raises:
      UserError: for a chunk longer than the region of raw text, or with text to keep for a method that keeps none.
    """
    length = chunk.tokens.shape[1]
    if length > raw_capacity(cache):
        raise UserError(
            f"a chunk of {length} tokens does not fit the region of {raw_capacity(cache)} raw tokens; split it, "
            "or make the cache with a larger raw_capacity"
        )
    rank, count = _ranks(chunk)
    slots, misplaced = _text(cache, chunk, rank, Kind.QUERY if query else Kind.TEXT, method)
    decay = None if method.eviction is None else method.eviction.decay
    # A token is followed by count - 1 - rank others, each of which multiplies what it gave; 0 ** 0 is 1, so that with a
    # decay of 0 the last token alone counts.
    observe = None if decay is None else chunk.valid * decay ** (count[:, None] - 1 - rank).astype(jnp.float32)
    hidden, (k, v), attention = model(
        chunk.tokens,
        slots,
        gate(method, slots, (Kind.TEXT, Kind.QUERY, Kind.SINK)),
        rule=method.rule,
        memory=cache,
        positions=_positions(cache, rank, method),
        observe=observe,
    )
    # Padding may give anything; it is never stored.
    finite = jnp.all(jnp.isfinite(hidden) | ~chunk.valid[:, :, None], axis=(1, 2))
    own = None
    if decay is not None and attention is not None:
        own, past = attention
        cache = writing.observed(cache, past, decay ** count.astype(jnp.float32), finite)
    last = jnp.argmax(jnp.where(chunk.valid, rank, -1), axis=1)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    # This also orders the write behind every layer's read of the cache: where nothing does, XLA copies the whole cache
    # on a CPU, twice for every token.
    slots = dataclasses.replace(slots, kind=jnp.where(finite[:, None], slots.kind, Kind.PAD))
    cache = append(cache, k, v, slots, chunk.tokens, own)
    cache = dataclasses.replace(
        cache,
        tokens=cache.tokens + count,
        logits=jnp.where((count > 0)[:, None], model.logits(final), cache.logits),
        spoiled=cache.spoiled | ~finite | misplaced,
    )
    return cache, model.logits(hidden)


def attention_shares(model: Transformer, cache: MemoryCache, chunk: Chunk, *, method: Method):
    """Where a question that is read next looks: shares of its attention, of which nothing is kept.

    Args:
      model, cache, method: as of `read`.
      chunk: the question, and the answer to it; rows without a valid token get zeros.

    Returns:
      The shares of the text itself ``float32 [L, B]`` and of each entry of the cache ``[L, B, S]``, means over the
      heads and the tokens of a row: together 1.
    """
    rank, count = _ranks(chunk)
    slots, _ = _text(cache, chunk, rank, Kind.QUERY, method)
    _, _, attention = model(
        chunk.tokens,
        slots,
        gate(method, slots, (Kind.TEXT, Kind.QUERY, Kind.SINK)),
        rule=method.rule,
        memory=cache,
        positions=_positions(cache, rank, method),
        observe=chunk.valid.astype(jnp.float32),
    )
    assert attention is not None
    own, past = attention
    all_of_it = jnp.maximum(count, 1) * model.config.num_heads
    return jnp.sum(own, axis=(2, 3)) / all_of_it, jnp.sum(past, axis=3) / all_of_it[:, None]


def _ranks(chunk: Chunk):
    """The number of each token among the valid ones of its row, and how many these are; padding may stand anywhere."""
    return jnp.cumsum(chunk.valid, axis=1) - 1, jnp.sum(chunk.valid, axis=1)


def _positions(cache: MemoryCache, rank, method: Method):
    """Indices of text in the cache, behind what is live, where RoPE goes by them; else None."""
    return jnp.sum(cache.slots.live, axis=1, keepdims=True) + rank if method.rope == "cache" else None


def _text(cache: MemoryCache, chunk: Chunk, rank, text: Kind, method: Method):
    """Labels of text that is read, and the rows that are to keep some of it where it cannot be kept.

    Args:
      cache, chunk, method: as of `read`.
      rank: ``int32 [B, C]``, the number of each valid token in its row.
      text: kind of what is not kept.

    Returns:
      `Slots` of ``[B, C]``, and ``bool [B]``.
    """
    # Index and position of raw text are one number: how many text tokens came before it since the session began, or
    # since what is left of it would have begun.
    position = cache.next_position[:, None] + rank
    misplaced = jnp.zeros(cache.tokens.shape, bool)
    kind = jnp.asarray(text)
    if chunk.kept is not None:
        if method.kept_kind is None:
            raise UserError(f"a chunk has text to keep, but method {method.name!r} keeps none{WITH_SINK}")
        kind = jnp.where(chunk.kept, method.kept_kind, kind)
        if method.kept_kind is Kind.SINK:
            # Sinks stand in front of all else, so that closing a chunk need not move them.
            begun = jnp.any(cache.slots.live & (cache.slots.kind != Kind.SINK), axis=1, keepdims=True)
            behind = begun | (jnp.cumsum(chunk.valid & ~chunk.kept, axis=1) > 0)
            misplaced = jnp.any(chunk.valid & chunk.kept & behind, axis=1)
    if method.sink:
        kind = jnp.where(position < method.sink, Kind.SINK, kind)
    kind = jnp.where(chunk.valid, kind, Kind.PAD)
    segment = jnp.broadcast_to(cache.chunks[:, None], position.shape)
    return Slots(kind, segment, position, position), misplaced


def compress(
    model: Transformer,
    cache: MemoryCache,
    which=None,
    *,
    method: Method,
) -> MemoryCache:
    """Closes a chunk: one pass of the method's tokens over raw text, write, drop it, compact.

    With `Method.recent` the text of the chunk stays, and what is compressed is that of an older one, if there is one.
    A session that forgets its oldest memory and comes near the base's last position is moved back (`rebased`).

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      which: ``bool [B]``, the rows to compress, or ``bool [B, S]``, the slots of raw text that make the chunk (the
        oldest of each row; the rest stays raw, in the next segment); None for all. Rows with no such text pass through.
      method: static.

    Returns:
      The cache. Rows for which numbers come out that are not finite are spoiled (`MemoryCache.spoiled`).

    Raises:
      UserError: for single slots of a method that keeps the text of recent chunks.
    """
    if method.recent and which is not None and which.ndim == 2:
        raise UserError(
            f"method {method.name!r} keeps the text of {method.recent} closed chunks, so that whole chunks are closed; "
            "give a bool for each row"
        )
    return rebased(model.config, _closed(model, cache, which, method), method)


def _closed(model: Transformer, cache: MemoryCache, which, method: Method) -> MemoryCache:
    """`compress`, at positions that run on."""
    cache, selected, closing, rest = _opened(cache, which, method)
    whole = which is None or which.ndim == 1
    if method.eviction is not None:
        k, v, attention, slots, lost = writing.best(cache, method, selected, closing)
        lost = lost if cache.overflow == "error" else 0
        # What the policy would have kept beyond the capacity.
        cache = dataclasses.replace(cache, lost=cache.lost + lost)
        return writing.write(cache, method, k, v, slots, closing, attention, whole=whole)
    if not method.closes:
        return writing.write(cache, method, *writing.pooled(cache, method, closing), closing, whole=whole)
    # With `Method.recent` a row may close a chunk before any is old enough to be compressed.
    rows = jnp.any(selected, axis=1) if method.recent else closing
    comp, memory = labels.closing_tokens(cache, selected, rows, method)
    positions = None
    if method.rope == "cache":
        offsets = jnp.asarray([token.offset for token in method.closes])
        # What stays open stands behind what is closed, and does not count.
        positions = jnp.sum(cache.slots.live & ~rest, axis=1, keepdims=True) + offsets
    ids = [model.config.vocab_size + token.embedding_index for token in method.closes]
    # Where entries go is known before any token runs, so that `store` can write each layer as it is done.
    after, store = writing.closed(cache, method, memory, closing, whole=whole)
    hidden, stored, _ = model(
        jnp.broadcast_to(jnp.asarray(ids, jnp.int32), comp.kind.shape),
        comp,
        gate(method, comp),
        rule=method.rule,
        # As it was: older memory and the chunk's text. What stays open is of the next segment, and not seen.
        memory=cache,
        positions=positions,
        starts=starts_of_session(model, cache, comp, selected, method),
        store=lambda own, new: store(own, tuple(labels.written(method, x) for x in new)),
    )
    # Closing tokens see themselves: keys and values that are not finite show in what follows from them.
    finite = jnp.all(jnp.isfinite(hidden) | ~comp.live[:, :, None], axis=(1, 2))
    return dataclasses.replace(after.storing(stored), spoiled=after.spoiled | ~finite)


def _opened(cache: MemoryCache, which, method: Method):
    """What closing compresses: of the arguments of `compress`.

    Returns:
      The cache, in which open text that is not part of the chunk belongs to the next segment; ``bool [B, S]``, the
      text that becomes memory; ``bool [B]``, the rows that close a chunk; ``bool [B, S]``, the text that stays open.
    """
    raw = open_raw(cache, method)
    # [B, S], or [B, 1] for whole rows.
    chosen = jnp.ones((), bool) if which is None else which if which.ndim == 2 else which[:, None]
    selected = raw & chosen
    closing = jnp.any(selected, axis=1)
    # A sink has no segment to move to: it is seen by all.
    rest = raw & ~selected & closing[:, None] & (cache.slots.kind != Kind.SINK)
    slots = dataclasses.replace(cache.slots, segment=cache.slots.segment + rest)
    if method.recent:
        # What becomes memory is the chunk that is now too old to stay as it is.
        old = slots.segment == cache.chunks[:, None] - method.recent
        selected = is_in(slots.kind, (*method.compresses, Kind.SINK)) & old & closing[:, None]
    return dataclasses.replace(cache, slots=slots), selected, closing, rest


def compress_step(model: Transformer, cache: MemoryCache, chunk: Chunk, *, method: Method) -> MemoryCache:
    """Reads a chunk and closes it: ``Mem(t-1), c(t) -> Mem(t)``, the carry of `jax.lax.scan` (CCM, section 3).

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      chunk: the text, ``[B, C]``; rows without a valid token pass through.
      method: static.

    Returns:
      The cache, of the same shape.

    Raises:
      UserError: as `read`.
    """
    cache, _ = read(model, cache, chunk, method=method)
    some = jnp.any(chunk.valid, axis=1)
    return compress(model, cache, some, method=method)


def compress_scan(model: Transformer, cache: MemoryCache, chunks: Chunk, *, method: Method) -> MemoryCache:
    """`compress_step` over many chunks, as one `jax.lax.scan`.

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      chunks: stacked in front, ``[time, B, C]``.
      method: static.

    Returns:
      The cache after the last chunk.

    Raises:
      UserError: as `read`.
    """

    def step(cache, chunk):
        return compress_step(model, cache, chunk, method=method), None

    return jax.lax.scan(step, cache, chunks)[0]


def stream_step(
    model: Transformer,
    cache: MemoryCache,
    chunk: Chunk,
    *,
    method: Method,
    window: int,
    closes: Array,
):
    """Reads text into endless sessions; where the cache was full before, its oldest raw text is then compressed.

    CCM's streaming (section 4.3): keep a window of live slots (sink, memory and raw text together); once it is full,
    the oldest raw tokens become memory, and memory beyond the capacity (``overflow="evict"``) loses its oldest.

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      chunk: the text, usually one token a row.
      method: static.
      window: live slots at which a row compresses.
      closes: how many of the oldest raw tokens are then compressed, an integer or ``int32 [B]``.

    Returns:
      The cache, and the logits as `read` returns them.

    Raises:
      UserError: for a window no larger than the sink.
    """
    if window <= method.sink:
        raise UserError(
            f"a window of {window} live slots has no room for text beside the sink's {method.sink}; raise the window"
        )
    # Before this text is read: the reference, too, closes when a row was full before its token (160 slots, then 161).
    full = jnp.sum(cache.slots.live, axis=1) >= window
    cache, logits = read(model, cache, chunk, method=method)
    # The oldest stand first among the raw slots, as live slots are in order of index.
    raw = is_in(cache.slots.kind, RAW)
    oldest = raw & (jnp.cumsum(raw, axis=1) <= jnp.reshape(jnp.asarray(closes), (-1, 1))) & full[:, None]
    shrink = functools.partial(compress, model, which=oldest, method=method)
    # Most tokens close nothing in any row; the tokens of a closing are then not run at all.
    return jax.lax.cond(jnp.any(oldest), shrink, lambda cache: cache, cache), logits
