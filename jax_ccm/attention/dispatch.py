"""Attention over a row's own tokens and a memory: the one door to every implementation."""

from __future__ import annotations

import functools
import itertools
import logging

import jax
import jax.numpy as jnp

from jax_ccm.attention.shared import Refused, Score
from jax_ccm.distributed.sharding import activation_spec, constrain, context_shards
from jax_ccm.numerics import einsum
from jax_ccm.rules.types import Rule, Slots
from jax_ccm.rules.visibility import visible

IMPLEMENTATIONS = ("xla", "pallas")
# Platforms with a kernel; a GPU that is not here calls itself by its vendor's name.
COMPILED = {"tpu": "TPU", "gpu": "GPU (Triton)", "cuda": "GPU (Triton)"}
# Queries that are attended at once: scores take this times S numbers for each head, whatever T.
QUERY_BLOCK = 512
# Into so many parts are queries cut that stand in order, if each has so many.
PARTS, PART = 4, 128
# The score of what is hidden.
# Finite: in a row that sees nothing the difference from the maximum is then 0, and no NaN.
HIDDEN = -1e30
# Up to so many key heads on a device, one query a row meets all of them at once.
WIDE_HEADS = 8
logger = logging.getLogger(__name__)


def memory_attention(
    q,
    k,
    v,
    memory_k=None,
    memory_v=None,
    *,
    rule: Rule,
    slots: Slots,
    memory_slots: Slots | None = None,
    scale: float | None = None,
    cap: float | None = None,
    in_order: bool = False,
    implementation: str | None = None,
):
    """Softmax attention of each token to the visible ones among its row and the memory.

    Args:
      q: ``[B, T, N, H]`` queries, rotated.
      k, v: ``[B, T, K, H]`` keys (rotated) and values of the same tokens; N is a multiple of K.
      memory_k, memory_v: ``[B, M, K, H]`` keys and values of the memory, or None.
      rule: who sees whom.
      slots: `Slots` of ``[B, T]``.
      memory_slots: `Slots` of ``[B, M]``.
      scale: of the products of queries and keys; None for ``H ** -0.5``.
      cap: if set, scores are ``cap * tanh(score / cap)`` (Gemma 2).
      in_order: static, whether the tokens of a row stand in order of `Slots.index` (padding aside), as they do in all
        layouts: later ones need then not be compared. The kernels find out by themselves.
      implementation: "xla", plain matrix products in blocks of queries; "pallas", a kernel that visits only what is
        visible, compiled for the devices of the mesh in context, or else the default ones, and interpreted on a CPU;
        None for "pallas" on a TPU, else "xla". What is chosen, and what a kernel refuses
        and is done by "xla" instead, is logged with the reason (INFO, once).

    Returns:
      ``[B, T, N, H]``; zeros for a query that sees nothing.

    Raises:
      ValueError: for shapes that do not fit or an unknown implementation.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if q.shape[2] % k.shape[2] or q.shape[:2] != k.shape[:2] or k.shape != v.shape:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together: expected [B, T, N, H] and "
            "twice [B, T, K, H] with N a multiple of K"
        )
    # The text first. `_joined` turns the order around, and the kernels visit sources in this one.
    sources = [(k, v, slots)]
    if memory_k is not None and memory_v is not None and memory_slots is not None and memory_k.shape[1]:
        sources.append((memory_k, memory_v, memory_slots))
    score = Score(q.shape[3] ** -0.5 if scale is None else scale, cap)
    kernel = _kernel(implementation)
    if kernel is not None:
        try:
            return kernel(q, slots, tuple(sources), rule=rule, score=score)
        except Refused as e:
            _say(f"attention runs as 'xla': the kernel refuses, {e}")
    # Rules that look both ways need what stands behind, too.
    return _xla(q, slots, sources, rule, score, in_order and not rule.both_ways)


def _kernel(implementation: str | None):
    """The kernel that is wanted and fits the device, or None."""
    if implementation == "xla":
        return None
    # The mesh says what is compiled for: ahead of time that is no device of this machine.
    mesh = jax.sharding.get_abstract_mesh()
    platform = mesh.abstract_device.platform if mesh.abstract_device is not None else jax.default_backend()
    if platform in COMPILED and (platform == "tpu" or implementation == "pallas"):
        _say(f"attention runs as 'pallas', compiled for {COMPILED[platform]}")
    elif platform in COMPILED:
        _say(f"attention runs as 'xla': the kernel for {COMPILED[platform]} has not been run yet; 'pallas' asks for it")
        return None
    elif platform != "cpu" or implementation is None:
        _say(f"attention runs as 'xla': there is no kernel for {platform}")
        return None
    if platform in ("gpu", "cuda"):
        from jax_ccm.attention import gpu as kernels
    else:
        from jax_ccm.attention import tpu as kernels
    return _on_mesh(functools.partial(kernels.attend, interpret=platform not in COMPILED))


def _on_mesh(attend):
    """``attend(q, slots, sources, *, rule, score)`` of arrays that may be spread over the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return attend if mesh.size <= 1 or mesh.are_all_axes_manual else functools.partial(_spread, attend)


