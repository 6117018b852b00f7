"""Selections: what is received, what is kept, and that keeping everything is full context."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.attention.dispatch import memory_attention
from jax_ccm.errors import UserError
from jax_ccm.evals.parity import parallel_logits, recurrent_logits
from jax_ccm.evals.recurrent import cache_for, score_recurrently
from jax_ccm.evals.scoring import base_only
from jax_ccm.memory import files, steps
from jax_ccm.memory.cache import check, init_cache, reset, select
from jax_ccm.methods import build
from jax_ccm.nn.layer import accumulated_attention
from jax_ccm.rules.rows import Sizes, arrange, batch
from jax_ccm.rules.types import Chunk, Kind, Slots
from jax_ccm.rules.visibility import visible
from tests import cases

MODEL = cases.model()
READ = jax.jit(steps.read, static_argnames=("method", "query"))
COMPRESS = jax.jit(steps.compress, static_argnames="method")
METHODS = {
    "h2o": build("evict", score="attention", slots=2),
    "tova": build("evict", score="attention", slots=3, discount=0.0, sink=False, constant=True),
    "norm": build("evict", score="norm", slots=2),
    "similarity": build("evict", score="similarity", slots=2),
    "random": build("evict", score="random", slots=2, seed=3),
}


def chunk(seed: int, rows: int = 2, size: int = 6) -> Chunk:
    rng = np.random.default_rng(seed)
    return Chunk(rng.integers(5, 90, (rows, size)).astype(np.int32), np.ones((rows, size), bool))


def cache(method, **options):
    options = {"memory_capacity": 6, "raw_capacity": 12, **options}
    return init_cache(MODEL, method, 2, **options)


def test_accumulated_attention_is_the_column_sum_of_the_softmax():
    """For grouped queries, a ragged memory and weights of the queries, against softmax written out in float64."""
    rng = np.random.default_rng(0)
    method = METHODS["h2o"]
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k, v, mk, mv = normal(2, 5, 4, 8), normal(2, 5, 2, 8), normal(2, 5, 2, 8), normal(2, 3, 2, 8), normal(2, 3, 2, 8)
    whole = lambda value, size: np.full((2, size), value, np.int32)
    place = np.tile(np.arange(3, 8, dtype=np.int32), (2, 1))
    slots = Slots(whole(Kind.TEXT, 5), whole(1, 5), place, place)
    past = Slots(np.array([[7, 7, 0], [6, 7, 7]], np.int32), whole(0, 3), whole(0, 3), whole(0, 3))
    weights = rng.uniform(size=(2, 5)).astype(np.float32)
    attend = lambda v, mv: memory_attention(q, k, v, mk, mv, rule=method.rule, slots=slots, memory_slots=past)
    y, (own, old) = accumulated_attention(attend, v, mv, weights)
    np.testing.assert_array_equal(y, attend(v, mv))
    keys = np.repeat(np.concatenate([mk, k], axis=1), 2, axis=2).astype(np.float64)
    scores = np.einsum("btnh,bsnh->bnts", q.astype(np.float64), keys) / np.sqrt(8)
    seen = np.concatenate([visible(method.rule, slots, past), visible(method.rule, slots, slots)], axis=2)
    p = np.where(seen[:, None], np.exp(scores), 0)
    p /= p.sum(-1, keepdims=True)
    sums = np.einsum("bnts,bt->bns", p, weights).reshape(2, 2, 2, 8).sum(2)
    np.testing.assert_allclose(np.concatenate([old, own], axis=1), np.moveaxis(sums, 1, 2), atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
def test_accumulated_attention_does_not_depend_on_how_text_is_cut(decay):
    method = build("evict", slots=2, discount=decay)
    text = chunk(0, size=8)
    whole, _ = READ(MODEL, cache(method), text, method=method)
    pieces = cache(method)
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        pieces, _ = READ(MODEL, pieces, Chunk(text.tokens[:, part], text.valid[:, part]), method=method)
    np.testing.assert_allclose(whole.accumulated_attention, pieces.accumulated_attention, atol=1e-5)
    # Each head of each query gives away 1 in all; the last token's share is not discounted.
    heads = cases.CONFIG.num_heads
    given = heads * sum(decay**i for i in range(8))
    np.testing.assert_allclose(np.asarray(whole.accumulated_attention).sum((2, 3)), given, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_each_head_keeps_those_of_the_highest_score(name):
    """Three chunks, against a selection written out: sets of keys and values of each layer, row and head."""
    method = METHODS[name]
    state = cache(method)
    for time in range(3):
        state, _ = READ(MODEL, state, chunk(time), method=method)
        slots = state.slots
        candidates = np.asarray(slots.live & (slots.kind != Kind.SINK))
        scores = np.asarray(
            method.eviction.score(state.k, state.accumulated_attention, slots.index, jnp.asarray(candidates))
        )
        count = 3 if method.eviction.constant else 2 * (time + 1)
        after = COMPRESS(MODEL, state, method=method)
        is_memory = np.asarray(after.slots.kind == Kind.MEMORY)
        assert is_memory.sum(1).tolist() == [count, count]
        assert (np.asarray(after.slots.live).sum(1) == count + method.sink).all()
        for layer, row, head in np.ndindex(3, 2, 2):
            places = np.flatnonzero(candidates[row])
            top = places[np.argsort(-scores[layer, row, places, head], kind="stable")[:count]]
            for old, new in ((state.k, after.k), (state.v, after.v)):
                want = np.asarray(old)[layer, row, top, head]
                have = np.asarray(new)[layer, row, is_memory[row], head]
                assert {x.tobytes() for x in want} == {x.tobytes() for x in have}
        if name == "random":  # all heads agree, so the slots say which tokens stayed
            index = np.asarray(after.slots.index)[0, is_memory[0]]
            assert set(index) <= set(np.asarray(slots.index)[0, candidates[0]])
        state = after


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_full_context(name):
    policy = dataclasses.replace(METHODS[name].eviction, slots=40)
    method = dataclasses.replace(METHODS[name], eviction=policy)
    examples = cases.sessions()
    roomy = dataclasses.replace(cache_for(MODEL, method, examples), overflow="evict")
    ours = recurrent_logits(MODEL, method, examples, cache=roomy)
    theirs = parallel_logits(MODEL, base_only(build("full")), examples)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_chance_sample_is_uniform():
    """Of 4,000 tokens 400 are drawn: from each tenth of the text about 40 (within five standard deviations)."""
    policy = build("evict", score="random", slots=1).eviction
    index = np.arange(4000, dtype=np.int32)[None]
    scores = policy.score(np.zeros((1, 1, 4000, 1, 2), np.float32), None, index, np.ones((1, 4000), bool))[0, 0, :, 0]
    assert len(set(scores.tolist())) > 3990
    drawn = np.bincount(np.argsort(-scores)[:400] // 400, minlength=10)
    assert np.abs(drawn - 40).max() < 5 * 6
    other = build("evict", score="random", slots=1, seed=1).eviction
    again = other.score(np.zeros((1, 1, 4000, 1, 2), np.float32), None, index, np.ones((1, 4000), bool))[0, 0, :, 0]
    assert len(set(np.argsort(-scores)[:400]) & set(np.argsort(-again)[:400])) < 80


def test_room():
    method = METHODS["h2o"]
    narrow, evicting = cache(method, memory_capacity=3), cache(method, memory_capacity=3, overflow="evict")
    for time in range(2):
        narrow, evicting = (
            COMPRESS(MODEL, READ(MODEL, c, chunk(time), method=method)[0], method=method) for c in (narrow, evicting)
        )
    with pytest.raises(UserError, match=r"sessions \[0, 1\] needed \[1, 1\] more slots"):
        check(narrow)
    check(evicting)
    assert (np.asarray(evicting.slots.kind == Kind.MEMORY).sum(1) == 3).all()


def test_rows_that_do_not_close_pass_through():
    method = METHODS["h2o"]
    state, _ = READ(MODEL, cache(method), chunk(0), method=method)
    after = COMPRESS(MODEL, state, np.array([True, False]), method=method)
    other = lambda cache: jax.tree.leaves(select(cache, np.array([1])))
    for a, b in zip(other(state), other(after), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(reset(after, np.array([True, True])).accumulated_attention).any()


def test_files_hold_the_accumulated_attention(tmp_path):
    method = METHODS["h2o"]
    state, _ = READ(MODEL, cache(method), chunk(0), method=method)
    files.save(state, tmp_path / "m", MODEL, fingerprints={"base": "x"}, method=method)
    loaded = files.load(tmp_path / "m", MODEL, fingerprints={"base": "x"}, method=method)
    live = np.asarray(state.slots.live)
    ours, theirs = (np.asarray(x.accumulated_attention)[:, live] for x in (loaded, state))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match="differ in eviction"):
        files.load(tmp_path / "m", MODEL, fingerprints={"base": "x"}, method=METHODS["norm"])


@pytest.mark.parametrize("name", ["concat_n2_sink", "full", "h2o"])
def test_scores_by_the_recurrence(name):
    """In batches of padded rows: what the parallel forward says, or the plain recurrence where there is none."""
    method = METHODS.get(name) or cases.METHODS[name]
    model = cases.model(tokens=method.num_embeddings)
    examples = [*cases.sessions(), *cases.sessions(((3, 2, 2), (9, 4)), seed=4)]
    ours = score_recurrently(model, method, examples, rows=2)
    logits = (recurrent_logits if method.recurrent_only else parallel_logits)(model, method, examples)
    for example, (nll, hit), rows in zip(examples, ours, logits, strict=True):
        segments = arrange(method, example)
        scored = np.concatenate([s.scored for s in segments])[1:]
        targets = np.concatenate([s.tokens for s in segments])[1:][scored]
        chosen = np.asarray(jax.nn.log_softmax(rows))[np.arange(len(targets)), targets]
        np.testing.assert_allclose(nll, -chosen, atol=1e-5)
        assert (hit == (rows.argmax(1) == targets)).all()


def test_there_is_no_parallel_form():
    with pytest.raises(UserError, match="no parallel form"):
        batch(METHODS["norm"], cases.sessions(), Sizes(40, 10, 40), cases.VOCAB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(slots=0), "slots is 0"),
        (dict(score="luck"), "score is 'luck'; allowed: attention, norm, similarity, random"),
        (dict(score="norm", discount=0.5), "only score 'attention' has one"),
        (dict(discount=1.5), "discount is 1.5; it must lie between 0 and 1"),
        (dict(score="norm", seed=3), "seed is 3, but score is 'norm'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        build("evict", **options)
