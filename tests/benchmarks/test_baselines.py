"""What `bench` and `plan` measure: the method of the config, in the state that its turns leave."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jax_ccm.benchmarks import baselines
from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.closing import prefill
from jax_ccm.methods import METHODS, beside, build
from jax_ccm.rules.types import Chunk, Kind
from tests import cases

pytestmark = pytest.mark.once

TURN = 6
# Every name, each with options that change what is run.
GIVEN = [
    ("full", {}), ("none", {}), ("window", dict(size=9)), ("window", dict(size=6, sink=True, sinks=2, streaming=True)),
    ("streaming_llm", dict(sinks=2)), ("gist", dict(comp_tokens=2)), ("gist", dict(comp_tokens=2, online=True)),
    ("ccm_concat", dict(comp_tokens=3, sink=True, streaming=True)), ("ccm_concat", dict(independent=True)),
    ("ccm_merge", dict(comp_tokens=2, conditional=False, repeat=True)),
    ("ccm_ema", dict(comp_tokens=2, sink=True, decay=0.3)), ("compressive", dict(ratio=2, recent=2, sink=True)),
    ("compressive", dict(ratio=2, segment=4)), ("loma", dict(ratio=2, memory_tokens=2)),
    ("loma", dict(ratio=2, memory_tokens=2, memory="ema", scope="last", sink=True)), ("sentinel", dict(history=True)),
    ("local", dict(hidden=0.3)), ("scattered", {}), ("evict", dict(slots=4)),
    ("evict", dict(score="norm", slots=3, constant=True, sink=False)),
]  # fmt: skip
REFUSED = {"streaming_llm": "streaming: true", "gist": "online: true", "scattered": "data keep"}


@functools.partial(jax.jit, static_argnames="method")
def turn(model, cache, chunk, *, method):
    cache = prefill(model, cache, chunk, method=method)
    return cache if method.chunk else steps.compress(model, cache, method=method)


@pytest.mark.parametrize(("name", "options"), GIVEN, ids=str)
def test_what_is_measured_is_the_method_of_the_config(name, options):
    """With every option, or it is refused with what to do; its state after many turns is the one that they leave."""
    own = build(name, **options)
    assert own in beside(name, **options).values()
    if name in REFUSED and not options.get("online"):
        with pytest.raises(UserError, match=REFUSED[name]):
            baselines.compared(name, options, capacity=5, window=8)
        return
    found = baselines.compared(name, options, capacity=5, window=8)
    assert found[0].name == "full" and len({baseline.name for baseline in found}) == len(found)
    baseline = baselines.of(found, own)
    assert baseline.method == own
    assert (baseline.memory is None) == (own.memory_slots(99, 99) == own.memory_slots(9, 99))
    model = cases.model(tokens=max(own.num_embeddings, 1), num_layers=1)
    cache = empty = baseline.cache(model, 1, turns=5, turn=TURN)
    chunk = Chunk(np.ones((1, TURN), np.int32), np.ones((1, TURN), bool))
    for number in range(1, 6):
        cache = turn(model, cache, chunk, method=own)
        filled = baselines.fill(empty, own, turns=number, turn=TURN)
        assert (int(filled.tokens[0]), int(filled.chunks[0])) == (int(cache.tokens[0]), int(cache.chunks[0]))
        assert int(cache.lost[0]) == 0
        for field in ("kind", "segment", "index", "position"):
            # Which tokens a selection keeps depends on the text.
            if own.eviction is None or field in ("kind", "segment"):
                ours, real = (getattr(x.slots, field) for x in (filled, cache))
                np.testing.assert_array_equal(ours, real, err_msg=f"{field} after {number}")
        raw = np.isin(np.asarray(filled.slots.kind), (Kind.TEXT, Kind.QUERY, Kind.SINK)).sum()
        assert own.chunk or raw + TURN <= filled.k.shape[2] - filled.memory_capacity
    assert baselines.closes_turns(own) == (name != "full")


def test_every_method_is_tried():
    assert {name for name, _ in GIVEN} == set(METHODS)


def test_ways_to_keep_one_conversation():
    """What is measured beside a method has its options, and CCM's ways to write stand side by side."""
    named = lambda name, **options: [
        baseline.name for baseline in baselines.compared(name, options, capacity=5, window=8)
    ]
    assert named("ccm_concat") == ["full", "window", "concat", "concat, evicting", "merge"] == named("ccm_merge")
    assert named("ccm_ema", decay=0.2)[-2:] == ["merge", "ema"]
    assert named("window", size=4) == named("window", size=4, sink=True) == ["full", "window"]
    assert named("sentinel") == ["full", "window", "sentinel", "sentinel, evicting"]
    assert named("evict", constant=True) == ["full", "window", "evict"]
    given = dict(comp_tokens=2, sink=True, independent=True, streaming=True)
    found = {
        baseline.name: baseline.method for baseline in baselines.compared("ccm_merge", given, capacity=5, window=8)
    }
    assert found["merge"] == build("ccm_merge", **given) and found["concat"] == build("ccm_concat", **given)
    assert found["window"].rope == "cache" and found["window"].sink == 1
