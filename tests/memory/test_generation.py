"""Generation: greedy equals step by step, rows stop at different times, sampling has the right distribution."""

from __future__ import annotations

import dataclasses
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.cache import init_cache, select
from jax_ccm.memory.generation import TOP, Draws, Sampling, _loop, for_decoding, generate, sample
from jax_ccm.methods import build
from jax_ccm.nn import positions
from jax_ccm.rules.types import Chunk
from tests import cases

MODEL = cases.model(tokens=2)
METHOD = build("ccm_concat", comp_tokens=2)
READ = jax.jit(steps.read, static_argnames=("method", "query"))


def prompt(batch: int = 3):
    """Sessions of different ages that have read something."""
    state = init_cache(MODEL, METHOD, batch, memory_capacity=8, raw_capacity=24)
    rng = np.random.default_rng(0)
    step = jax.jit(steps.compress_step, static_argnames="method")
    for _ in range(2):
        lengths = rng.integers(0, 6, batch)
        text = Chunk(rng.integers(5, 90, (batch, 6)).astype(np.int32), np.arange(6) < lengths[:, None])
        state = step(MODEL, state, text, method=METHOD)
    text = Chunk(rng.integers(5, 90, (batch, 6)).astype(np.int32), np.arange(6) < np.array([[3], [6], [1]]))
    return READ(MODEL, state, text, method=METHOD, query=True)[0]


def by_hand(state, count):
    tokens = []
    for _ in range(count):
        token = np.asarray(state.logits).argmax(-1).astype(np.int32)
        tokens.append(token)
        state, _ = READ(MODEL, state, Chunk(token[:, None], np.ones((len(token), 1), bool)), method=METHOD, query=True)
    return np.stack(tokens, 1), state


def test_greedy_is_step_by_step():
    tokens, state = by_hand(prompt(), 8)
    cache, ours, lengths = generate(MODEL, prompt(), method=METHOD, max_tokens=8)
    assert np.array_equal(ours, tokens) and np.asarray(lengths).tolist() == [8] * 3
    chex.assert_trees_all_close(cache, state, atol=1e-5)
    # The whole reply is in the session, so compressing closes it with the turn.
    closed = steps.compress(MODEL, cache, method=METHOD)
    assert np.asarray(closed.chunks - cache.chunks).tolist() == [1] * 3


def test_layers_apart_make_the_same_tokens():
    """And close and are read with gates as before; the decoder itself stays as it was."""
    decoder = MODEL.unstacked()
    assert len(decoder.layers) == cases.CONFIG.num_layers and not hasattr(MODEL.layers, "__len__")
    cache, tokens, _ = generate(MODEL, prompt(), method=METHOD, max_tokens=6)
    ours, same, _ = generate(decoder, prompt(), method=METHOD, max_tokens=6)
    assert np.array_equal(same, tokens)
    chex.assert_trees_all_close(ours, cache, atol=1e-5)
    close = jax.jit(steps.compress, static_argnames="method")
    chex.assert_trees_all_close(close(decoder, ours, method=METHOD), close(MODEL, cache, method=METHOD), atol=1e-5)


def test_what_is_not_a_number_is_not_kept():
    table = MODEL.embed_tokens.embedding[...].shape
    poison = jax.tree.map(lambda x: x.at[7].set(jnp.nan) if x.shape == table else x, MODEL)
    before = prompt()
    text = Chunk(
        np.asarray([[7, 5, 5, 5, 5, 5], [9, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 7]], np.int32), np.ones((3, 6), bool)
    )
    after, _ = READ(poison, before, text, method=METHOD, query=True)
    count = lambda cache: np.asarray(cache.slots.live.sum(axis=1))
    assert (count(after) - count(before)).tolist() == [0, 6, 0] and np.isfinite(after.k).all()
    assert np.isnan(after.logits).all(axis=1).tolist() == [True, False, True]


def test_no_copy_of_the_cache_for_a_token():
    """What the loop of a decoder with layers apart needs on a CPU is less than a copy of a large cache."""
    cache = init_cache(MODEL, METHOD, 2, memory_capacity=2000, raw_capacity=3000)
    none, keys = jnp.zeros(2, jnp.int32), jax.random.split(jax.random.key(0))
    draws = Draws(keys, jnp.zeros(2), none, jnp.ones(2), none, none + 4, jnp.zeros(2, bool), jnp.asarray([-1]))
    static = dict(method=METHOD, max_tokens=4, closing=None, query=True, vocabulary=None)
    program = _loop.lower(MODEL.unstacked(), cache, draws, **static).compile()
    assert program.memory_analysis().temp_size_in_bytes < cache.k.nbytes


