"""Attention on an NVIDIA GPU (Pallas, Triton): forward and backward over the visible blocks of keys.

A program owns a block of queries of one head and walks the list of the key blocks that it sees, first the text's, then
the memory's; for gradients of keys it owns a block of keys and walks the blocks of queries that see it. Arrays stay as
the projections make them, ``[B, T, N, H]``. The online softmax and its gradients follow FlashAttention 2 (Dao 2023,
algorithms 1 and 2).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jax_ccm.attention import blocks
from jax_ccm.attention.shared import HIDDEN, UNSEEN, Refused, Score, differentiable, heads_as_rows, rows_as_heads
from jax_ccm.rules.types import Rule, Slots
from jax_ccm.rules.visibility import sees

# Triton's matrix products take 16 rows or more, in powers of two; blocks of 64 fit chunks of some 50 tokens.
LEAST, MOST = 16, 64
# Triton blocks are powers of two, and heads of 96 are not.
HEAD_SIZES = (64, 128, 256)
# Of every GPU since Ampere; an A100 and an H100 have more.
SHARED_BYTES = 96 * 2**10
# Lists of visible blocks lie in the GPU's memory.
LIST_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call.

    Attributes:
      rule: who sees whom.
      q: queries of a block.
      k: keys of a block, for each source.
      interpret: run the kernel's operations one by one, on any device.
      score: how products become scores.
    """

    rule: Rule
    q: int
    k: tuple[int, ...]
    interpret: bool
    score: Score


def choose(length: int, keys: tuple[int, ...], size: int, itemsize: int) -> tuple[int, tuple[int, ...]]:
    """Sizes of the blocks of T queries and of each source's keys, for heads of ``size`` numbers of ``itemsize`` bytes.

    Raises:
      Refused: if shared memory does not hold the smallest.
    """
    # Two blocks that stay (queries and gradient) and two that pass, of which the next are being fetched.
    most = SHARED_BYTES // (6 * size * itemsize)
    if most < LEAST:
        raise Refused(f"blocks of {LEAST} x {size} numbers of {itemsize} bytes do not fit shared memory")
    most = min(MOST, 1 << (most.bit_length() - 1))

    def block(n):
        return min(most, max(LEAST, 1 << (n - 1).bit_length()))

    return block(length), tuple(block(n) for n in keys)


def _lists(seen):
    """Of ``bool [B, n, m]``: how many each of the n sees, ``int32 [B, n]``, and which, first in ``[B, n, m]``."""
    order = jnp.argsort(~seen, axis=2, stable=True)
    return jnp.sum(seen, axis=2, dtype=jnp.int32), order.astype(jnp.int32)


def _seen(call: Call, q_slots: Slots, sources):
    return blocks.seen_blocks(call.rule, q_slots, [slots for _, _, slots in sources], call.q, call.k)


def _inside(ref, block, size: int):
    """``bool [size, 1]``, which places of a block are before the end of ``[B, S, heads, H]``; None if all are."""
    if ref.shape[1] % size == 0:
        return None
    return (block * size + jnp.arange(size, dtype=jnp.int32) < ref.shape[1])[:, None]


def _load(ref, row, block, size: int, head):
    """One head ``[size, H]`` of a block of places, zeros behind the end."""
    inside = _inside(ref, block, size)
    at = ref.at[row, pl.ds(block * size, size), head, :]
    return triton.load(at) if inside is None else triton.load(at, mask=inside, other=0.0)


def _store(ref, row, block, size: int, head, x) -> None:
    at = ref.at[row, pl.ds(block * size, size), head, :]
    triton.store(at, x.astype(ref.dtype), mask=_inside(ref, block, size))


def _slots(ref, row, block, size: int) -> Slots:
    """The slots ``[size]`` of a block."""
    return Slots(*(ref[row, i, pl.ds(block * size, size)] for i in range(4)))


