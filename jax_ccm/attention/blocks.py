"""Which blocks of keys each block of queries sees, found without looking at pairs of query and key, as a list of pairs.

For CCM-concat with chunks of 6 + 2 tokens, blocks of 8 queries and of 8 keys: the text's own blocks left, the memory's
(2 slots a chunk) right, and the list that the kernel walks::

           text          memory
    q0     x . . .       . .        (0, t0)
    q1     . x . .       x .        (1, t1) (1, m0)
    q2     . . x .       x .        (2, t2) (2, m0)
    q3     . . . x       x .        (3, t3) (3, m0)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_ccm.rules.types import INF, Array, Clause, Kind, Rule, Slots
from jax_ccm.rules.visibility import first_seen

# What the list says of a pair besides its two blocks.
FIRST = 1  # of its row
LAST = 2  # of its row
SOURCE = 4  # the key block is of the first source; shifted left by one for each further source; none set: nothing seen
# Bits of `Pairs.rows`: 14 of the batch row, 13 of the block, 4 of flags; of `Pairs.columns`: 16 for each source.
# 31 in all, so that no entry is negative. Four flags are enough for two sources, as are two times 16 bits.
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
        the flagged source is visited; the others stand at a block that their row has visited or will visit, so that
        nothing more is loaded for them (at 0 if it visits none of theirs).
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
    codes = codes.reshape(*codes.shape[:2], -1, 1, size)  # [4, B, n, 1, size], one for each field
    mine = codes[0] == jnp.asarray(kinds, jnp.int32)[:, None]  # [B, n, kinds, size]
    some = jnp.any(mine, axis=-1)

    # Zero where there are none: differences of the extremes must not overflow.
    def extreme(of, far):
        return jnp.where(some, of(jnp.where(mine, codes, far), axis=-1), 0)

    return Bounds(some, Slots(*extreme(jnp.min, INF)), Slots(*extreme(jnp.max, -INF)))


def visible_blocks(rule: Rule, q: Slots, k: Slots, q_size: int, k_size: int) -> Array:
    """Which blocks of keys hold something that the block of queries sees: ``bool [B, T / q_size, S / k_size]``.

    Every visible pair of query and key lies in a block that is found. The other way round it holds for the layouts of
    all methods, where a segment's tokens follow each other and index and position grow with the segment; elsewhere a
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
    # A pair of query and key may have any difference between low - high and high - low of the extremes: a condition
    # that no difference in that range meets rules the pair of blocks out.
    hit = q.some & k.some & (q.high.segment - k.low.segment >= clause.nearest)
    if clause.farthest < INF:
        hit &= q.low.segment - k.high.segment <= clause.farthest
    if not set(clause.query + clause.key) <= set(both_ways):
        hit &= q.high.index >= k.low.index
    if clause.window is not None:
        hit &= q.low.position - k.high.position < clause.window
    if clause.hidden is not None:
        hit &= k.high.position >= first_seen(q.low.position, clause.hidden)
    if clause.behind:
        hit &= k.low.position <= q.high.position
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
    nothing = ~functools.reduce(jnp.logical_or, [jnp.any(x, axis=2) for x in seen])[:, :, None]
    joined = jnp.concatenate([*seen, nothing], axis=2)  # [B, n, m of all sources + 1]
    # Number of a pair in its row, from 1; of pairs in the row, [B, n]; and where the row's pairs begin in the list.
    rank = joined + _sum_before(joined)
    each = rank[:, :, -1]
    whole = jnp.sum(each, axis=1, keepdims=True)
    begin = _sum_before(each) + jnp.cumsum(whole, axis=0) - whole

    def number(*shape):
        return jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)

    flags = (rank == 1) * FIRST + (rank == each[:, :, None]) * LAST
    rows = flags + (number(batch, 1, 1) << 17 | number(count, 1) << 4)
    # Visits of a row go from source to source: one stands at its first block before its turn, at its last after it.
    last = [jnp.max(jnp.where(x, number(x.shape[2]), 0), axis=2, keepdims=True) for x in seen]
    first = [jnp.min(jnp.where(x, number(x.shape[2]), last[s]), axis=2, keepdims=True) for s, x in enumerate(seen)]
    # The last turn is the column without a source.
    columns, parts = [], []
    for turn, width in enumerate([*widths, 1]):
        at = [first[s] if s > turn else number(width) if s == turn else last[s] for s in range(len(seen))]
        packed = functools.reduce(jnp.bitwise_or, [x << (16 * s) for s, x in enumerate(at)])
        columns.append(jnp.broadcast_to(packed, (batch, count, width)))
        parts.append(jnp.full((width,), SOURCE << turn if turn < len(seen) else 0, jnp.int32))
    total = joined.size
    # Pairs that are not visited get an index behind the list, which the scatter drops.
    place = jnp.where(joined, begin[:, :, None] + rank - 1, total + 1).reshape(-1)

    def put(x):
        return jnp.zeros((total + 1,), jnp.int32).at[place].set(x.reshape(-1), mode="drop")

    return Pairs(put(rows + jnp.concatenate(parts)), put(jnp.concatenate(columns, axis=2)), jnp.sum(each))


def _sum_before(x: Array) -> Array:
    """``int32``, for each element the sum of those before it along the last axis; the sums stay below 2**24."""
    size = x.shape[-1]
    # By a product with a triangle: running sums take a TPU's compiler seconds, and more for longer rows.
    before = jnp.arange(size)[:, None] < jnp.arange(size)
    # 0 and 1 are exact in bfloat16, to which a TPU rounds operands by default; counts above 256 are not.
    exact = jax.lax.Precision.DEFAULT if x.dtype == bool else jax.lax.Precision.HIGHEST
    return jnp.matmul(x.astype(jnp.float32), before.astype(jnp.float32), precision=exact).astype(jnp.int32)
