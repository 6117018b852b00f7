"""Sessions that go on for ever stay within the positions that the base was trained for."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory import files, merging, steps
from jax_ccm.memory.cache import check, init_cache, select
from jax_ccm.memory.rebasing import rebased
from jax_ccm.methods import build
from jax_ccm.nn import RopeScaling, rope
from jax_ccm.rules.types import Chunk, Kind
from tests import cases

# 24 chunks of 3 to 5 tokens go far beyond these.
POSITIONS = 40
METHODS = {
    "concat": build("ccm_concat", comp_tokens=2),
    "stride": build("ccm_concat", comp_tokens=3, ratio=2, positions="stride", sight="share", start="mean"),
    "recent": build("ccm_concat", comp_tokens=2, recent=1),
    "merge": build("ccm_merge", comp_tokens=2),
    "loma": dataclasses.replace(build("loma", memory_tokens=2, repeat=False), chunk=None),
    "evict": build("evict", score="attention", slots=2, sink=False),
    "compressive": cases.METHODS["compressive"],
}
STEP = jax.jit(steps.compress_step, static_argnames="method")
READ = jax.jit(steps.read, static_argnames="method")


def chunk(seed: int) -> Chunk:
    rng = np.random.default_rng(seed)
    # The first row is read from the start, the second from the fifth chunk on, and lengths differ.
    lengths = np.array([3 + seed % 3, (5 - seed % 3) * (seed > 4)])
    return Chunk(rng.integers(5, 90, (2, 5)).astype(np.int32), np.arange(5) < lengths[:, None])


def empty(model, method, overflow="evict"):
    return init_cache(model, method, 2, memory_capacity=6, raw_capacity=12, overflow=overflow)


@pytest.mark.parametrize("name", METHODS)
def test_a_session_does_not_notice(name):
    """Without a sink nothing is further away or nearer: numbers are those of positions that run on."""
    method = METHODS[name]
    model = cases.model(tokens=6, max_position=POSITIONS)
    endless = cases.model(tokens=6, max_position=10_000)
    ours, theirs = empty(model, method), empty(endless, method)
    for number in range(24):
        ours = STEP(model, ours, chunk(number), method=method)
        theirs = STEP(endless, theirs, chunk(number), method=method)
        # What a policy selects may be old.
        assert int(ours.next_position.max()) <= POSITIONS or method.eviction is not None
        assert np.asarray(ours.slots.live).tolist() == np.asarray(theirs.slots.live).tolist()
        logits = [READ(m, c, chunk(99), method=method)[1] for m, c in ((model, ours), (endless, theirs))]
        chex.assert_trees_all_close(*logits, atol=1e-4)
    check(ours)
    assert ours.tokens.tolist() == theirs.tokens.tolist() == [96, 75] and int(ours.chunks[0]) == 24
    assert not theirs.rebased.any()
    if ours.mixed_k is not None:
        # Whole multiples of what is rounded stand beside the slots.
        live = (ours.slots.kind == Kind.MEMORY)[None, :, :, None, None]
        held = jnp.where(live, ours.k, 0)[:, :, : ours.mixed_k.shape[2]]
        chex.assert_trees_all_close(held, ours.mixed_k, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 3])
def test_the_sink_comes_nearer(kept):
    """As if its keys had been turned along to stand before the oldest entry; and once only, not at each chunk."""
    method = build("ccm_concat", comp_tokens=2, sink=True)
    model = cases.model(tokens=2, max_position=POSITIONS)
    cache = empty(model, method)
    if kept:
        first = chunk(0)
        first = dataclasses.replace(first, kept=first.valid & (np.arange(5) < kept))
        cache = STEP(model, cache, first, method=method)
    moved = []
    for number in range(1, 24):
        cache = STEP(model, cache, chunk(number), method=method)
        plain = rebased(dataclasses.replace(model.config, max_position=1), cache, method)
        gap = np.asarray(plain.rebased - cache.rebased)
        sink = np.asarray(cache.slots.kind == Kind.SINK)
        turned = dataclasses.replace(cache, k=rope.moved(model.config, cache.k, jnp.where(sink, gap[:, None], 0)))
        logits = [READ(model, c, chunk(99), method=method)[1] for c in (turned, plain)]
        chex.assert_trees_all_close(*logits, atol=1e-4)
        moved.append(gap[0])
        positions = np.asarray(plain.slots.position)
        live, sinks = np.asarray(plain.slots.live), sink.sum(1)
        for row in range(2):
            held = positions[row][live[row] & ~sink[row]]
            assert not len(held) or held.min() == sinks[row]
            assert positions[row][sink[row]].tolist() == list(range(sinks[row]))
    # The gap grows until positions would end, is closed, and grows again.
    falls = sum(later < earlier for earlier, later in zip(moved, moved[1:], strict=False))
    assert 2 <= falls <= 6 and max(moved) > 8


def test_a_file_goes_on(tmp_path):
    """Memories that were moved back are saved, loaded, and merged as if read one after the other."""
    method = METHODS["concat"]
    model = cases.model(tokens=6, max_position=POSITIONS)
    cache = empty(model, method)
    kept = dict(fingerprints={"base": "a"}, method=method)
    for number in range(12):
        if number == 5:
            files.save(select(cache, np.array([0])), tmp_path / "early.ccm", model, **kept)
        cache = STEP(model, cache, chunk(number), method=method)
    # What the early one holds, and behind it a conversation that was moved back, too.
    files.save(select(cache, np.array([0])), tmp_path / "late.ccm", model, **kept)
    late = files.load(tmp_path / "late.ccm", model, **kept)
    chex.assert_trees_all_equal(late, select(cache, np.array([0])))
    assert int(late.rebased[0]) > 0
    early = files.read(tmp_path / "early.ccm")
    assert "rebased" not in early.arrays
    both = merging.merge(early, files.read(tmp_path / "late.ccm"))
    files.write(both, tmp_path / "both.ccm")
    both = files.load(tmp_path / "both.ccm", model, memory_capacity=12, **kept)
    assert int(both.tokens[0]) == int(early.arrays["tokens"][0]) + int(late.tokens[0])
    live, position = np.asarray(both.slots.live[0]), np.asarray(both.slots.position[0])
    assert live.sum() == 12 and (np.diff(position[live]) >= 0).all()
    # The newest six slots stand to what comes as they did.
    later = jax.tree.map(np.asarray, late)
    ahead = int(late.next_position[0]) - later.slots.position[0, :6]
    assert (int(both.next_position[0]) - position[6:12]).tolist() == ahead.tolist()
    damaged = files.read(tmp_path / "late.ccm")
    damaged.arrays["rebased"] = damaged.arrays["tokens"] + 1
    with pytest.raises(UserError, match="its slots are none that this library writes"):
        files.checked("x", damaged.header, damaged.arrays)


def test_what_remembers_all_is_not_moved():
    """Growing memory has no gap to close, and neither have positions that are indices in the cache."""
    model = cases.model(tokens=2, max_position=POSITIONS)
    for method, overflow in (
        (build("ccm_concat", comp_tokens=2), "error"),
        (build("ccm_concat", comp_tokens=2, streaming=True), "evict"),
    ):
        cache = init_cache(model, method, 2, memory_capacity=60, raw_capacity=12, overflow=overflow)
        for number in range(24):
            cache = STEP(model, cache, chunk(number), method=method)
        assert cache.tokens.tolist() == cache.next_position.tolist() == [96, 75]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary_factor": 0.5},
        {"sliding_window": 4, "full_layers": (1,), "window_theta": 50.0},
        {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position=32, attention_factor=1.3)},
    ],
    ids=["plain", "partial", "windows", "yarn"],
)
def test_moved_keys_are_those_of_the_other_position(changes):
    config = dataclasses.replace(cases.CONFIG, **changes)
    rng = np.random.default_rng(0)
    shape = (config.num_layers, 2, 5, config.num_kv_heads, config.head_dim)
    k = jnp.asarray(rng.normal(size=shape), jnp.float32)
    position, by = (jnp.asarray(rng.integers(*ends, (2, 5)), jnp.int32) for ends in ((50, 90), (-50, 50)))

    def rotated(at):
        kinds = [rope.angles(config.as_seen(windowed), at) for windowed in config.windowed]
        return jnp.stack([rope.rotate(x, *kind) for x, kind in zip(k, kinds, strict=True)])

    chex.assert_trees_all_close(rope.moved(config, rotated(position), by), rotated(position + by), atol=2e-5)
