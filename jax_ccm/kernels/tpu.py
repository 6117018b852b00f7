"""Attention on a TPU (Pallas, Mosaic): forward and backward over the visible pairs of blocks.

Scores are kept transposed, keys down and queries across, ``[k, q]``: maxima and sums over keys are then sums of whole
vectors, and statistics of queries are rows that need no broadcast across lanes. Queries, keys and values stay as the
projections make them, ``[B, T, N H]``, so that nothing is transposed outside; a step takes as many neighbouring heads
as fill whole vectors. Text and memory are separate inputs: joining them would cost a copy of both, and in decoding one
of the whole cache. The online softmax and its gradients follow FlashAttention 2 (Dao 2023, algorithms 1 and 2).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ccm.kernels import blocks
from jax_ccm.kernels.blocks import FIRST, LAST, SOURCE, Pairs
from jax_ccm.kernels.sizes import HEAD_SIZES, ROWS, Refused, Sizes, choose
from jax_ccm.layout import sees
from jax_ccm.types import Rule, Slots

# A hidden score, and the maximum before anything was seen: far enough apart that exp(HIDDEN - UNSEEN) is 0.
HIDDEN, UNSEEN = -1e30, -1e20
# Up to so many queries times group, the heads of a group become rows of one block.
SHORT_ROWS = 128


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a call.

    Attributes:
      rule: who sees whom.
      sizes: of the blocks.
      heads, kv_heads: N and K.
      size: H.
      length: T.
      keys: places of each source.
      interpret: run the kernel's operations one by one, on any device.
    """

    rule: Rule
    sizes: Sizes
    heads: int
    kv_heads: int
    size: int
    length: int
    keys: tuple[int, ...]
    interpret: bool

    @property
    def step_heads(self) -> int:
        """Query heads of a step."""
        return self.sizes.kv_heads * self.sizes.group

    @property
    def splits(self) -> int:
        """Steps that share the key heads of one."""
        return self.heads // self.kv_heads // self.sizes.group

    @property
    def head_blocks(self) -> int:
        return self.heads // self.step_heads

    def lanes(self, head: int):
        """Where the ``head``-th of neighbouring heads stands."""
        return slice(head * self.size, (head + 1) * self.size)


def _rows(ref, lanes, block, length: int):
    """One head ``[n, H]`` of a block ``[1, n, heads H]``, zeros behind the end of the array."""
    x = ref[0, :, lanes]
    if length % x.shape[0]:
        place = block * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
        x = jnp.where(place < length, x, jnp.zeros_like(x))
    return x


def _visible(rule: Rule, queries, keys):
    """``bool [k, q]`` from the slots of a block of queries and one of keys, ``[1, 4, n]`` each."""
    q, k = queries[0], jnp.transpose(keys[0])
    field = lambda i: (q[i : i + 1, :], k[:, i : i + 1])
    pairs = [field(i) for i in range(4)]
    return sees(rule, Slots(*(x for x, _ in pairs)), Slots(*(x for _, x in pairs)))


def _dot(a, b, axis_a: int, axis_b: int):
    """Contracts one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _scores(call: _Call, k, q, mask):
    scores = _dot(k, q, 1, 1) * call.size**-0.5
    return jnp.where(mask, scores, HIDDEN)


def _sources(call: _Call, rows, columns, refs, visit):
    """Calls ``visit(slots, k, v, block, length)`` if this step's pair is of that source, for each source."""
    step = pl.program_id(1)
    for source, length in enumerate(call.keys):
        slots, k, v = refs[3 * source : 3 * source + 3]

        @pl.when((rows[step] & (SOURCE << source)) != 0)
        def _(slots=slots, k=k, v=v, source=source, length=length):
            visit(slots, k, v, (columns[step] >> (16 * source)) & 0xFFFF, length)


