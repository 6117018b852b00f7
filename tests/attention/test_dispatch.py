"""Attention in blocks of queries: the same numbers, and memory that grows with the length alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.attention import dispatch, tpu
from jax_ccm.attention.dispatch import memory_attention
from jax_ccm.attention.shared import Refused, Score
from jax_ccm.evals import recurrent
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.types import Kind, Slots
from tests import cases
from tests.attention import support
from tests.attention.support import made_for

HEADS, KV_HEADS, SIZE = 6, 2, 8


def arrays(method, seed: int = 0):
    """Random queries, keys and values on a real layout, padded by a few places."""
    sessions = cases.sessions(((9, 7, 5, 6), (3, 8)))
    sizes = recurrent.caps_for(method, sessions)
    made = rows.batch(method, sessions, rows.Sizes(sizes.tokens + 3, sizes.memory + 2, sizes.scored), cases.VOCAB)
    rng = np.random.default_rng(seed)
    draw = lambda places, heads: jnp.asarray(rng.normal(size=(2, places, heads, SIZE)), jnp.float32)
    tokens, memory = made.tokens.shape[1], made.memory.slots.kind.shape[1]
    values = (draw(tokens, HEADS), *(draw(n, KV_HEADS) for n in (tokens, tokens, memory, memory)))
    return made, values


def exact(rule, made, q, k, v, memory_k, memory_v):
    """The definition, in float64."""
    q, k, v, memory_k, memory_v = (np.asarray(x, np.float64) for x in (q, k, v, memory_k, memory_v))
    mask = [visibility.visible(rule, made.slots, made.memory.slots), visibility.visible(rule, made.slots, made.slots)]
    mask, keys, values = np.concatenate(mask, -1), np.concatenate([memory_k, k], 1), np.concatenate([memory_v, v], 1)
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            if not mask[b, t].any():
                continue
            for n in range(q.shape[2]):
                head = n // (q.shape[2] // k.shape[2])
                score = keys[b, mask[b, t], head] @ q[b, t, n] / np.sqrt(SIZE)
                weight = np.exp(score - score.max())
                out[b, t, n] = weight / weight.sum() @ values[b, mask[b, t], head]
    return out


@pytest.mark.parametrize("name", ["concat_n2_sink", "merge_n1", "loma", "sentinel"])
@pytest.mark.parametrize("block", [7, 16, 512])
@pytest.mark.parametrize("in_order", [False, True])
def test_blocks_are_exact(monkeypatch, name, block, in_order):
    """Any block size gives the definition, masks that differ from row to row included (Sentinel's trap S16); a query
    that sees nothing gives zeros."""
    method = cases.METHODS[name]
    made, values = arrays(method)
    monkeypatch.setattr(dispatch, "QUERY_BLOCK", block)
    monkeypatch.setattr(dispatch, "PART", 9)
    attend = functools.partial(memory_attention, rule=method.rule, slots=made.slots, memory_slots=made.memory.slots)
    out = attend(*values, in_order=in_order)
    np.testing.assert_allclose(out, exact(method.rule, made, *values), atol=1e-5)
    assert np.abs(np.asarray(out)[made.slots.kind == Kind.PAD]).max() == 0


@pytest.mark.parametrize("name", cases.METHODS)
def test_layouts_are_in_order(name):
    """No token of a layout sees a later place of its row, but for rules that look both ways."""
    method = cases.METHODS[name]
    made = made_for(method)
    seen = np.asarray(visibility.visible(method.rule, made.slots, made.slots))
    assert np.triu(seen, 1).any() == bool(method.rule.both_ways)


@pytest.mark.parametrize("name", ["concat_n2_sink", "merge_n1", "loma", "sentinel"])
def test_one_query_at_a_time(name):
    """As in decoding, where heads are not put in front: each query by itself, to its own key and all others as memory,
    gives the definition and the gradients that it has among the others."""
    method = cases.METHODS[name]
    made, (q, k, v, memory_k, memory_v) = arrays(method)
    expected = exact(method.rule, made, q, k, v, memory_k, memory_v)
    length = q.shape[1]

    @jax.jit
    def alone(place, others):
        at = lambda x: jnp.take(x, place[None], axis=1)
        rest = lambda memory, x: jnp.concatenate([memory, jnp.take(x, others, axis=1)], axis=1)
        slots = jax.tree.map(rest, made.memory.slots, made.slots)

        def attend(values):
            q, k, v, memory_k, memory_v = values
            return memory_attention(
                at(q), at(k), at(v), rest(memory_k, k), rest(memory_v, v), rule=method.rule, slots=made.slots.map(at),
                memory_slots=slots,
            )  # fmt: skip

        out, pull = jax.vjp(attend, (q, k, v, memory_k, memory_v))
        return out, pull(jnp.ones_like(out))[0]

    together = functools.partial(memory_attention, rule=method.rule, slots=made.slots, memory_slots=made.memory.slots)
    gradients, places = None, np.arange(length)
    for place in places:
        out, found = alone(jnp.asarray(place), jnp.asarray(np.delete(places, place)))
        np.testing.assert_allclose(out[:, 0], expected[:, place], atol=1e-5)
        gradients = found if gradients is None else jax.tree.map(jnp.add, gradients, found)
    for ours, theirs in zip(
        gradients, jax.grad(lambda v: jnp.sum(together(*v)))((q, k, v, memory_k, memory_v)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        assert np.abs(ours).max() > 0


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_scale_and_cap_reach_every_implementation(implementation):
    """All queries at once, and one alone; what an implementation could not do it would have to refuse."""
    method = cases.METHODS["concat_n2_sink"]
    made, (q, k, v, memory_k, memory_v) = arrays(method)
    sources = [(k, v, made.slots), (memory_k, memory_v, made.memory.slots)]
    score = Score(0.4, 1.5)
    expected = support.exact(method.rule, made.slots, q, sources, np.zeros(q.shape), score)[0]
    plain = support.exact(method.rule, made.slots, q, sources, np.zeros(q.shape))[0]
    assert np.abs(expected - plain).max() > 0.05
    seen = dict(rule=method.rule, memory_slots=made.memory.slots, scale=0.4, cap=1.5, implementation=implementation)
    out = memory_attention(q, k, v, memory_k, memory_v, slots=made.slots, **seen)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    place = 7
    own, rest = (lambda x: x[:, place : place + 1]), (lambda m, x: jnp.concatenate([m, x[:, :place]], axis=1))
    seen["memory_slots"] = jax.tree.map(rest, made.memory.slots, made.slots)
    given = own(q), own(k), own(v), rest(memory_k, k), rest(memory_v, v)
    alone = memory_attention(*given, slots=made.slots.map(own), **seen)
    np.testing.assert_allclose(alone[:, 0], expected[:, place], atol=1e-5)


def test_gradients_of_blocks(monkeypatch):
    """Gradients do not depend on the blocks, and are zero and finite where nothing is seen."""
    method = cases.METHODS["concat_n2_sink"]
    made, values = arrays(method)
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=values[0].shape), jnp.float32)
    found = []
    monkeypatch.setattr(dispatch, "PART", 9)
    for block, in_order in ((512, False), (7, False), (512, True), (7, True)):
        monkeypatch.setattr(dispatch, "QUERY_BLOCK", block)
        seen = dict(slots=made.slots, memory_slots=made.memory.slots, in_order=in_order)
        attend = functools.partial(memory_attention, rule=method.rule, **seen)
        found.append(jax.grad(lambda v, attend=attend: jnp.sum(attend(*v) * weights))(values))
    for ours, theirs in ((x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.isfinite(ours).all() and np.abs(ours).max() > 0
    pad = made.slots.kind == Kind.PAD
    assert all(np.abs(np.asarray(x)[pad]).max() == 0 for x in found[0][:3])


def test_memory_grows_with_the_length_alone():
    """Temporaries of attention and its gradient: four times the tokens take four times as much, not sixteen."""

    def temporaries(length: int) -> int:
        shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, SIZE), jnp.float32)
        slot = jax.ShapeDtypeStruct((1, length), jnp.int32)
        attend = functools.partial(memory_attention, rule=cases.METHODS["full"].rule)
        loss = lambda q, k, v, slots: jnp.sum(attend(q, k, v, slots=slots) ** 2)
        arguments = (shape(2), shape(1), shape(1), Slots(slot, slot, slot, slot))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)


def test_what_is_chosen_is_said(caplog, monkeypatch):
    """The platform decides, the log says so; what the kernel refuses is done all the same, and the reason said."""
    method = cases.METHODS["concat_n2_sink"]
    made, values = arrays(method)
    attend = functools.partial(
        memory_attention, *values, rule=method.rule, slots=made.slots, memory_slots=made.memory.slots
    )
    dispatch._say.cache_clear()
    with caplog.at_level("INFO", logger="jax_ccm.attention"):
        plain = attend()
    assert caplog.messages == ["attention runs as 'xla': there is no kernel for cpu"]

    def refuse(*args, **options):
        raise Refused("no room")

    monkeypatch.setattr(tpu, "choose", refuse)
    with caplog.at_level("INFO", logger="jax_ccm.attention"):
        np.testing.assert_array_equal(attend(implementation="pallas"), plain)
    assert caplog.messages[1:] == ["attention runs as 'xla': the kernel refuses, no room"]
