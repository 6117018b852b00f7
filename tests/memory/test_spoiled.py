"""Numbers that are not finite make a session invalid, say so, and touch no other session."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.cache import check, init_cache, reset, select
from jax_ccm.memory.generation import generate
from jax_ccm.rules.types import Chunk
from tests import cases

MODEL = cases.model(tokens=2, num_layers=1)
TABLE = cases.METHODS | cases.RECURRENT
CONCAT = cases.METHODS["concat_n2_sink"]
READ = jax.jit(steps.read, static_argnames=("method", "query"))
COMPRESS = jax.jit(steps.compress, static_argnames="method")
BAD = 7  # the token whose embedding is spoilt


def spoilt(row: int = BAD, model=MODEL, table=MODEL.embed_tokens.embedding[...].shape):
    """The model with a number that is not finite in row ``row`` of the table of that shape."""
    return jax.tree.map(lambda x: x.at[row, 0].set(jnp.nan) if x.shape == table else x, model)


def read(model, method, tokens=None, cache=None, query=False):
    """Three sessions that have read six tokens each."""
    if cache is None:
        cache = init_cache(model, method, 3, memory_capacity=8, raw_capacity=24)
    tokens = np.random.default_rng(0).integers(10, 90, (3, 6)) if tokens is None else tokens
    return READ(model, cache, Chunk(tokens.astype(np.int32), np.ones((3, 6), bool)), method=method, query=query)[0]


def rows(cache, *numbers):
    return select(cache, np.array(numbers))


@pytest.mark.parametrize("name", ["concat_n2_sink", "scattered", "evict"])
def test_a_read_that_is_not_finite_spoils_its_session(name):
    """Wherever in the text, and for good; the memory stays clean, the others are as they are without it."""
    method, model = TABLE[name], spoilt()
    before = read(model, method)
    tokens = np.random.default_rng(1).integers(10, 90, (3, 6))
    good = read(model, method, tokens, before)
    tokens[0, 0] = tokens[2, 5] = BAD
    bad = read(model, method, tokens, before)
    assert bad.spoiled.tolist() == [True, False, True] and not good.spoiled.any()
    with pytest.raises(UserError, match=r"sessions \[0, 2\] are spoiled: .*not finite.*cache.reset") as said:
        check(bad)
    assert "capacity" not in str(said.value)
    chex.assert_trees_all_equal(rows(bad, 1), rows(good, 1))
    for field in ("k", "v", "slots", "accumulated_attention"):
        chex.assert_trees_all_equal(getattr(rows(bad, 0, 2), field), getattr(rows(before, 0, 2), field))
    assert np.isnan(bad.logits).any(axis=1).tolist()[2]
    later = COMPRESS(model, read(model, method, cache=bad), method=method)
    assert later.spoiled.tolist() == [True, False, True]
    anew = read(model, method, cache=reset(later, later.spoiled))
    check(anew)


@pytest.mark.parametrize("name", ["concat_n2_sink", "merge_n2_sink", "loma", "sentinel"])
def test_closing_tokens_that_are_not_finite(name):
    method = TABLE[name]
    model = spoilt(table=MODEL.embed_tokens.comp[...].shape, row=0)
    before = read(MODEL, method)
    after = COMPRESS(model, before, np.array([True, False, True]), method=method)
    assert after.spoiled.tolist() == [True, False, True]
    chex.assert_trees_all_equal(rows(after, 1), rows(before, 1))
    with pytest.raises(UserError, match=r"sessions \[0, 2\] are spoiled"):
        check(after)


@pytest.mark.parametrize("name", ["evict_norm_constant", "compressive_now_sink", "concat_n2_sink"])
def test_closing_what_is_not_finite(name):
    """Entries that are written without running a token are looked at, too."""
    method = TABLE[name]
    cache = read(MODEL, method)
    cache = dataclasses.replace(cache, v=cache.v.at[:, 1, :6].set(jnp.inf))
    assert COMPRESS(MODEL, cache, method=method).spoiled.tolist() == [False, True, False]


def test_nothing_is_drawn_from_what_is_not_finite():
    """Generation refuses a spoiled session and stops one that becomes so; the others go on."""
    prompt = read(MODEL, CONCAT, query=True)
    _, tokens, _ = generate(MODEL, prompt, method=CONCAT, max_tokens=3)
    drawn = int(tokens[1, 1])
    assert (np.asarray(tokens) == drawn).any(axis=1).tolist() == [False, True, False]
    with pytest.raises(UserError, match=r"sessions \[1\] are spoiled"):
        generate(spoilt(drawn), prompt, method=CONCAT, max_tokens=3)
    others = np.array([True, False, True])
    broken = dataclasses.replace(prompt, spoiled=~others)
    with pytest.raises(UserError, match=r"sessions \[1\] are spoiled"):
        generate(MODEL, broken, method=CONCAT, max_tokens=3)
    _, again, lengths = generate(MODEL, broken, method=CONCAT, max_tokens=3, rows=others)
    assert np.array_equal(np.asarray(again)[others], np.asarray(tokens)[others]) and lengths.tolist() == [3, 0, 3]


def test_a_head_that_is_not_finite():
    """Hidden states are in order and only the logits are not."""
    model = spoilt(table=MODEL.lm_head.kernel[...].shape)
    with pytest.raises(UserError, match=r"sessions \[0, 1, 2\] are spoiled"):
        generate(model, read(model, CONCAT, query=True), method=CONCAT, max_tokens=3)