def test_layers_are_taken_apart_where_that_pays(monkeypatch):
    """On a CPU: if they are not too large to be copied, and the cache is small beside them."""
    sizes = dict(memory_capacity=4, raw_capacity=4)
    small, large = (init_cache(MODEL, METHOD, batch, **sizes) for batch in (1, 500))
    assert len(for_decoding(MODEL, small).layers) == cases.CONFIG.num_layers
    assert for_decoding(MODEL, large) is MODEL
    monkeypatch.setattr(sys.modules[generate.__module__], "UNSTACKED_BYTES", 1000)
    assert for_decoding(MODEL, small) is MODEL


def test_rows_stop_at_different_times():
    tokens, _ = by_hand(prompt(), 8)
    stops = [int(tokens[0, 2]), int(tokens[1, 5])]
    first = [int(np.flatnonzero(np.isin(row, stops))[0]) if np.isin(row, stops).any() else 8 for row in tokens]
    cache, ours, lengths = generate(MODEL, prompt(), method=METHOD, max_tokens=8, stop_tokens=stops)
    assert np.asarray(lengths).tolist() == first
    for row, expected, count in zip(np.asarray(ours), tokens, first, strict=True):
        assert row[:count].tolist() == expected[:count].tolist() and not row[count:].any()
    assert np.asarray(cache.tokens - prompt().tokens).tolist() == first, "stop tokens are not read into the session"


def test_rows_left_alone():
    before = prompt()
    cache, tokens, lengths = generate(MODEL, before, method=METHOD, max_tokens=4, rows=[True, False, True])
    assert np.asarray(lengths).tolist() == [4, 0, 4] and not np.asarray(tokens)[1].any()
    row = lambda c: select(c, jnp.array([1]))
    chex.assert_trees_all_equal(row(cache), row(before))


def test_compiled_once():
    """Other temperatures, limits of k and p, seeds and stop tokens compile nothing."""
    generate(MODEL, prompt(), method=METHOD, max_tokens=4, stop_tokens=[1])
    before = _loop._cache_size()
    for i in range(3):
        sampling = Sampling(temperature=0.5 + i, top_k=i, top_p=0.5)
        generate(MODEL, prompt(), jax.random.key(i), method=METHOD, max_tokens=4, sampling=sampling, stop_tokens=[i])
    assert _loop._cache_size() == before


def test_tokens_that_the_tokenizer_does_not_know():
    """Rows of the head beyond the vocabulary are never drawn, however likely (S12); nor are compression tokens."""
    state = prompt()
    assert state.logits.shape[1] == cases.VOCAB
    boost = jnp.where(jnp.arange(cases.VOCAB) == cases.VOCAB - 1, 100.0, 0.0)
    state = dataclasses.replace(state, logits=state.logits + boost)
    for vocabulary, most in ((None, cases.VOCAB - 1), (cases.VOCAB - 1, cases.VOCAB - 2)):
        _, tokens, _ = generate(MODEL, state, method=METHOD, max_tokens=1, vocabulary=vocabulary)
        assert (np.asarray(tokens) <= most).all() and (np.asarray(tokens) == cases.VOCAB - 1).all() == (not vocabulary)


