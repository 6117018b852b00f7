"""The TPU kernel, interpreted, against the definition in float64: forward and all gradients."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ccm.attention import blocks, tpu
from jax_ccm.attention.shared import Score
from jax_ccm.attention.tpu_sizes import Sizes
from jax_ccm.evals import parity
from jax_ccm.rules.types import Kind, Slots
from tests import cases
from tests.attention import support
from tests.attention.support import draw, made_for

# One method for each rule: many differ in positions or in what is written only.
RULES = {method.rule: name for name, method in reversed(cases.METHODS.items())}
QUICK = ("concat_n2_sink", "merge_n2_repeat", "loma", "window_sink", "local")


check = functools.partial(support.check, kernel=tpu.attend)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in RULES.values() if name not in QUICK)]
)
def test_rules(name):
    """Every rule, on ragged rows with padding; text and memory in blocks that divide neither."""
    method = cases.METHODS[name]
    made = made_for(method)
    keys = [made.slots] + ([made.memory.slots] if made.memory is not None else [])
    arrays = draw(0, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], 2, 1, 8)
    sizes = Sizes(32, (16, 16)[: len(keys)], 1, 2)
    out, d_q, d_sources = check(method.rule, made.slots, keys, arrays, sizes=sizes)
    for slots, x in ((made.slots, out), (made.slots, d_q), (made.slots, d_sources[0][0]), (keys[-1], d_sources[-1][1])):
        assert np.abs(np.asarray(x)[np.asarray(slots.kind) == Kind.PAD]).max() == 0


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "split"),
    [(4, 4, 64, None), (6, 2, 96, None), (4, 1, 128, 2), (8, 2, 256, None), (8, 1, 64, 4)],
)
def test_heads(heads, kv_heads, size, split):
    """Groups of 1, 3, 4 and 8, one key head for all, and groups that are split over the grid."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    keys = [made.slots, made.memory.slots]
    arrays = draw(1, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], heads, kv_heads, size)
    sizes = None if split is None else Sizes(32, (32, 16), 1, split)
    check(method.rule, made.slots, keys, arrays, sizes=sizes)


def test_scaled_and_capped_scores():
    """Another scale than that of the head, and a cap that bends most scores (Gemma 2)."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    keys = [made.slots, made.memory.slots]
    arrays = draw(3, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], 2, 1, 8)
    check(method.rule, made.slots, keys, arrays, sizes=Sizes(32, (16, 16), 1, 2), score=Score(0.5, 1.5))


def test_few_queries():
    """Decoding: one query a row against a long cache; the heads of a group are rows of one block."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    own = made.slots.map(lambda x: x[:, 30:31])
    keys = [own, made.slots.map(lambda x: x[:, :30]), made.memory.slots]
    arrays = draw(2, 3, 1, [s.kind.shape[1] for s in keys], 6, 2, 64)
    check(method.rule, own, keys[:2], (arrays[0], arrays[1][:2], arrays[2]))


SLOT = st.tuples(st.sampled_from([0, 1, 1, 2, 3, 6, 7, 7]), st.integers(0, 3), st.integers(0, 12), st.integers(0, 12))


@given(st.lists(SLOT, min_size=26, max_size=26), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_any_slots(drawn, seed):
    """Slots in no order, rows that see nothing among them."""
    slots = Slots(*np.asarray(drawn, np.int32).T[:, None])
    text, memory = slots.map(lambda x: x[:, :19]), slots.map(lambda x: x[:, 19:])
    arrays = draw(seed, 1, 19, (19, 7), 2, 1, 8)
    check(cases.METHODS["concat_n2_sink"].rule, text, [text, memory], arrays, sizes=Sizes(16, (16, 16), 1, 2))


def test_dead_places_hold_anything():
    support.check_dead_places(tpu.attend)


@pytest.mark.parametrize("name", ["concat_n2_sink", "merge_n1", "sentinel"])
def test_parallel_is_recurrent(name):
    """The whole model with the kernel: training's forward and the recurrence agree, and agree with plain products."""
    method = cases.METHODS[name]
    model, sessions = cases.model(method.num_embeddings), cases.sessions_for(method)
    ours = parity.parallel_logits(model.with_attention("pallas"), method, sessions)
    plain = parity.parallel_logits(model.with_attention("xla"), method, sessions)
    recurrent = parity.recurrent_logits(model.with_attention("pallas"), method, sessions)
    for a, b, c in zip(ours, plain, recurrent, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)


def test_more_rows_than_the_list_of_pairs_can_number(monkeypatch):
    """As in serving thousands of sessions: the rows are taken in parts, the last a shorter one."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(5, 4, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    place = np.broadcast_to(np.arange(4, dtype=np.int32), (5, 4))
    slots = Slots(np.full((5, 4), Kind.TEXT, np.int32), np.zeros((5, 4), np.int32), place, place)
    call = lambda: tpu.attend(q, slots, ((k, v, slots),), rule=cases.METHODS["concat_n1"].rule, interpret=True)
    whole = jax.jit(call)()
    assert np.abs(whole).max() > 0.1
    monkeypatch.setattr(blocks, "MAX_BATCH", 2)
    np.testing.assert_allclose(jax.jit(call)(), whole, atol=1e-6)
