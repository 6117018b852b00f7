"""Two memories as one: what reading one conversation after the other gives, or a refusal."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jax_ccm import convert
from jax_ccm.errors import UserError
from jax_ccm.memory import files, steps
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.merging import merge
from jax_ccm.methods import build
from jax_ccm.rules.types import Chunk, Kind
from tests import cases
from tests.memory.test_files import alive

MODEL = cases.model(tokens=2)
STEP = jax.jit(steps.compress_step, static_argnames="method")
NAMES = dict(fingerprints={"base": "b"})


def read(method, seeds, cache=None):
    """Two sessions that have read chunks of the same lengths, the second one chunk less at first."""
    cache = init_cache(MODEL, method, 2, memory_capacity=12, raw_capacity=6) if cache is None else cache
    for seed in seeds:
        rng = np.random.default_rng(seed)
        valid = np.array([[True] * 5, [seed > 0] * 5]) & (np.arange(5) < 3 + seed % 3)
        cache = STEP(MODEL, cache, Chunk(rng.integers(5, 90, (2, 5)).astype(np.int32), valid), method=method)
    return cache


def held(cache, path, method):
    files.save(cache, path, MODEL, **NAMES, method=method)
    return files.read(path)


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge"])
def test_as_if_read_one_after_the_other(name, tmp_path):
    """Where chunks are independent of each other, number by number; sessions of different lengths, too."""
    method = build(name, comp_tokens=2, independent=True)
    both = merge(*(held(read(method, seeds), tmp_path / str(seeds), method) for seeds in ((0, 1), (2, 3, 4))))
    convert.main([str(tmp_path / "(0, 1)"), str(tmp_path / "both.ccm"), "--merge", str(tmp_path / "(2, 3, 4)")])
    assert files.read(tmp_path / "both.ccm").header["about"]["merged"] == both.header["about"]["merged"]
    loaded = files.load(tmp_path / "both.ccm", MODEL, **NAMES, method=method, memory_capacity=12)
    expected = read(method, (2, 3, 4), read(method, (0, 1)))
    for ours, theirs in zip(jax.tree.leaves(alive(loaded)), jax.tree.leaves(alive(expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_room_is_that_of_a_session(tmp_path):
    """Not that of all sessions together, which would be asked for in each."""
    method = build("ccm_concat", comp_tokens=2, independent=True)
    parts = [held(read(method, seeds), tmp_path / str(seeds), method) for seeds in ((0, 1, 2, 3), (4, 5, 6, 7))]
    both = merge(*parts)
    # The second session has closed its first, empty chunk nowhere.
    assert [int((both.arrays["kind"][both.of(row)] == Kind.MEMORY).sum()) for row in (0, 1)] == [16, 14]
    assert both.header["memory_capacity"] == 16


@pytest.mark.once
def test_a_system_message_is_not_lost(tmp_path):
    method = build("ccm_concat", comp_tokens=2, sink=True)

    def begun(name, tokens):
        start = Chunk(np.array([tokens, tokens]), np.ones((2, len(tokens)), bool), np.ones((2, len(tokens)), bool))
        cache = init_cache(MODEL, method, 2, memory_capacity=12, raw_capacity=24)
        cache, _ = steps.read(MODEL, cache, start, method=method)
        chunk = Chunk(np.full((2, 4), 7), np.ones((2, 4), bool))
        return held(steps.compress_step(MODEL, cache, chunk, method=method), tmp_path / name, method)

    brief, long, plain = begun("brief", [5, 6, 7]), begun("long", [5, 8, 9]), begun("plain", [5])
    for first, second in ((brief, begun("again", [5, 6, 7])), (brief, plain)):
        kinds = merge(first, second).arrays["kind"]
        assert (kinds == Kind.SINK).sum() == 6 and (kinds == Kind.MEMORY).sum() == 8
    for first, second in ((brief, long), (plain, brief)):
        with pytest.raises(UserError, match="begins with a system message that .* does not begin with"):
            merge(first, second)


@pytest.mark.once
def test_what_cannot_be_merged(tmp_path):
    concat = build("ccm_concat", comp_tokens=2)
    one = held(read(concat, (1,)), tmp_path / "one", concat)
    for other, message in (
        (build("ccm_ema", comp_tokens=2), "by when they were read"),
        (build("ccm_merge", comp_tokens=2, groups=2), "into several means in turn"),
        (build("evict", slots=2), "selects"),
    ):
        file = held(read(other, (1,)), tmp_path / "other", other)
        with pytest.raises(UserError, match=message):
            merge(file, file)
        with pytest.raises(UserError, match="differ in method"):
            merge(one, file)
    chunk = Chunk(np.ones((2, 2), np.int32), np.ones((2, 2), bool))
    raw = held(steps.read(MODEL, read(concat, (1,)), chunk, method=concat)[0], tmp_path / "open", concat)
    with pytest.raises(UserError, match="open holds 4 tokens as text, of which 4 are .* open.*save it again"):
        merge(one, raw)
    recent = build("ccm_concat", comp_tokens=2, recent=1)
    raw = held(read(recent, (1,)), tmp_path / "recent", recent)
    with pytest.raises(UserError, match="recent holds .* keeps until the next is closed, .*`tell`"):
        merge(raw, raw)