def test_sampling():
    """Frequencies follow the softmax; top-k and top-p keep just the tokens they name."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    many, keys = jnp.repeat(logits, 20_000, axis=0), jax.random.split(jax.random.key(0), 20_000)
    share = lambda *a: np.bincount(np.asarray(sample(keys, many, *map(jnp.asarray, a))), minlength=4) / 20_000
    np.testing.assert_allclose(share(1.0, 0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    np.testing.assert_allclose(share(1.0, 2, 1.0), [0.625, 0.375, 0, 0], atol=0.02)
    np.testing.assert_allclose(share(1.0, 0, 0.7), [0.625, 0.375, 0, 0], atol=0.02)
    # Within the two that top-k leaves the first has five eighths of the mass, half of it in all.
    np.testing.assert_allclose(share(1.0, 2, 0.6), [1, 0, 0, 0])
    np.testing.assert_allclose(share(1.0, 0, 0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(share(0.0, 0, 1.0), [1, 0, 0, 0])
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(share(0.5, 0, 1.0), squared / squared.sum(), atol=0.02)


def test_same_key_same_text():
    sampling = Sampling(temperature=1.0)
    run = lambda seed: np.asarray(
        generate(MODEL, prompt(), jax.random.key(seed), method=METHOD, max_tokens=8, sampling=sampling)[1]
    )
    assert np.array_equal(run(0), run(0)) and not np.array_equal(run(0), run(1))
    # Keys of the old kind are arrays of numbers.
    for key in (jax.random.PRNGKey(0), jax.random.split(jax.random.PRNGKey(0), 3)):
        old = generate(MODEL, prompt(), key, method=METHOD, max_tokens=8, sampling=sampling)[1]
        assert np.array_equal(old, run(0))


def test_each_row_draws_for_itself():
    """Rows with settings of their own draw what they draw alone; in pieces, too."""
    how = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=5)]
    keys = jax.random.split(jax.random.key(3), 3)
    run = lambda cache, **options: generate(MODEL, cache, keys, method=METHOD, **options)[:2]
    _, together = run(prompt(), max_tokens=4, sampling=how)
    for row, sampling in enumerate(how):
        _, alone = run(prompt(), max_tokens=4, sampling=sampling)
        np.testing.assert_array_equal(together[row], alone[row])
    assert not np.array_equal(together[1], run(prompt(), max_tokens=4)[1][1])
    cache, first = run(prompt(), max_tokens=2, sampling=how)
    _, last = run(cache, max_tokens=2, sampling=how, start=2)
    np.testing.assert_array_equal(np.concatenate([first, last], axis=1), together)
    with pytest.raises(UserError, match="2 samplings for 3 sessions"):
        run(prompt(), max_tokens=2, sampling=how[:2])


def test_rows_have_limits_of_their_own_and_tell_how_likely_their_tokens_were():
    """One program: as the same rows one by one, with the log-softmax of the logits that each token was drawn from."""
    limit = np.asarray([3, 0, 5], np.int32)
    none, keys = np.zeros(3, np.int32), jax.random.split(jax.random.key(0), 3)
    draws = Draws(keys, np.zeros(3, np.float32), none, np.ones(3, np.float32), none, limit, limit > 3, none[:1] - 1)
    static = dict(method=METHOD, max_tokens=6, closing=None, query=True, vocabulary=None)
    cache, drawn = _loop(MODEL, prompt(), draws, **static)
    tokens = by_hand(prompt(), 5)[0]
    assert drawn.lengths.tolist() == limit.tolist() and not np.asarray(drawn.logprobs[:2]).any()
    for number, count in enumerate(limit):
        assert drawn.tokens[number].tolist() == [*tokens[number, :count].tolist(), *[0] * (6 - count)]
    assert (cache.tokens - prompt().tokens).tolist() == limit.tolist()
    before = [by_hand(prompt(), count)[1] if count else prompt() for count in range(5)]
    expected = np.asarray(jax.nn.log_softmax(jnp.stack([state.logits[2] for state in before]), axis=-1))
    np.testing.assert_allclose(drawn.top_logprobs[2, :5], -np.sort(-expected)[:, :TOP], atol=1e-5)
    np.testing.assert_allclose(drawn.logprobs[2, :5], expected.max(axis=1), atol=1e-5)
    assert drawn.top_tokens[2, :5, 0].tolist() == tokens[2].tolist() and not np.asarray(drawn.logprobs[2, 5:]).any()


def test_bad_input():
    with pytest.raises(UserError, match="needs a PRNG key"):
        generate(MODEL, prompt(), method=METHOD, max_tokens=2, sampling=Sampling(temperature=1.0))
    fresh = init_cache(MODEL, METHOD, 2, memory_capacity=8, raw_capacity=8)
    with pytest.raises(UserError, match=r"sessions \[0, 1\] have read nothing"):
        generate(MODEL, fresh, method=METHOD, max_tokens=2)
    with pytest.raises(UserError, match="larger raw_capacity"):
        generate(MODEL, prompt(), method=METHOD, max_tokens=30)
    nan, inf = float("nan"), float("inf")
    for bad in (dict(temperature=-1), dict(temperature=nan), dict(temperature=inf), dict(top_k=-1), dict(top_p=0.0),
                dict(top_p=1.5), dict(top_p=nan)):  # fmt: skip
        with pytest.raises(UserError, match="must be numbers from 0 on"):
            Sampling(**bad)


def test_positions_beyond_the_trained_ones_are_warned_of_once(monkeypatch):
    monkeypatch.setattr(positions, "_told", set())
    model = cases.model(tokens=2, config=dataclasses.replace(cases.CONFIG, max_position=18))
    cache = prompt()
    generate(model, cache, method=METHOD, max_tokens=1)
    most = int(cache.tokens.max())
    with pytest.warns(UserWarning, match=f"a session of {most + 8} tokens goes beyond the 18 positions"):
        generate(model, cache, method=METHOD, max_tokens=8)
    generate(model, cache, method=METHOD, max_tokens=8)
    # Where positions are indices in the cache, its size is what counts.
    streaming = build("ccm_concat", comp_tokens=2, streaming=True)
    positions.warn_beyond(model.config, streaming, tokens=1000, slots=18)
    monkeypatch.setattr(positions, "_told", set())
    with pytest.warns(UserWarning, match="a cache of 32 slots goes beyond"):
        positions.warn_beyond(model.config, streaming, tokens=1000, slots=32)
