"""Which blocks of keys each block of queries sees, found without looking at pairs of places, as a list of pairs.

For CCM-concat with chunks of 6 + 2 places, blocks of 8 queries and of 8 keys: the text's own blocks left, the memory's
(2 slots a chunk) right, and the list that the kernel walks::

           text          memory
    q0     x . . .       . .        (0, t0)
    q1     . x . .       x .        (1, t1) (1, m0)
    q2     . . x .       x .        (2, t2) (2, m0)
    q3     . . . x       x .        (3, t3) (3, m0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_ccm.layout import first_seen
from jax_ccm.types import INF, Array, Clause, Kind, Rule, Slots

# What the list says of a pair besides its two blocks.
FIRST = 1  # of its row
LAST = 2  # of its row
SOURCE = 4  # the key block is of the first source; shifted left by one for each further source; none set: nothing seen
# Bits of `Pairs.rows`: 14 of the batch row, 13 of the block, 4 of flags; of `Pairs.columns`: 16 for each source.
MAX_BATCH, MAX_BLOCKS = 1 << 14, 1 << 13


def batch_of(row: Array) -> Array:
    """The batch row of an entry of `Pairs.rows`."""
    return row >> 17


def block_of(row: Array) -> Array:
    """The block of an entry of `Pairs.rows`."""
    return (row >> 4) & (MAX_BLOCKS - 1)


class Bounds(NamedTuple):
    """Of the places of some kinds in each block: whether there are any, and their extremes. ``[B, n, kinds]`` each."""

    some: Array
    low: Slots
    high: Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of blocks to visit, row after row (all pairs of a row in sequence). Each row has at least one.

    Attributes:
      rows: ``int32 [P + 1]``, batch row << 17 | block << 4 | flags.
      columns: ``int32 [P + 1]``: the block in each source, 16 bits each, the first source in the lowest. Only that of
        the flagged source is visited; the others repeat what was visited last, so that nothing is loaded for them.
      count: ``int32 []``, how many of the P entries are in use.
    """

    rows: Array
    columns: Array
    count: Array


def pad_slots(slots: Slots, size: int) -> Slots:
    """Slots ``[B, S]`` with places of kind PAD behind, so that S is a multiple of ``size``."""
    short = -slots.kind.shape[1] % size
    return slots.map(lambda x: jnp.pad(x, ((0, 0), (0, short)))) if short else slots


def codes(slots: Slots, size: int) -> Array:
    """Slots ``[B, S]`` as ``int32 [B, 4, S]``, S a multiple of ``size``."""
    return jnp.stack(jax.tree.leaves(pad_slots(slots, size)), axis=1).astype(jnp.int32)


def bounds(slots: Slots, size: int, kinds: tuple[Kind, ...]) -> Bounds:
    """The `Bounds` of every one of ``kinds``, for slots ``[B, S]`` in blocks of ``size``."""
    codes = jnp.stack(jax.tree.leaves(pad_slots(slots, size)))
    codes = codes.reshape(*codes.shape[:2], -1, 1, size)
    mine = codes[0] == jnp.asarray(kinds, jnp.int32)[:, None]
    some = jnp.any(mine, axis=-1)
    # Zero where there are none: differences of the extremes must not overflow.
    extreme = lambda of, far: jnp.where(some, of(jnp.where(mine, codes, far), axis=-1), 0)
    return Bounds(some, Slots(*extreme(jnp.min, INF)), Slots(*extreme(jnp.max, -INF)))