def _spread(attend, q, slots: Slots, sources, *, rule: Rule, score: Score):
    """``attend`` on each device of the mesh in use: rows and heads as they lie; queries see all tokens of their row."""
    tokens, heads = activation_spec(slots.kind.shape, "rows", "tokens"), activation_spec(q.shape, "rows", None, "heads")
    # Each device attends by itself: the query heads that it has must share the key heads that it has.
    if len(heads) > 2 and activation_spec(sources[0][0].shape, "rows", None, "heads") != heads:
        raise Refused(f"{sources[0][0].shape[2]} key heads cannot be spread like {q.shape[2]} query heads")
    queries = activation_spec(q.shape, "rows", "tokens", "heads")
    rows = activation_spec(slots.kind.shape, "rows")
    own = jax.shard_map(
        functools.partial(attend, rule=rule, score=score),
        in_specs=(queries, tokens, tuple((heads, heads, rows) for _ in sources)),
        out_specs=queries,
        # A kernel's result does not say how it varies over the mesh, which this check would ask of it.
        check_vma=False,
    )
    return own(q, slots, sources)


@functools.cache
def _say(message: str) -> None:
    """Logs what was decided, once."""
    logger.info(message)


def _xla(q, slots: Slots, sources, rule: Rule, score: Score, in_order: bool):
    """Plain matrix products, a block of queries at a time. Memory goes in front of the text."""
    if q.shape[1] == 1:
        try:
            return _on_mesh(_attend_one)(q, slots, tuple(sources), rule=rule, score=score)
        except Refused:
            pass
    k, v, seen = _joined(sources)
    # Heads in front, so that the products are plain matrix products.
    k, v = (constrain(jnp.moveaxis(x, 1, 2), "rows", "heads") for x in (k, v))
    length = q.shape[1]
    # Memory stands in front, seen by queries of all parts: what a part needs is then one run from the beginning.
    before = seen.kind.shape[1] - length
    # Parts of the queries, each with the keys up to its end: with four of them 5/8 of all pairs.
    # Where devices share the tokens of a row, a part would lie on some of them only.
    parts = max(min(PARTS, length // PART), 1) if in_order and context_shards() == 1 else 1
    ends = [length * part // parts for part in range(parts + 1)]
    outs = []
    for begin, end in itertools.pairwise(ends):
        mine, keys = slots.map(lambda x, b=begin, e=end: x[:, b:e]), seen.map(lambda x, e=before + end: x[:, :e])
        mine = q[:, begin:end], mine, k[:, :, : before + end], v[:, :, : before + end], keys
        outs.append(_in_blocks(*mine, rule=rule, score=score))
    return jnp.concatenate(outs, axis=1) if parts > 1 else outs[0]


def _in_blocks(q, slots: Slots, k, v, seen: Slots, *, rule: Rule, score: Score):
    """`_attend` to a block of queries at a time."""
    # Recomputed in the backward pass: what is kept for it grows with T and S, not with T x S.
    attend = jax.checkpoint(functools.partial(_attend, rule=rule, score=score))
    batch, length = q.shape[:2]
    # Where devices share the tokens of a row, a block takes as many from each.
    shards = context_shards() if length % context_shards() == 0 else 1
    own = length // shards
    if own <= QUERY_BLOCK:
        return attend(q, slots, k, v, seen)
    blocks = -(-own // QUERY_BLOCK)

    def split(x):
        x = x.reshape(batch, shards, own, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, blocks * QUERY_BLOCK - own)] + [(0, 0)] * (x.ndim - 3))
        # [blocks, B, shards, 512, ...]
        x = jnp.moveaxis(x.reshape(batch, shards, blocks, QUERY_BLOCK, *x.shape[3:]), 2, 0)
        return x.reshape(blocks, batch, shards * QUERY_BLOCK, *x.shape[4:])

    # Queries that the last block lacks are of kind PAD and see nothing.
    out = jax.lax.map(lambda block: attend(*block, k, v, seen), (split(q), jax.tree.map(split, slots)))
    out = jnp.moveaxis(out.reshape(blocks, batch, shards, QUERY_BLOCK, *q.shape[2:]), 0, 2)
    return out.reshape(batch, shards, -1, *q.shape[2:])[:, :, :own].reshape(q.shape)


def _attend(q, slots: Slots, k, v, seen: Slots, *, rule: Rule, score: Score):
    """Attention of a block of queries ``[B, T, N, H]`` to all keys and values ``[B, K, S, H]``."""
    batch, length, heads, size = q.shape
    kv_heads = k.shape[1]
    q = constrain(q, "rows", "tokens", "heads")
    # The query heads of a group share their keys as rows of one matrix; tokens in front, as devices may share them.
    rows = (batch, kv_heads, length * heads // kv_heads)
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, -1, size), 1, 2).reshape(*rows, size)  # [B, K, T G, H]
    scores = score.of(einsum("bkqh,bksh->bkqs", q, k, output="float32"))
    scores = scores.reshape(batch, kv_heads, length, -1, k.shape[2])  # [B, K, T, G, S]
    # The mask is [B, T, S]: the same for all heads.
    weights, share = _weights(scores, visible(rule, slots, seen)[:, None, :, None])
    # Divided after the product: T x H numbers instead of T x S.
    weights = weights.astype(v.dtype).reshape(*rows, -1)
    out = einsum("bkqs,bksh->bkqh", weights, v, output="float32")
    out = out.reshape(batch, kv_heads, length, -1, size) * share  # [B, K, T, G, H]
    out = jnp.moveaxis(out.astype(v.dtype), 1, 2)
    return constrain(out.reshape(batch, length, heads, size), "rows", "tokens", "heads")


def _joined(sources):
    """Keys, values and slots of all sources in a row, memory first."""
    k, v = (jnp.concatenate([source[i] for source in reversed(sources)], axis=1) for i in (0, 1))
    return k, v, jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *(source[2] for source in reversed(sources)))