def _forward_kernel(rows, columns, q_slots, q, *refs, call: _Call):
    *keys, out, lse, top, total, sums = refs
    flags = rows[pl.program_id(1)]

    @pl.when((flags & FIRST) != 0)
    def _():
        top[...] = jnp.full(top.shape, UNSEEN, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def visit(slots, k, v, block, length):
        mask = _visible(call.rule, q_slots, slots)
        for head in range(call.step_heads):
            lanes = call.lanes(head // call.sizes.group)
            scores = _scores(call, _rows(k, lanes, block, length), q[0, :, call.lanes(head)], mask)
            old = top[head : head + 1]
            new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
            weights, shrink = jnp.exp(scores - new), jnp.exp(old - new)
            top[head : head + 1] = new
            total[head : head + 1] = shrink * total[head : head + 1] + jnp.sum(weights, axis=0, keepdims=True)
            values = _rows(v, lanes, block, length)
            sums[head] = shrink * sums[head] + _dot(values, weights.astype(values.dtype), 0, 0)

    _sources(call, rows, columns, keys, visit)

    @pl.when((flags & LAST) != 0)
    def _():
        for head in range(call.step_heads):
            # A query that saw nothing: zeros.
            weight = jnp.maximum(total[head : head + 1], 1e-30)
            out[0, :, call.lanes(head)] = jnp.transpose(sums[head] / weight).astype(out.dtype)
            lse[0, 0, head : head + 1] = top[head : head + 1] + jnp.log(weight)


def _probabilities(call: _Call, k, q, mask, lse, head: int):
    scores = _dot(k, q, 1, 1) * call.size**-0.5
    return jnp.where(mask, jnp.exp(scores - lse[0, 0, head : head + 1]), 0.0)


def _queries_kernel(rows, columns, q_slots, q, out, d_out, lse, *refs, call: _Call):
    """Gradient of the queries; and delta, the part of each softmax gradient that is the same for all keys."""
    *keys, d_q, delta, sums = refs
    flags = rows[pl.program_id(1)]

    @pl.when((flags & FIRST) != 0)
    def _():
        sums[...] = jnp.zeros(sums.shape, sums.dtype)
        for head in range(call.step_heads):
            lanes = call.lanes(head)
            product = out[0, :, lanes].astype(jnp.float32) * d_out[0, :, lanes].astype(jnp.float32)
            delta[0, 0, head : head + 1] = jnp.sum(jnp.transpose(product), axis=0, keepdims=True)

    def visit(slots, k, v, block, length):
        mask = _visible(call.rule, q_slots, slots)
        for head in range(call.step_heads):
            lanes = call.lanes(head // call.sizes.group)
            key, value = _rows(k, lanes, block, length), _rows(v, lanes, block, length)
            weights = _probabilities(call, key, q[0, :, call.lanes(head)], mask, lse, head)
            d_weights = _dot(value, d_out[0, :, call.lanes(head)], 1, 1)
            d_scores = weights * (d_weights - delta[0, 0, head : head + 1])
            sums[head] += _dot(key, d_scores.astype(key.dtype), 0, 0)

    _sources(call, rows, columns, keys, visit)

    @pl.when((flags & LAST) != 0)
    def _():
        for head in range(call.step_heads):
            d_q[0, :, call.lanes(head)] = jnp.transpose(sums[head] * call.size**-0.5).astype(d_q.dtype)


def _keys_kernel(rows, columns, slots, k, v, q_slots, q, d_out, lse, delta, d_k, d_v, sums_k, sums_v, *, call, length):
    """Gradients of one source's keys and values; rows of the list are its blocks, columns those of the queries."""
    step, split = pl.program_id(1), pl.program_id(2)
    flags = rows[step]

    @pl.when(((flags & FIRST) != 0) & (split == 0))
    def _():
        sums_k[...] = jnp.zeros(sums_k.shape, sums_k.dtype)
        sums_v[...] = jnp.zeros(sums_v.shape, sums_v.dtype)

    @pl.when((flags & SOURCE) != 0)
    def _():
        mask = _visible(call.rule, q_slots, slots)
        block = columns[step]
        place = (rows[step] >> 4) & 0xFFFF
        for head in range(call.step_heads):
            kv_head = head // call.sizes.group
            lanes = call.lanes(kv_head)
            query = _rows(q, call.lanes(head), block, call.length)
            d_head = _rows(d_out, call.lanes(head), block, call.length)
            weights = _probabilities(call, _rows(k, lanes, place, length), query, mask, lse, head)
            d_weights = _dot(_rows(v, lanes, place, length), d_head, 1, 1)
            # The delta of places behind the end is anything, and 0 times anything may not be 0.
            d_scores = jnp.where(mask, weights * (d_weights - delta[0, 0, head : head + 1]), 0.0)
            sums_v[kv_head] += _dot(weights.astype(d_head.dtype), d_head, 1, 0)
            sums_k[kv_head] += _dot(d_scores.astype(query.dtype), query, 1, 0)

    @pl.when(((flags & LAST) != 0) & (split == call.splits - 1))
    def _():
        for kv_head in range(call.sizes.kv_heads):
            d_k[0, :, call.lanes(kv_head)] = (sums_k[kv_head] * call.size**-0.5).astype(d_k.dtype)
            d_v[0, :, call.lanes(kv_head)] = sums_v[kv_head].astype(d_v.dtype)


def _codes(slots: Slots, size: int):
    """Slots as ``int32 [B, 4, S]``, S a multiple of ``size``."""
    slots = blocks.pad_slots(slots, size)
    return jnp.stack([slots.kind, slots.segment, slots.index, slots.position], axis=1)


def _batch(rows, step):
    return rows[step] >> 20


def _row(rows, step):
    return (rows[step] >> 4) & 0xFFFF


def _query_specs(call: _Call):
    """Block specs of slots, of a ``[B, T, N H]`` array and of statistics, for a list whose rows are queries."""
    width = call.step_heads * call.size
    return (
        pl.BlockSpec((1, 4, call.sizes.q), lambda h, p, r, c: (_batch(r, p), 0, _row(r, p))),
        pl.BlockSpec((1, call.sizes.q, width), lambda h, p, r, c: (_batch(r, p), _row(r, p), h)),
        pl.BlockSpec((1, 1, call.step_heads, call.sizes.q), lambda h, p, r, c: (_batch(r, p), h, 0, _row(r, p))),
    )


def _source_specs(call: _Call):
    """Block specs of slots, keys and values of each source."""
    specs = []
    for source, size in enumerate(call.sizes.k):
        block = lambda c, p, s=source: (c[p] >> (16 * s)) & 0xFFFF
        specs.append(pl.BlockSpec((1, 4, size), lambda h, p, r, c, b=block: (_batch(r, p), 0, b(c, p))))
        width = call.sizes.kv_heads * call.size
        at = lambda h, p, r, c, b=block: (_batch(r, p), b(c, p), jax.lax.div(h, call.splits))
        specs += [pl.BlockSpec((1, size, width), at)] * 2
    return specs


def _run(call: _Call, kernel, name: str, pairs: Pairs, grid, specs, out_specs, out_shapes, scratch, arguments):
    spec = pltpu.PrefetchScalarGridSpec(2, grid=grid, in_specs=specs, out_specs=out_specs, scratch_shapes=scratch)
    semantics = ("parallel",) + ("arbitrary",) * (len(grid) - 1)
    return pl.pallas_call(
        kernel,
        out_shape=out_shapes,
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=call.interpret,
        name=name,
    )(pairs.rows, pairs.columns, *arguments)


def _padded(call: _Call) -> int:
    return -(-call.length // call.sizes.q) * call.sizes.q


def _key_arguments(call: _Call, sources):
    return [x for (k, v, slots), size in zip(sources, call.sizes.k, strict=True) for x in (_codes(slots, size), k, v)]


def _seen(call: _Call, q_slots: Slots, sources):
    """Which blocks of each source each block of queries sees."""
    blocks_of = lambda slots, size: blocks.visible_blocks(call.rule, q_slots, slots, call.sizes.q, size)
    return [blocks_of(slots, size) for (_, _, slots), size in zip(sources, call.sizes.k, strict=True)]


def _forward(call: _Call, q, q_slots: Slots, sources):
    seen = _seen(call, q_slots, sources)
    pairs = blocks.list_pairs(*seen)
    slots, wide, narrow = _query_specs(call)
    statistics = (q.shape[0], call.head_blocks, call.step_heads, _padded(call))
    return _run(
        call,
        functools.partial(_forward_kernel, call=call),
        "memory_attention",
        pairs,
        (call.head_blocks, pairs.count),
        [slots, wide, *_source_specs(call)],
        [wide, narrow],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(statistics, jnp.float32)],
        [
            pltpu.VMEM((call.step_heads, call.sizes.q), jnp.float32),
            pltpu.VMEM((call.step_heads, call.sizes.q), jnp.float32),
            pltpu.VMEM((call.step_heads, call.size, call.sizes.q), jnp.float32),
        ],
        (_codes(q_slots, call.sizes.q), q, *_key_arguments(call, sources)),
    ), seen


def _backward(call: _Call, q, q_slots: Slots, sources, out, lse, d_out):
    seen = _seen(call, q_slots, sources)
    pairs = blocks.list_pairs(*seen)
    slots, wide, narrow = _query_specs(call)
    codes = _codes(q_slots, call.sizes.q)
    d_q, delta = _run(
        call,
        functools.partial(_queries_kernel, call=call),
        "memory_attention_dq",
        pairs,
        (call.head_blocks, pairs.count),
        [slots, wide, wide, wide, narrow, *_source_specs(call)],
        [wide, narrow],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, lse.dtype)],
        [pltpu.VMEM((call.step_heads, call.size, call.sizes.q), jnp.float32)],
        (codes, q, out, d_out, lse, *_key_arguments(call, sources)),
    )
    return d_q, [
        _key_gradients(call, seen[i], source, call.sizes.k[i], (codes, q, d_out, lse, delta))
        for i, source in enumerate(sources)
    ]


def _key_gradients(call: _Call, seen, source, size: int, queries):
    """Gradients of one source's keys and values."""
    k, v, slots = source
    pairs = blocks.list_pairs(jnp.swapaxes(seen, 1, 2))
    width, q_width = call.sizes.kv_heads * call.size, call.step_heads * call.size
    mine = pl.BlockSpec((1, size, width), lambda h, p, g, r, c: (_batch(r, p), _row(r, p), h))
    head = lambda h, g: h * call.splits + g
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
        functools.partial(_keys_kernel, call=call, length=k.shape[1]),
        "memory_attention_dkv",
        pairs,
        (call.head_blocks // call.splits, pairs.count, call.splits),
        specs,
        [mine, mine],
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        [pltpu.VMEM((call.sizes.kv_heads, size, call.size), jnp.float32)] * 2,
        (_codes(slots, size), k, v, *queries),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q, q_slots, sources):
    return _forward(call, q, q_slots, sources)[0][0]


def _attend_forward(call: _Call, q, q_slots, sources):
    (out, lse), _ = _forward(call, q, q_slots, sources)
    return out, (q, q_slots, sources, out, lse)


def _attend_backward(call: _Call, kept, d_out):
    q, q_slots, sources, out, lse = kept
    d_q, d_sources = _backward(call, q, q_slots, sources, out, lse, d_out)
    return d_q, None, tuple((d_k, d_v, None) for d_k, d_v in d_sources)


_attend.defvjp(_attend_forward, _attend_backward)


def attend(q, q_slots: Slots, sources, *, rule: Rule, interpret: bool = False, sizes: Sizes | None = None):
    """Attention of queries to the visible keys of several sources.

    Args:
      q: ``[B, T, N, H]``.
      q_slots: `Slots` of ``[B, T]``.
      sources: for each source of keys ``(k, v, slots)``: ``[B, S, K, H]`` twice and `Slots` of ``[B, S]``.
      rule: who sees whom.
      interpret: run the kernel's operations one by one, on any device.
      sizes: of the blocks; None to choose them.

    Returns:
      ``[B, T, N, H]``, differentiable in queries, keys and values; zeros for a query that sees nothing.

    Raises:
      Refused: for what the kernel does not take.
    """
    batch, length, heads, size = q.shape
    kv_heads = sources[0][0].shape[2]
    group = heads // kv_heads
    if short := sizes is None and length * group <= SHORT_ROWS:
        # A few queries, as in decoding: the heads that share a key become queries of one head.
        q = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, size), 3, 2)
        q = q.reshape(batch, length * group, kv_heads, size)
        q_slots = q_slots.map(lambda x: jnp.repeat(x, group, axis=1))
    q, q_slots = _whole_tile(q), _whole_slots(q_slots)
    sources = tuple((_whole_tile(k), _whole_tile(v), _whole_slots(slots)) for k, v, slots in sources)
    keys = tuple(k.shape[1] for k, _, _ in sources)
    if sizes is None:
        if size not in HEAD_SIZES and not interpret:
            raise Refused(f"heads of {size} are not among {', '.join(map(str, HEAD_SIZES))}")
        sizes = choose(batch, q.shape[1], keys, q.shape[2], kv_heads, size, q.dtype.itemsize, short)
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    call = _Call(rule, sizes, q.shape[2], kv_heads, size, q.shape[1], keys, interpret)
    out = _attend(call, flat(q), q_slots, tuple((flat(k), flat(v), slots) for k, v, slots in sources))
    if not short:
        return out.reshape(q.shape)[:, :length]
    out = out[:, : length * group].reshape(batch, length, group, kv_heads, size)
    return jnp.moveaxis(out, 2, 3).reshape(batch, length, heads, size)


def _whole_tile(x):
    """``x [B, S, ...]`` with at least as many places as a tile has rows."""
    short = ROWS - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) if short > 0 else x


def _whole_slots(slots: Slots) -> Slots:
    return blocks.pad_slots(slots, ROWS) if slots.kind.shape[1] < ROWS else slots
