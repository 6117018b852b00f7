"""Inputs for the kernels, and what they are held against: the definition of attention in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.attention.definition import exact
from jax_ccm.evals import recurrent
from jax_ccm.rules import rows
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.types import Kind, Method
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
