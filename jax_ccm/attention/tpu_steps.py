"""What one step of the TPU kernels does: a block of queries, a block of keys, forward and backward.

Scores are kept transposed, keys down and queries across, ``[k, q]``: maxima and sums over keys are then sums of whole
vectors, and statistics of queries are rows that need no broadcast across lanes. The online softmax and its gradients
follow FlashAttention 2 (Dao 2023, algorithms 1 and 2).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_ccm.attention.blocks import FIRST, LAST, SOURCE, block_of
from jax_ccm.attention.shared import HIDDEN, UNSEEN, Score
from jax_ccm.attention.tpu_sizes import Sizes
from jax_ccm.rules.types import Rule, Slots
from jax_ccm.rules.visibility import sees


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call.

    Attributes:
      rule: who sees whom.
      sizes: of the blocks.
      heads, kv_heads: N and K.
      size: H.
      length: T.
      keys: entries of each source.
      interpret: run the kernel's operations one by one, on any device.
      score: how products become scores.
    """

    rule: Rule
    sizes: Sizes
    heads: int
    kv_heads: int
    size: int
    length: int
    keys: tuple[int, ...]
    interpret: bool
    score: Score

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
    # What is loaded from there is anything, NaN included, which a weight of 0 would not undo.
    if length % x.shape[0]:
        place = block * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
        x = jnp.where(place < length, x, jnp.zeros_like(x))
    return x


def _visible(rule: Rule, queries, keys):
    """``bool [k, q]`` from the slots of a block of queries and one of keys, ``[1, 4, n]`` each."""
    # Fields of queries are rows and those of keys columns, so that they broadcast to [k, q].
    q, k = queries[0], jnp.transpose(keys[0])

    def field(i):
        return (q[i : i + 1, :], k[:, i : i + 1])

    pairs = [field(i) for i in range(4)]
    return sees(rule, Slots(*(x for x, _ in pairs)), Slots(*(x for _, x in pairs)))


def _dot(a, b, axis_a: int, axis_b: int):
    """Contracts one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _scores(call: Call, k, q, mask):
    return jnp.where(mask, call.score.of(_dot(k, q, 1, 1)), HIDDEN)


def _sources(call: Call, rows, columns, refs, visit):
    """Calls ``visit(slots, k, v, block, length)`` if this step's pair is of that source, for each source."""
    step = pl.program_id(1)
    for source, length in enumerate(call.keys):
        slots, k, v = refs[3 * source : 3 * source + 3]

        @pl.when((rows[step] & (SOURCE << source)) != 0)
        def _(slots=slots, k=k, v=v, source=source, length=length):
            visit(slots, k, v, (columns[step] >> (16 * source)) & 0xFFFF, length)


def forward_kernel(rows, columns, q_slots, q, *refs, call: Call):
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
            # What was summed so far is scaled to the new maximum.
            weights, shrink = jnp.exp(scores - new), jnp.exp(old - new)
            top[head : head + 1] = new
            total[head : head + 1] = shrink * total[head : head + 1] + jnp.sum(weights, axis=0, keepdims=True)
            values = _rows(v, lanes, block, length)
            sums[head] = shrink * sums[head] + _dot(values, weights.astype(values.dtype), 0, 0)  # [H, q]

    _sources(call, rows, columns, keys, visit)

    @pl.when((flags & LAST) != 0)
    def _():
        for head in range(call.step_heads):
            # A query that saw nothing: zeros.
            weight = jnp.maximum(total[head : head + 1], 1e-30)
            out[0, :, call.lanes(head)] = jnp.transpose(sums[head] / weight).astype(out.dtype)
            lse[0, 0, head : head + 1] = top[head : head + 1] + jnp.log(weight)


def _probabilities(call: Call, k, q, mask, lse, head: int):
    """Probabilities, and the scores that they come from."""
    # From the logsumexp that the forward pass left: scores are made again, weights were not kept.
    scores = call.score.of(_dot(k, q, 1, 1))
    return jnp.where(mask, jnp.exp(scores - lse[0, 0, head : head + 1]), 0.0), scores


def queries_kernel(rows, columns, q_slots, q, out, d_out, lse, *refs, call: Call):
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
            weights, scores = _probabilities(call, key, q[0, :, call.lanes(head)], mask, lse, head)
            d_weights = _dot(value, d_out[0, :, call.lanes(head)], 1, 1)  # [k, q]
            d_scores = call.score.back(weights * (d_weights - delta[0, 0, head : head + 1]), scores)
            # [H, q]: what queries behind the end leave stays in their own columns, which are not stored.
            sums[head] += _dot(key, d_scores.astype(key.dtype), 0, 0)

    _sources(call, rows, columns, keys, visit)

    @pl.when((flags & LAST) != 0)
    def _():
        for head in range(call.step_heads):
            # The scale of the scores is left for the end: a product for each number of a query, not of a score.
            d_q[0, :, call.lanes(head)] = jnp.transpose(sums[head] * call.score.scale).astype(d_q.dtype)


def keys_kernel(rows, columns, slots, k, v, q_slots, q, d_out, lse, delta, d_k, d_v, sums_k, sums_v, *, call, length):
    """Gradients of one source's keys and values; rows of the list are its blocks, columns those of the queries."""
    step, split = pl.program_id(1), pl.program_id(2)
    flags = rows[step]

    # Sums of a block of keys go over its whole row of the list and over all splits.
    @pl.when(((flags & FIRST) != 0) & (split == 0))
    def _():
        sums_k[...] = jnp.zeros(sums_k.shape, sums_k.dtype)
        sums_v[...] = jnp.zeros(sums_v.shape, sums_v.dtype)

    @pl.when((flags & SOURCE) != 0)
    def _():
        mask = _visible(call.rule, q_slots, slots)
        block = columns[step]
        place = block_of(rows[step])
        for head in range(call.step_heads):
            kv_head = head // call.sizes.group
            lanes = call.lanes(kv_head)
            # Summed over queries, unlike above: those behind the end have to be zeros.
            query = _rows(q, call.lanes(head), block, call.length)
            d_head = _rows(d_out, call.lanes(head), block, call.length)
            weights, scores = _probabilities(call, _rows(k, lanes, place, length), query, mask, lse, head)
            d_weights = _dot(_rows(v, lanes, place, length), d_head, 1, 1)
            # The delta of places behind the end is anything, and 0 times anything may not be 0.
            d_scores = call.score.back(weights * (d_weights - delta[0, 0, head : head + 1]), scores)
            d_scores = jnp.where(mask, d_scores, 0.0)
            sums_v[kv_head] += _dot(weights.astype(d_head.dtype), d_head, 1, 0)
            sums_k[kv_head] += _dot(d_scores.astype(query.dtype), query, 1, 0)

    @pl.when(((flags & LAST) != 0) & (split == call.splits - 1))
    def _():
        for kv_head in range(call.sizes.kv_heads):
            d_k[0, :, call.lanes(kv_head)] = (sums_k[kv_head] * call.score.scale).astype(d_k.dtype)
            d_v[0, :, call.lanes(kv_head)] = sums_v[kv_head].astype(d_v.dtype)
