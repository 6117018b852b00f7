"""The cache: eviction, forks, resets."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory import steps, writing
from jax_ccm.memory.cache import append, check, init_cache, reset, select
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, Transformer
from jax_ccm.rules.types import Chunk, Kind, Slots
from tests import cases

MODEL = cases.model(tokens=2)
CONCAT = build("ccm_concat", comp_tokens=2, sink=True)
STEP = jax.jit(steps.compress_step, static_argnames="method")
APPEND = jax.jit(append)
READ = jax.jit(steps.read, static_argnames=("method", "query"))


def chunk(seed: int, batch: int = 2, size: int = 4) -> Chunk:
    rng = np.random.default_rng(seed)
    return Chunk(rng.integers(5, 90, (batch, size)).astype(np.int32), np.ones((batch, size), bool))


def cache(method=CONCAT, **options):
    options = {"memory_capacity": 6, "raw_capacity": 8, **options}
    return init_cache(MODEL, method, 2, **options)


def test_eviction_drops_the_oldest():
    """With overflow="evict" the newest chunks stay, bit for bit, and the sink with them."""
    evicting, roomy = cache(overflow="evict"), cache(memory_capacity=12)
    for i in range(5):
        evicting, roomy = (STEP(MODEL, c, chunk(i), method=CONCAT) for c in (evicting, roomy))
        if i < 3:
            assert (evicting.slots.kind[0] == Kind.MEMORY).sum() == 2 * (i + 1)
    check(evicting)
    segments = np.asarray(evicting.slots.segment[0])[np.asarray(evicting.slots.live[0])]
    assert segments.tolist() == [0, 2, 2, 3, 3, 4, 4]
    assert evicting.slots.kind[0, 0] == Kind.SINK
    # Until the first eviction both hold the same.
    assert np.array_equal(evicting.k[:, :, 0], roomy.k[:, :, 0])


def test_overflow_is_an_error():
    full = cache(memory_capacity=4)
    for i in range(2):
        full = STEP(MODEL, full, chunk(i), method=CONCAT)
    check(full)
    full = STEP(MODEL, full, chunk(2), method=CONCAT)
    with pytest.raises(UserError, match=r"sessions \[0, 1\] needed \[2, 2\] more slots"):
        check(full)
    # Who is not asked for may be invalid.
    check(full, np.zeros(2, bool))


@pytest.mark.parametrize(
    "name", ["concat_n2_sink", "merge_n2_sink", "ema_n1", "loma", "compressive_now_sink", "evict_norm_constant"]
)
def test_what_need_not_move_stays(name):
    """Closing changes a cache in place where it can ("error"), and gives what moving every entry ("evict") gives."""
    method, rng = (cases.METHODS | cases.RECURRENT)[name], np.random.default_rng(0)
    write = jax.jit(writing.write, static_argnums=1, static_argnames="whole")
    caches = [cache(method, memory_capacity=18, raw_capacity=24, overflow=overflow) for overflow in ("error", "evict")]
    count = method.memory_slots(1, 4)
    for step, closing in enumerate([(True, True), (True, False), (False, True), (True, True)]):
        lengths = np.asarray([3 + step, 5 - step])
        place = np.arange(6)[None] + np.asarray(caches[0].tokens)[:, None]
        layers, rows, _, *head = caches[0].k.shape
        text, entries = (
            jnp.asarray(rng.normal(size=(2, layers, rows, size, *head)), jnp.float32) for size in (6, count)
        )
        kind = np.where(place < method.sink, Kind.SINK, Kind.TEXT)
        kind = np.where(np.arange(6) < lengths[:, None], kind, Kind.PAD)
        for i, old in enumerate(caches):
            segment = np.broadcast_to(old.chunks[:, None], kind.shape)
            full = APPEND(old, *text, Slots(kind, segment, place, place))
            full = dataclasses.replace(full, tokens=old.tokens + lengths)
            closes = jnp.asarray(closing)
            of_entries = lambda x, old=old: jnp.broadcast_to(jnp.asarray(x)[:, None], (2, count))
            kinds = of_entries(jnp.where(closes, Kind.MEMORY, Kind.PAD))
            last = of_entries(full.tokens - 1)
            slots = Slots(kinds, of_entries(old.chunks), last, last)
            caches[i] = write(full, method, *entries, slots, closes, whole=True)
        chex.assert_trees_all_equal(*(dataclasses.replace(c, overflow="error") for c in caches))
    assert caches[0].chunks.tolist() == [3, 3] and not caches[0].lost.any()


def test_methods_that_see_old_text_move_it():
    move = {name for name, method in cases.METHODS.items() if method.remembers and not method.forgets_text}
    recent = {name for name, method in cases.METHODS.items() if method.recent}
    # Of several mixtures the oldest state leaves from among the others.
    others = {"compressive", "compressive_segments", "loma_causal_sink"}
    others |= {"sentinel", "sentinel_history", "sentinel_start"}
    others |= {name for name, method in cases.METHODS.items() if method.groups > 1}
    assert move == others | recent


def test_forked_and_reset_rows():
    state = STEP(MODEL, cache(), chunk(0), method=CONCAT)
    forked = select(state, jnp.array([1, 0, 1]))
    row = lambda c, b: select(c, jnp.array([b]))
    chex.assert_trees_all_equal(row(forked, 0), row(state, 1))
    chex.assert_trees_all_equal(row(forked, 1), row(state, 0))
    chex.assert_trees_all_equal(row(forked, 2), row(state, 1))
    cleared = reset(state, jnp.array([True, False]))
    chex.assert_trees_all_equal(row(cleared, 0), row(cache(), 0))
    chex.assert_trees_all_equal(row(cleared, 1), row(state, 1))
    # A session that was reset goes on as a new one does.
    again = STEP(MODEL, cleared, chunk(0), method=CONCAT)
    np.testing.assert_allclose(again.k[:, 0], state.k[:, 0], atol=1e-6)


def test_rows_that_do_not_exist():
    """Refused where they are known; under jit they give empty sessions, and nobody else's memory."""
    state = STEP(MODEL, cache(), chunk(0), method=CONCAT)
    for rows, message in (
        ([0, 2], "no session 2; the cache has 2, numbered from 0 to 1"),
        ([-1], "no session -1"),
        ([True, False], r"rows are bool \[2\]; give the numbers"),
        ([[0]], r"int64 \[1, 1\]"),
        ([0.0], r"float64 \[1\]"),
    ):
        with pytest.raises(UserError, match=message):
            select(state, np.asarray(rows))
    found = jax.jit(select)(state, jnp.array([1, 2, -1]))
    row = lambda c, b: select(c, np.array([b]))
    chex.assert_trees_all_equal(row(found, 0), row(state, 1))
    for b in (1, 2):
        chex.assert_trees_all_equal(row(found, b), row(cache(), 0))


