"""What a session holds, by formula: the slots that are live after chunks of given lengths."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jax_ccm.rules.positions import closing_positions
from jax_ccm.rules.types import Kind, Method, Slots
from jax_ccm.rules.visibility import reachable


def occupancy(
    method: Method,
    lengths: Sequence[int],
    kept: np.ndarray | None = None,
    *,
    still_open: int = 0,
    capacity: int | None = None,
) -> Slots:
    """The live slots of a session, numpy ``int32 [S]`` each, in order of their index.

    Which tokens an eviction policy (`Method.eviction`) has kept depends on the text: here they are the newest.

    Args:
      method: the compression method.
      lengths: text tokens of each closed chunk.
      kept: ``bool [sum(lengths)]``, text of these chunks that is never compressed; None for none.
      still_open: text tokens behind them, of a chunk that is not closed yet.
      capacity: memory slots that there is room for, of which the oldest are gone; None for any number.
    """
    sizes = np.asarray(lengths, int)
    ends = np.cumsum(sizes)
    begins, closed, read = ends - sizes, len(sizes), int(sizes.sum())
    # Every text token of the session, as if nothing had been removed; what the rule hides is dropped at the end.
    place = np.arange(read + still_open)
    segment = np.repeat(np.arange(closed + 1), [*sizes, still_open])
    marked = np.zeros(len(place), bool)
    marked[:read] = False if kept is None else kept
    kind = np.where(marked, method.kept_kind or Kind.QUERY, Kind.TEXT)
    kind = np.where(place < method.sink, Kind.SINK, kind)
    sinks = int((kind == Kind.SINK).sum())
    text = Slots(kind, segment, place, place)
    # Asked for the moment after the last token: the segment and position of what would be read next.
    now = np.array([closed]), np.array([len(place)])

    def seen(slots):
        return reachable(method.rule, slots.map(lambda x: x[None]), *now)[0]

    def memory(segment, index, position):
        return Slots(np.full(len(index), int(Kind.MEMORY)), segment, index, position)

    parts = [text]
    # The newest chunks still stand as text (`Method.recent`).
    older = max(closed - method.recent, 0)
    # Sinks and what is kept are not compressed, and stand in front.
    first = begins + np.clip(sinks - begins, 0, sizes)
    counts = method.num_closing(np.bincount(segment[kind == Kind.TEXT], minlength=closed)[:older])
    position = closing_positions(method, first, ends)
    for rank, token in enumerate(method.closes):
        if token.kind in method.writes:
            # Placed as by `steps._closing_tokens`: by index it takes the place of the chunk's last token.
            has = np.flatnonzero(counts > rank)
            parts.append(memory(has, ends[has] - 1, position[has, rank]))
    if method.pool:
        hidden = place[(kind != Kind.SINK) & ~seen(text)]
        chunk = segment[hidden]
        share = (hidden - np.maximum(begins[chunk], sinks)) // method.pool
        # The last token of each share: so many tokens on from the first of its chunk, or the last of the chunk.
        last = np.append((np.diff(share) != 0) | (np.diff(chunk) != 0), True)[: len(hidden)]
        parts.append(memory(chunk[last], hidden[last], hidden[last]))
    if method.eviction is not None and closed:
        # Chunk by chunk, as what an earlier closing left bounds what the next can choose from.
        count = 0
        for number, (begin, size) in enumerate(zip(begins, sizes, strict=True), 1):
            # A chunk may have fewer tokens than slots.
            there = count + size - min(max(sinks - begin, 0), size)
            count = min(method.memory_slots(number), there, there if capacity is None else capacity)
        newest = np.arange(read - count, read)
        parts.append(memory(np.full(count, closed - 1), newest, newest))
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays).astype(np.int32), *parts)
    order = np.argsort(found.index, kind="stable")
    live = seen(found)[order]
    found = found.map(lambda x: x[order][live])
    is_memory = found.kind == Kind.MEMORY
    room = is_memory.sum() if capacity is None else capacity
    return found.map(lambda x: x[~(is_memory & (np.cumsum(is_memory) <= is_memory.sum() - room))])
