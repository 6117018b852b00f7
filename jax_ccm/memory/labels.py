"""Labels of the tokens that close a chunk, and of the memory that they write."""

from __future__ import annotations

import jax.numpy as jnp

from jax_ccm.rules.positions import closing_positions
from jax_ccm.rules.types import Kind, MemoryCache, Method, Slots


def closing_tokens(cache: MemoryCache, selected, rows, method: Method) -> tuple[Slots, Slots]:
    """Labels of the tokens that close a chunk, and of the memory that they write.

    Args:
      cache: the sessions.
      selected: ``bool [B, S]``, the text that becomes memory.
      rows: ``bool [B]``, those with any; the others run no tokens.
      method: the compression method, with n tokens in `Method.closes`.

    Returns:
      `Slots` of ``[B, n]``, and of ``[B, m]`` for the m of these tokens that write; PAD where a token is not run.
    """
    slots, n = cache.slots, len(method.closes)
    # A sink, or a system message, is no part of what is compressed.
    text = selected & (slots.kind != Kind.SINK)
    runs = rows[:, None]  # [B, 1], or [B, n] where chunks differ
    if method.ratio is not None:
        runs = runs & (_row(range(n)) < method.num_closing(jnp.sum(text, axis=1, keepdims=True)))
    # Positions and order of what is written follow the chunk's last token.
    # -1 in a row without any, whose tokens are not run.
    last = jnp.max(jnp.where(selected, slots.index, -1), axis=1, keepdims=True)
    begin = jnp.min(jnp.where(text, slots.index, last), axis=1, keepdims=True)
    # Index serves as position here, since for raw text they are the same (`_text`).
    position = closing_positions(method, begin[:, 0], last[:, 0] + 1)
    kind = jnp.where(runs, _row([token.kind for token in method.closes]), Kind.PAD)
    segment = jnp.broadcast_to(cache.chunks[:, None] - method.recent, kind.shape)
    # The tokens themselves come after everything raw; the segment hides what is not selected.
    comp = Slots(kind, segment, cache.next_position[:, None] + _row(range(n)), position)
    # Where chunks differ in how many tokens close them, all of these are written.
    entries = jnp.where(runs, jnp.full((1, method.slots_per_chunk), Kind.MEMORY), Kind.PAD)
    # What is written takes the chunk's place in the order.
    order = jnp.broadcast_to(last, (kind.shape[0], method.slots_per_chunk))
    return comp, Slots(entries, written(method, segment), order, written(method, comp.position))


def _row(values):
    """``int32 [1, n]``: the same for every session."""
    return jnp.asarray(values, jnp.int32)[None]


def written(method: Method, x):
    """Of an array ``[B, n, ...]`` over the tokens that close a chunk, those that write memory."""
    indices = [i for i, token in enumerate(method.closes) if token.kind in method.writes]
    return jnp.take(x, jnp.asarray(indices, jnp.int32), axis=1)