def _dot(a, b):
    """``a b`` in float32; products of float32 are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def _where():
    """Block, head and batch row of a program."""
    return pl.program_id(0), pl.program_id(1), pl.program_id(2)


def _walk(call: Call, refs, row, block, q_slots: Slots, kv_head, visit, state):
    """``state = visit(state, k, v, mask)`` for every visible block of keys of each source."""
    q_slots = q_slots.map(lambda x: x[:, None])
    for source, size in enumerate(call.k):
        counts, lists, codes, k, v = refs[5 * source : 5 * source + 5]

        def step(i, state, lists=lists, codes=codes, k=k, v=v, size=size):
            column = lists[row, block, i]
            mask = sees(call.rule, q_slots, _slots(codes, row, column, size).map(lambda x: x[None, :]))

            def load(ref):
                return _load(ref, row, column, size, kv_head)

            return visit(state, load(k), load(v), mask)

        # The number of visits is data: a block that sees nothing costs one program that writes its zeros.
        state = jax.lax.fori_loop(0, counts[row, block], step, state)
    return state


def _forward_kernel(codes, q, *refs, call: Call, group: int):
    *keys, out, lse = refs
    block, head, row = _where()
    query = _load(q, row, block, call.q, head)

    def visit(state, k, v, mask):
        top, total, sums = state
        scores = jnp.where(mask, call.score.of(_dot(query, k.T)), HIDDEN)
        # The online softmax: what was summed so far is scaled to the new maximum.
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp(top - higher), jnp.exp(scores - higher[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        return higher, total, sums * shrink[:, None] + _dot(weights.astype(v.dtype), v)

    state = jnp.full((call.q,), UNSEEN, jnp.float32), jnp.zeros((call.q,), jnp.float32)
    state = *state, jnp.zeros(query.shape, jnp.float32)  # top, total, sums
    # Neighbouring query heads share a key head. Integer ``//`` does not lower in Triton.
    slots, kv_head = _slots(codes, row, block, call.q), jax.lax.div(head, group)
    top, total, sums = _walk(call, keys, row, block, slots, kv_head, visit, state)
    # A query that saw nothing: zeros.
    total = jnp.maximum(total, 1e-30)
    _store(out, row, block, call.q, head, sums / total[:, None])
    # In whole blocks, so that it is stored without a mask.
    lse[row, head, pl.ds(block * call.q, call.q)] = top + jnp.log(total)


def _queries_kernel(codes, q, d_out, lse, delta, *refs, call: Call, group: int):
    *keys, d_q = refs
    block, head, row = _where()
    places = pl.ds(block * call.q, call.q)
    query, gradient = (_load(x, row, block, call.q, head) for x in (q, d_out))
    own_lse, own_delta = lse[row, head, places][:, None], delta[row, head, places][:, None]

    # Weights come from scores that are made anew and the logsumexp: none were kept.
    def visit(sums, k, v, mask):
        scores = call.score.of(_dot(query, k.T))
        weights = jnp.where(mask, jnp.exp(scores - own_lse), 0.0)
        d_scores = call.score.back(weights * (_dot(gradient, v.T) - own_delta), scores)
        return sums + _dot(d_scores.astype(k.dtype), k)

    slots, kv_head = _slots(codes, row, block, call.q), jax.lax.div(head, group)
    sums = _walk(call, keys, row, block, slots, kv_head, visit, jnp.zeros(query.shape, jnp.float32))
    _store(d_q, row, block, call.q, head, sums * call.score.scale)


def _keys_kernel(counts, lists, codes, k, v, q_codes, q, d_out, lse, delta, d_k, d_v, *, call: Call, size: int):
    block, kv_head, row = _where()
    group = q.shape[2] // k.shape[2]
    key, value = (_load(x, row, block, size, kv_head) for x in (k, v))
    slots = _slots(codes, row, block, size).map(lambda x: x[:, None])

    def step(head, i, state):
        sums_k, sums_v = state
        place = lists[row, block, i]
        query, gradient = (_load(x, row, place, call.q, head) for x in (q, d_out))
        places = pl.ds(place * call.q, call.q)
        mask = sees(call.rule, _slots(q_codes, row, place, call.q).map(lambda x: x[None, :]), slots)
        # Transposed, keys down and queries across.
        scores = call.score.of(_dot(key, query.T))
        weights = jnp.where(mask, jnp.exp(scores - lse[row, head, places][None, :]), 0.0)
        d_scores = call.score.back(weights * (_dot(value, gradient.T) - delta[row, head, places][None, :]), scores)
        sums_k += _dot(d_scores.astype(query.dtype), query)
        return sums_k, sums_v + _dot(weights.astype(gradient.dtype), gradient)

    # The gradient of a shared key is the sum over its query heads; one program has them all, so that nothing is added
    # up in global memory.
    def each(g, state):
        return jax.lax.fori_loop(0, counts[row, block], functools.partial(step, kv_head * group + g), state)

    state = (jnp.zeros(key.shape, jnp.float32),) * 2
    sums_k, sums_v = jax.lax.fori_loop(0, group, each, state)
    _store(d_k, row, block, size, kv_head, sums_k * call.score.scale)
    _store(d_v, row, block, size, kv_head, sums_v)


def _run(call: Call, kernel, name: str, grid, out_shape, arguments):
    """Every array whole in the GPU's memory; the programs load what they need."""
    size = max(x.shape[-1] for x in jax.tree.leaves(out_shape))
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=8 if size > 128 else 4, num_stages=2),
        interpret=call.interpret,
        name=name,
    )(*arguments)


