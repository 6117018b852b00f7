"""The definition of attention and its gradients, in float64, and inputs for the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.attention.shared import Score
from jax_ccm.evals import recurrent
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.types import Kind, Method, Rule, Slots
from tests import cases

LENGTHS = ((9, 7, 5, 6, 12), (3, 8), (1, 17, 2, 2, 4, 3))


def made_for(method: Method) -> Batch:
    """A ragged, padded batch."""
    sessions = cases.sessions_for(method, lengths=LENGTHS)
    sizes = recurrent.caps_for(method, sessions)
    return rows.batch(method, sessions, rows.Sizes(sizes.tokens + 9, sizes.memory + 5, sizes.scored), cases.VOCAB)


def draw(seed: int, batch: int, length: int, keys: Sequence[int], heads: int, kv_heads: int, size: int):
    """Random queries, ``(k, v)`` of each source, and a gradient of the output."""
    rng = np.random.default_rng(seed)
    array = lambda n, h: jnp.asarray(rng.normal(size=(batch, n, h, size)), jnp.float32)
    values = [(array(n, kv_heads), array(n, kv_heads)) for n in keys]
    return array(length, heads), values, array(length, heads)


def exact(rule: Rule, q_slots: Slots, q, sources, d_out, score: Score | None = None):
    """Output, and gradients of queries and of each source's keys and values, in float64."""
    wide = lambda x: np.asarray(x, np.float64)
    group = q.shape[2] // sources[0][0].shape[2]
    k, v = (np.concatenate([wide(s[i]) for s in sources], axis=1) for i in (0, 1))
    mask = np.concatenate([np.asarray(visibility.visible(rule, q_slots, s[2])) for s in sources], axis=-1)[:, None]
    score = score or Score(q.shape[3] ** -0.5)
    q, d_out = wide(q), wide(d_out)
    each_k, each_v = (np.repeat(x, group, axis=2) for x in (k, v))
    products, slope = np.einsum("btnh,bsnh->bnts", q, each_k) * score.scale, score.scale
    if score.cap is not None:
        products = score.cap * np.tanh(products / score.cap)
        slope = score.scale * (1 - (products / score.cap) ** 2)
    scores = np.where(mask, products, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - top)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", weights, each_v)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, each_v)
    d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True)) * slope
    shared = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3)
    d_q = np.einsum("bnts,bsnh->btnh", d_scores, each_k)
    d_k = shared(np.einsum("bnts,btnh->bsnh", d_scores, q))
    d_v = shared(np.einsum("bnts,btnh->bsnh", weights, d_out))
    ends = np.cumsum([s[0].shape[1] for s in sources])[:-1]
    return out, d_q, list(zip(np.split(d_k, ends, axis=1), np.split(d_v, ends, axis=1), strict=True))


@functools.partial(jax.jit, static_argnames=("kernel", "rule", "sizes", "score"))
def attend(q, q_slots, sources, key_slots, d_out, *, kernel, rule, sizes=None, score=None):
    """Output and gradients of a kernel, interpreted."""

    def call(q, sources):
        joined = tuple((*values, slots) for values, slots in zip(sources, key_slots, strict=True))
        return kernel(q, q_slots, joined, rule=rule, sizes=sizes, score=score, interpret=True)

    out, pull = jax.vjp(call, q, sources)
    return out, *pull(d_out)


def check(rule, q_slots, key_slots, arrays, *, score=None, **options):
    """A kernel against `exact`."""
    q, sources, d_out = arrays
    found = attend(q, q_slots, sources, key_slots, d_out, rule=rule, score=score, **options)
    keys = [(*s, slots) for s, slots in zip(sources, key_slots, strict=True)]
    expected = exact(rule, q_slots, q, keys, d_out, score)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    return found


def check_dead_places(kernel):
    """What stands in a place of kind PAD reaches no output and no gradient of a query."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    keys = [made.slots, made.memory.slots]
    q, sources, d_out = draw(3, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], 2, 1, 8)
    clean = attend(q, made.slots, sources, keys, d_out, kernel=kernel, rule=method.rule)
    huge = lambda x, slots: np.where((np.asarray(slots.kind) == Kind.PAD)[..., None, None], 1e9, x)
    dirty = [tuple(huge(x, slots) for x in source) for source, slots in zip(sources, keys, strict=True)]
    other = attend(q, made.slots, dirty, keys, d_out, kernel=kernel, rule=method.rule)
    np.testing.assert_array_equal(clean[0], other[0])
    np.testing.assert_array_equal(clean[1], other[1])
