"""The two roads, and what a session carries."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.evals.slots import context_slots, memory_bytes
from jax_ccm.memory.cache import init_cache
from jax_ccm.methods import build
from tests import cases
from tests.evals.support import SMALL, session


@pytest.mark.parametrize("name", ["full", "none", "ccm_concat", "ccm_merge"])
def test_parallel_equals_recurrent(name):
    options = {} if name in ("full", "none") else dict(comp_tokens=2, sink=name == "ccm_merge")
    method = build(name, **options)
    model = cases.model(tokens=len(method.closes), config=SMALL)
    examples = [parity.everything_scored(example) for example in cases.sessions(((3, 4, 2), (5, 2), (2,)))]
    one, other = (road(model, method, examples) for road in (parity.parallel_logits, parity.recurrent_logits))
    steps = parity.target_steps(method, examples)
    for a, b, s in zip(one, other, steps, strict=True):
        assert a.shape == b.shape == (len(s), cases.VOCAB)
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()))
    assert steps[0].max() == (0 if name == "none" else 2)
    hidden = parity.parallel_logits(model, method, examples, with_memory=False)
    moved = max(np.abs(a - b).max() for a, b in zip(one, hidden, strict=True))
    assert moved > 0.1 if method.slots_per_chunk else moved == 0


def test_scored_places_only():
    """Only what is scored comes out, whichever segment it is in."""
    method = build("ccm_concat", comp_tokens=1)
    model = cases.model(tokens=1, config=SMALL)
    example = session([10, 11, 12], [13, 14, 15], [16, 17], target=1)
    example.segments[1].scored[0] = True  # predicted from the separator
    for road in (parity.parallel_logits, parity.recurrent_logits):
        (found,) = road(model, method, [example])
        assert found.shape == (2, cases.VOCAB)
    (steps,) = parity.target_steps(method, [example])
    assert steps.tolist() == [1, 2]


def test_a_small_cache_is_refused():
    method = build("ccm_concat", comp_tokens=1)
    model = cases.model(tokens=1, config=SMALL)
    cache = init_cache(model, method, 1, memory_capacity=1, raw_capacity=8)
    with pytest.raises(UserError, match="needed"):
        parity.recurrent_logits(model, method, [session([10], [11], [12, 13], target=1)], cache=cache)


@pytest.mark.parametrize(
    "name, options, slots",
    [
        ("full", {}, 2 + 3 + 1 + 2),  # start and separators count
        ("none", {}, 0),
        ("window", dict(size=5), 4),  # a token that sees itself and four more
        ("window", dict(size=5, sink=True), 5),
        ("window", dict(size=50), 8),
        ("ccm_concat", dict(comp_tokens=2), 4),
        ("ccm_concat", dict(comp_tokens=2, sink=True), 5),
        ("ccm_merge", dict(comp_tokens=2), 2),
        ("gist", dict(comp_tokens=3), 3),
    ],
)
def test_memory_bytes(name, options, slots):
    example = session([10, 11, 12], [13, 14], [15, 16], target=1, start=(1, 7))
    method = build(name, **options)
    assert context_slots(method, example) == slots
    mixed = slots if name == "ccm_merge" else 0  # it is kept in float32 as well
    layers, heads, size = SMALL.num_layers, SMALL.num_kv_heads, SMALL.head_dim
    assert (
        memory_bytes(method, SMALL, example, 2)
        == slots * 2 * layers * heads * size * 2 + mixed * 2 * layers * heads * size * 4
    )