def _key_arguments(call: Call, seen, sources):
    return [
        x
        for blocks_seen, (k, v, slots), size in zip(seen, sources, call.k, strict=True)
        for x in (*_lists(blocks_seen), blocks.codes(slots, size), k, v)
    ]


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(call: Call, q, q_slots: Slots, sources):
    """Output, and logsumexp ``float32 [B, N, T]``, T in whole blocks."""
    batch, length, heads, _ = q.shape
    count = -(-length // call.q)
    seen = _seen(call, q_slots, sources)
    return _run(
        call,
        functools.partial(_forward_kernel, call=call, group=heads // sources[0][0].shape[2]),
        "memory_attention",
        (count, heads, batch),
        [_like(q), jax.ShapeDtypeStruct((batch, heads, count * call.q), jnp.float32)],
        (blocks.codes(q_slots, call.q), q, *_key_arguments(call, seen, sources)),
    )


def _backward(call: Call, q, q_slots: Slots, sources, out, lse, d_out):
    batch, length, heads, _ = q.shape
    group = heads // sources[0][0].shape[2]
    seen, codes = _seen(call, q_slots, sources), blocks.codes(q_slots, call.q)
    # What is the same for all keys of a query in the softmax's gradient: its sum over H of output times gradient.
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - length)))
    queries = (codes, q, d_out, lse, delta)
    d_q = _run(
        call,
        functools.partial(_queries_kernel, call=call, group=group),
        "memory_attention_dq",
        (lse.shape[2] // call.q, heads, batch),
        _like(q),
        (*queries, *_key_arguments(call, seen, sources)),
    )
    d_sources = []
    for (k, v, slots), size, blocks_seen in zip(sources, call.k, seen, strict=True):
        d_sources.append(
            _run(
                call,
                functools.partial(_keys_kernel, call=call, size=size),
                "memory_attention_dkv",
                (blocks_seen.shape[2], k.shape[2], batch),
                [_like(k), _like(v)],
                # Turned around: for each block of keys the blocks of queries that see it.
                (*_lists(jnp.swapaxes(blocks_seen, 1, 2)), blocks.codes(slots, size), k, v, *queries),
            )
        )
    return d_q, d_sources


_attend = differentiable(_forward, _backward)


def attend(q, q_slots: Slots, sources, *, rule: Rule, score: Score | None = None, interpret: bool = False, sizes=None):
    """Attention of queries to the visible keys of several sources.

    Args:
      q: ``[B, T, N, H]``.
      q_slots: `Slots` of ``[B, T]``.
      sources: for each source of keys ``(k, v, slots)``: ``[B, S, K, H]`` twice and `Slots` of ``[B, S]``.
      rule: who sees whom.
      score: how products become scores; None for ``H ** -0.5`` times them.
      interpret: run the kernel's operations one by one, on any device.
      sizes: of a block of queries and of one of each source's keys, ``(q, (k, ...))``; None to choose them.

    Returns:
      ``[B, T, N, H]``, differentiable in queries, keys and values; zeros for a query that sees nothing.

    Raises:
      Refused: for what the kernel does not take.
    """
    batch, length, heads, size = q.shape
    kv_heads = sources[0][0].shape[2]
    if size not in HEAD_SIZES and not interpret:
        raise Refused(f"heads of {size} are not among {', '.join(map(str, HEAD_SIZES))}")
    if any(clause.hidden is not None for clause in rule.sees) and not interpret:
        raise Refused("a hidden fraction takes integer divisions, which Triton does not lower")
    if short := sizes is None and length * heads // kv_heads <= MOST:
        # A few queries, as in decoding: the heads that share a key become queries of one head.
        q, q_slots = heads_as_rows(q, q_slots, kv_heads)
    keys = tuple(k.shape[1] for k, _, _ in sources)
    q_size, k_sizes = sizes or choose(q.shape[1], keys, size, q.dtype.itemsize)
    largest = max(x.size for x in (q, *(k for k, _, _ in sources)))
    if largest >= 2**31:
        raise Refused(f"an array of {largest} numbers is beyond 32-bit offsets")
    counts = [-(-n // k) for n, k in zip(keys, k_sizes, strict=True)]
    if (listed := 4 * batch * -(-q.shape[1] // q_size) * sum(counts)) > LIST_BYTES:
        raise Refused(f"the lists of visible blocks take {listed / 2**20:.0f} MiB, more than {LIST_BYTES // 2**20}")
    out = _attend(Call(rule, q_size, k_sizes, interpret, score or Score(size**-0.5)), q, q_slots, tuple(sources))
    return rows_as_heads(out, length) if short else out
