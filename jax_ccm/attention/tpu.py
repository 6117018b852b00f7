"""Attention on a TPU (Pallas, Mosaic): forward and backward over the visible pairs of blocks.

Queries, keys and values stay as the projections make them, ``[B, T, N H]``, so that nothing is transposed outside; a
step (`tpu_steps`) takes as many neighbouring heads as fill whole vectors. Text and memory are separate inputs: joining
them would cost a copy of both, and in decoding one of the whole cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ccm.attention import blocks
from jax_ccm.attention.blocks import Pairs
from jax_ccm.attention.shared import Refused, Score, differentiable, heads_as_rows, rows_as_heads
from jax_ccm.attention.tpu_sizes import HEAD_SIZES, ROWS, Sizes, choose
from jax_ccm.attention.tpu_steps import Call, forward_kernel, keys_kernel, queries_kernel
from jax_ccm.rules.types import Rule, Slots

# Up to so many queries times group, the heads of a group become rows of one block.
SHORT_ROWS = 128


def _batch(rows, step):
    return blocks.batch_of(rows[step])


def _row(rows, step):
    return blocks.block_of(rows[step])


# Of the arguments of an index map, h is a block of heads and p a pair, the grid's own; r and c are the prefetched
# `Pairs.rows` and `Pairs.columns`, from which it is known what to load before the step begins.
def _query_specs(call: Call):
    """Block specs of slots, of a ``[B, T, N H]`` array and of statistics, for a list whose rows are queries."""
    width = call.step_heads * call.size
    return (
        pl.BlockSpec((1, 4, call.sizes.q), lambda h, p, r, c: (_batch(r, p), 0, _row(r, p))),
        pl.BlockSpec((1, call.sizes.q, width), lambda h, p, r, c: (_batch(r, p), _row(r, p), h)),
        pl.BlockSpec((1, 1, call.step_heads, call.sizes.q), lambda h, p, r, c: (_batch(r, p), h, 0, _row(r, p))),
    )


def _source_specs(call: Call):
    """Block specs of slots, keys and values of each source."""
    specs = []
    for source, size in enumerate(call.sizes.k):

        def block(c, p, s=source):
            return (c[p] >> (16 * s)) & 0xFFFF

        specs.append(pl.BlockSpec((1, 4, size), lambda h, p, r, c, b=block: (_batch(r, p), 0, b(c, p))))
        width = call.sizes.kv_heads * call.size

        def at(h, p, r, c, b=block):
            # The `splits` blocks of query heads that share key heads load the same ones.
            return (_batch(r, p), b(c, p), jax.lax.div(h, call.splits))

        specs += [pl.BlockSpec((1, size, width), at)] * 2
    return specs


def _run(call: Call, kernel, name: str, pairs: Pairs, grid, specs, out_specs, out_shapes, scratch, arguments):
    spec = pltpu.PrefetchScalarGridSpec(2, grid=grid, in_specs=specs, out_specs=out_specs, scratch_shapes=scratch)
    # Blocks of heads do not depend on each other; pairs do, since sums over a row's pairs stay in scratch memory.
    semantics = ("parallel",) + ("arbitrary",) * (len(grid) - 1)
    return pl.pallas_call(
        kernel,
        out_shape=out_shapes,
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=call.interpret,
        name=name,
    )(pairs.rows, pairs.columns, *arguments)


def _padded(call: Call) -> int:
    # T in whole blocks: statistics are written for places behind the end, too.
    return -(-call.length // call.sizes.q) * call.sizes.q


def _key_arguments(call: Call, sources):
    each = zip(sources, call.sizes.k, strict=True)
    return [x for (k, v, slots), size in each for x in (blocks.codes(slots, size), k, v)]


def _seen(call: Call, q_slots: Slots, sources):
    return blocks.seen_blocks(call.rule, q_slots, [slots for _, _, slots in sources], call.sizes.q, call.sizes.k)


def _forward(call: Call, q, q_slots: Slots, sources):
    """Output, and logsumexp of each head of a step."""
    pairs = blocks.list_pairs(*_seen(call, q_slots, sources))
    slots, wide, narrow = _query_specs(call)
    # A block's row of heads is an axis of its own: [B, head blocks, heads of a step, T].
    statistics = (q.shape[0], call.head_blocks, call.step_heads, _padded(call))
    return _run(
        call,
        functools.partial(forward_kernel, call=call),
        "memory_attention",
        pairs,
        # The number of pairs is data: the grid is of dynamic size.
        (call.head_blocks, pairs.count),
        [slots, wide, *_source_specs(call)],
        [wide, narrow],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(statistics, jnp.float32)],
        [
            # Maximum, sum of weights, and sum of weighted values of each query; transposed, as scores are.
            pltpu.VMEM((call.step_heads, call.sizes.q), jnp.float32),
            pltpu.VMEM((call.step_heads, call.sizes.q), jnp.float32),
            pltpu.VMEM((call.step_heads, call.size, call.sizes.q), jnp.float32),
        ],
        (blocks.codes(q_slots, call.sizes.q), q, *_key_arguments(call, sources)),
    )


def _backward(call: Call, q, q_slots: Slots, sources, out, lse, d_out):
    seen = _seen(call, q_slots, sources)
    pairs = blocks.list_pairs(*seen)
    slots, wide, narrow = _query_specs(call)
    codes = blocks.codes(q_slots, call.sizes.q)
    d_q, delta = _run(
        call,
        functools.partial(queries_kernel, call=call),
        "memory_attention_dq",
        pairs,
        (call.head_blocks, pairs.count),
        [slots, wide, wide, wide, narrow, *_source_specs(call)],
        [wide, narrow],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, lse.dtype)],
        [pltpu.VMEM((call.step_heads, call.size, call.sizes.q), jnp.float32)],
        (codes, q, out, d_out, lse, *_key_arguments(call, sources)),
    )
    # delta comes from the first kernel, and is made there once for all sources.
    return d_q, [
        _key_gradients(call, seen[i], source, call.sizes.k[i], (codes, q, d_out, lse, delta))
        for i, source in enumerate(sources)
    ]


def _key_gradients(call: Call, seen, source, size: int, queries):
    """Gradients of one source's keys and values."""
    k, v, slots = source
    pairs = blocks.list_pairs(jnp.swapaxes(seen, 1, 2))
    width, q_width = call.sizes.kv_heads * call.size, call.step_heads * call.size
    mine = pl.BlockSpec((1, size, width), lambda h, p, g, r, c: (_batch(r, p), _row(r, p), h))

    def head(h, g):
        return h * call.splits + g

    specs = [
        pl.BlockSpec((1, 4, size), lambda h, p, g, r, c: (_batch(r, p), 0, _row(r, p))),
        mine,
        mine,
        pl.BlockSpec((1, 4, call.sizes.q), lambda h, p, g, r, c: (_batch(r, p), 0, c[p])),
        *[pl.BlockSpec((1, call.sizes.q, q_width), lambda h, p, g, r, c: (_batch(r, p), c[p], head(h, g)))] * 2,
        *[
            pl.BlockSpec(
                (1, 1, call.step_heads, call.sizes.q), lambda h, p, g, r, c: (_batch(r, p), head(h, g), 0, c[p])
            )
        ]
        * 2,
    ]
    return _run(
        call,
        functools.partial(keys_kernel, call=call, length=k.shape[1]),
        "memory_attention_dkv",
        pairs,
        # Splits innermost: the sums of a block of keys, over all its query heads, are whole before the next begins.
        (call.head_blocks // call.splits, pairs.count, call.splits),
        specs,
        [mine, mine],
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        [pltpu.VMEM((call.sizes.kv_heads, size, call.size), jnp.float32)] * 2,
        (blocks.codes(slots, size), k, v, *queries),
    )


_attend = differentiable(_forward, _backward)


def attend(
    q,
    q_slots: Slots,
    sources,
    *,
    rule: Rule,
    score: Score | None = None,
    interpret: bool = False,
    sizes: Sizes | None = None,
):
    """Attention of queries to the visible keys of several sources.

    Args:
      q: ``[B, T, N, H]``.
      q_slots: `Slots` of ``[B, T]``.
      sources: for each source of keys ``(k, v, slots)``: ``[B, S, K, H]`` twice and `Slots` of ``[B, S]``.
      rule: who sees whom.
      score: how products become scores; None for ``H ** -0.5`` times them.
      interpret: run the kernel's operations one by one, on any device.
      sizes: of the blocks; None to choose them.

    Returns:
      ``[B, T, N, H]``, differentiable in queries, keys and values; zeros for a query that sees nothing.

    Raises:
      Refused: for what the kernel does not take.
    """
    batch, length, heads, size = q.shape
    if batch > blocks.MAX_BATCH:
        # As in serving thousands of sessions: more rows than the list of pairs can number.
        def pick(first):
            return jax.tree.map(lambda x: x[first : first + blocks.MAX_BATCH], (q, q_slots, sources))

        parts = map(pick, range(0, batch, blocks.MAX_BATCH))
        options = dict(rule=rule, score=score, interpret=interpret, sizes=sizes)
        return jnp.concatenate([attend(*part, **options) for part in parts])
    kv_heads = sources[0][0].shape[2]
    group = heads // kv_heads
    if short := sizes is None and length * group <= SHORT_ROWS:
        # A few queries, as in decoding: the heads that share a key become queries of one head.
        q, q_slots = heads_as_rows(q, q_slots, kv_heads)
    q, q_slots = _whole_tile(q), _whole_slots(q_slots)
    sources = tuple((_whole_tile(k), _whole_tile(v), _whole_slots(slots)) for k, v, slots in sources)
    keys = tuple(k.shape[1] for k, _, _ in sources)
    if sizes is None:
        if size not in HEAD_SIZES and not interpret:
            raise Refused(f"heads of {size} are not among {', '.join(map(str, HEAD_SIZES))}")
        sizes = choose(batch, q.shape[1], keys, q.shape[2], kv_heads, size, q.dtype.itemsize, short)

    def flat(x):
        return x.reshape(*x.shape[:2], -1)

    call = Call(rule, sizes, q.shape[2], kv_heads, size, q.shape[1], keys, interpret, score or Score(size**-0.5))
    out = _attend(call, flat(q), q_slots, tuple((flat(k), flat(v), slots) for k, v, slots in sources))
    if not short:
        return out.reshape(q.shape)[:, :length]
    return rows_as_heads(out.reshape(q.shape)[:, : length * group], length)


def _whole_tile(x):
    """``x [B, S, ...]`` with at least as many places as a tile has rows."""
    short = ROWS - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) if short > 0 else x


def _whole_slots(slots: Slots) -> Slots:
    return blocks.pad_slots(slots, ROWS) if slots.kind.shape[1] < ROWS else slots