@pytest.mark.parametrize("rows", [[0], [True], [[True, False]], [1, 0]], ids=str)
def test_reset_takes_a_bool_for_each_session(rows):
    for call in (reset, jax.jit(reset)):
        with pytest.raises(UserError, match="give a bool for each of the 2 sessions"):
            call(cache(), jnp.asarray(rows))


def test_rows_compress_when_they_want():
    """Rows that do not compress keep their raw text; later they compress all of it as one chunk."""
    state, _ = READ(MODEL, cache(), chunk(0), method=CONCAT)
    compress = jax.jit(steps.compress, static_argnames="method")
    state = compress(MODEL, state, jnp.array([True, False]), method=CONCAT)
    assert np.asarray(state.chunks).tolist() == [1, 0]
    assert np.asarray((state.slots.kind == Kind.TEXT).sum(1)).tolist() == [0, 3]
    state, _ = READ(MODEL, state, chunk(1), method=CONCAT)
    state = compress(MODEL, state, method=CONCAT)
    assert np.asarray((state.slots.kind == Kind.MEMORY).sum(1)).tolist() == [4, 2]
    both = Chunk(*(np.concatenate([getattr(chunk(i), f) for i in (0, 1)], 1) for f in ("tokens", "valid")))
    alone = STEP(MODEL, cache(), both, method=CONCAT)
    np.testing.assert_allclose(alone.k[:, 1], state.k[:, 1], atol=1e-5)


def test_bad_sizes():
    with pytest.raises(UserError, match="writes 2 slots for a chunk"):
        cache(memory_capacity=1)
    with pytest.raises(UserError, match="raw_capacity is 0"):
        cache(raw_capacity=0)
    with pytest.raises(UserError, match="allowed: 'error'"):
        cache(overflow="drop")
    with pytest.raises(UserError, match="cannot|too small|writes"):
        init_cache(MODEL, build("ccm_merge", comp_tokens=4), 1, memory_capacity=3, raw_capacity=4)


def test_a_cache_is_of_the_models_type():
    """Nobody has to say it; with a config alone it is that of a model made from it."""
    half = Transformer(jax.random.key(0), cases.CONFIG, AdapterConfig(tokens=2), jnp.bfloat16)
    sizes = dict(memory_capacity=6, raw_capacity=8)
    state = init_cache(half, CONCAT, 2, **sizes)
    assert state.k.dtype == state.v.dtype == jnp.bfloat16
    chunks = jax.tree.map(lambda x: np.stack([x, x]), chunk(0))
    check(steps.compress_scan(half, state, chunks, method=CONCAT))
    assert init_cache(half, CONCAT, 2, **sizes, dtype=jnp.float32).k.dtype == jnp.float32
    assert init_cache(half.config, CONCAT, 2, **sizes, dtype="bfloat16").k.dtype == jnp.bfloat16
    alone, made = (init_cache(x, CONCAT, 2, **sizes) for x in (cases.CONFIG, cases.model(tokens=2)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), alone) == jax.tree.map(lambda x: (x.shape, x.dtype), made)


def test_window_keeps_the_newest():
    """A sliding window drops raw text that it hides when chunks are closed."""
    window = build("window", size=5)
    state = init_cache(MODEL, window, 2, memory_capacity=0, raw_capacity=8)
    for i in range(4):
        state = STEP(MODEL, state, chunk(i), method=window)
    check(state)
    live = np.asarray(state.slots.live[0])
    assert np.asarray(state.slots.position[0])[live].tolist() == [12, 13, 14, 15]