def visible_blocks(rule: Rule, q: Slots, k: Slots, q_size: int, k_size: int) -> Array:
    """Which blocks of keys hold something that the block of queries sees: ``bool [B, T / q_size, S / k_size]``.

    Every visible pair of places lies in a block that is found. The other way round it holds for the layouts of all
    methods, where a segment's places follow each other and index and position grow with the segment; elsewhere a
    block may be found in which nothing is seen.

    Args:
      rule: who sees whom.
      q, k: `Slots` of ``[B, T]`` and ``[B, S]``.
      q_size, k_size: places of a block; the last one may be short.
    """
    looking = tuple(sorted({kind for clause in rule.sees for kind in clause.query}))
    looked_at = tuple(sorted({kind for clause in rule.sees for kind in clause.key}))
    queries, keys = bounds(q, q_size, looking), bounds(k, k_size, looked_at)
    found = None
    for clause in rule.sees:
        # [B, n, 1, a, 1] and [B, 1, m, 1, b]: every kind that looks with every kind that is seen.
        rows = jax.tree.map(lambda x, c=clause: x[:, :, [looking.index(kind) for kind in c.query]], queries)
        columns = jax.tree.map(lambda x, c=clause: x[:, :, [looked_at.index(kind) for kind in c.key]], keys)
        rows = jax.tree.map(lambda x: x[:, :, None, :, None], rows)
        columns = jax.tree.map(lambda x: x[:, None, :, None, :], columns)
        hit = jnp.any(_meet(clause, rule.both_ways, rows, columns), axis=(3, 4))
        found = hit if found is None else found | hit
    return found


def seen_blocks(rule: Rule, q: Slots, keys: Sequence[Slots], q_size: int, k_sizes: Sequence[int]) -> list[Array]:
    """`visible_blocks` of each source of keys."""
    return [visible_blocks(rule, q, slots, q_size, size) for slots, size in zip(keys, k_sizes, strict=True)]


def _meet(clause: Clause, both_ways: tuple[Kind, ...], q: Bounds, k: Bounds) -> Array:
    """Whether the extremes leave room for a query that sees a key."""
    hit = q.some & k.some & (q.high.segment - k.low.segment >= clause.nearest)
    if clause.farthest < INF:
        hit &= q.low.segment - k.high.segment <= clause.farthest
    if not set(clause.query + clause.key) <= set(both_ways):
        hit &= q.high.index >= k.low.index
    if clause.window is not None:
        hit &= q.low.position - k.high.position < clause.window
    if clause.hidden is not None:
        hit &= k.high.position >= first_seen(q.low.position, clause.hidden)
    return hit


def list_pairs(*seen: Array) -> Pairs:
    """The pairs of blocks to visit.

    Args:
      *seen: for each source of columns ``bool [B, n, m]``: whether row block n and column block m see each other. A row
        that sees nothing gets one pair without a source, so that its result is written all the same.
    """
    batch, count = seen[0].shape[:2]
    widths = [x.shape[2] for x in seen]
    if batch > MAX_BATCH or max(count, *widths) > MAX_BLOCKS:
        raise ValueError(f"{batch} rows of {count} and {widths} blocks; at most {MAX_BATCH} rows of {MAX_BLOCKS}")
    joined = jnp.concatenate(seen, axis=2)
    joined = jnp.concatenate([joined, ~jnp.any(joined, axis=2, keepdims=True)], axis=2)
    total, width = joined.size, joined.shape[2]
    place = jnp.nonzero(joined.reshape(-1), size=total + 1, fill_value=total)[0].astype(jnp.int32)
    row, column = place // width, place % width
    first = row != jnp.concatenate([jnp.full((1,), -1, jnp.int32), row[:-1]])
    last = row != jnp.concatenate([row[1:], jnp.full((1,), -1, jnp.int32)])
    flags, columns, start = first * FIRST + last * LAST, 0, 0
    for source, size in enumerate(widths):
        mine = (column >= start) & (column < start + size)
        flags += mine * (SOURCE << source)
        latest = jax.lax.cummax(jnp.where(mine, jnp.arange(total + 1), -1))
        column_of = jnp.where(latest >= 0, column[jnp.maximum(latest, 0)] - start, 0)
        columns += column_of << (16 * source)
        start += size
    rows = (row // count) << 17 | (row % count) << 4 | flags
    return Pairs(rows, columns, jnp.sum(joined, dtype=jnp.int32))