def _attend_one(q, slots: Slots, sources, *, rule: Rule, score: Score):
    """Attention of one query a row, as in decoding, to keys that stay as they lie.

    They are one matrix ``[S, K H]``, and the query of a head is zero where the keys of other heads stand. That is K
    times the arithmetic, but a token waits for its keys to be read: with heads in front they are moved twice more, and
    a GPU turns the whole cache, into a second one.

    Raises:
      Refused: for so many heads that arithmetic would take longer.
    """
    k, v, seen = _joined(sources)
    batch, _, heads, size = q.shape
    kv_heads = k.shape[2]
    if kv_heads > WIDE_HEADS:
        raise Refused(f"{kv_heads} key heads")
    # [N, K, 1]: which key head each query head has.
    own = (jnp.arange(heads)[:, None] // (heads // kv_heads) == jnp.arange(kv_heads))[:, :, None]
    wide = jnp.where(own, q[:, 0, :, None], 0).reshape(batch, heads, -1)  # [B, N, K H]

    def flat(x):
        return x.reshape(*x.shape[:2], -1)

    scores = score.of(jnp.einsum("bnd,bsd->bns", wide, flat(k), preferred_element_type=jnp.float32))
    weights, share = _weights(scores, visible(rule, slots, seen))
    out = jnp.einsum("bns,bsd->bnd", weights.astype(v.dtype), flat(v), preferred_element_type=jnp.float32)
    # [B, N, K, H]: each query head has met the values of all key heads, and keeps those of its own.
    out = jnp.sum(jnp.where(own, out.reshape(batch, heads, kv_heads, size), 0), axis=2) * share
    return out.astype(v.dtype)[:, None]


def _weights(scores, mask):
    """Weights of keys, not yet divided; and ``[..., 1]`` what to multiply sums with: 0 where nothing is seen."""
    scores = jnp.where(mask, scores, HIDDEN)
    # The maximum falls out of the quotient; no gradient has to go through it.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    # What is hidden weighs exp(HIDDEN - top) = 0, unless nothing is seen at all.
    return weights, jnp.where(top > HIDDEN, 1 / jnp.sum(weights, axis=-1, keepdims=True), 0.0)
