"""What sessions hold by formula; that caches hold the same is shown where caches are tested."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.methods import build
from jax_ccm.rules.occupancy import occupancy
from jax_ccm.rules.types import Kind

M, T, Q, S = Kind.MEMORY, Kind.TEXT, Kind.QUERY, Kind.SINK


@pytest.mark.parametrize(
    ("name", "options", "kinds", "positions"),
    [
        ("full", {}, [T] * 6, range(6)),
        ("none", {}, [T], [5]),
        ("window", dict(size=3), [T, T], [4, 5]),  # the next token is the third
        ("ccm_concat", dict(comp_tokens=2), [M, M, M, M, T], [3, 4, 5, 6, 5]),
        ("ccm_concat", dict(comp_tokens=1, sink=True), [S, M, M, T], [0, 3, 5, 5]),
        ("ccm_merge", dict(comp_tokens=2), [M, M, T], [5, 6, 5]),
        ("ccm_merge", dict(groups=3), [M, M, T], [3, 5, 5]),
        ("ccm_merge", dict(groups=1), [M, T], [5, 5]),
        ("ccm_concat", dict(comp_tokens=4, ratio=2), [M, M, M, T], [3, 4, 5, 5]),
        ("sentinel", {}, [M, M, T], [2, 4, 5]),
        ("compressive", dict(ratio=2, recent=0), [M, M, M, T], [1, 2, 4, 5]),
        ("evict", dict(slots=2, sink=False), [M] * 4 + [T], [1, 2, 3, 4, 5]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_two_chunks_and_an_open_token(name, options, kinds, positions):
    """Chunks of 3 and 2 tokens are closed, a token stands behind them."""
    live = occupancy(build(name, **options), [3, 2], still_open=1)
    assert live.kind.tolist() == kinds and live.position.tolist() == list(positions)
    assert (np.diff(live.index) >= 0).all() and live.kind.dtype == np.int32


def test_text_that_is_kept():
    live = occupancy(build("sentinel"), [3, 2], np.array([True, False, False, False, False]))
    assert live.kind.tolist() == [Q, M, M] and live.position[0] == 0
    live = occupancy(build("ccm_merge", sink=True), [3, 2], np.array([True, True, False, False, False]))
    assert live.kind.tolist() == [S, S, M] and live.position.tolist() == [0, 1, 5]


def test_the_oldest_are_gone_without_room():
    method = build("ccm_concat", comp_tokens=2)
    assert occupancy(method, [3, 2, 4], capacity=3).segment.tolist() == [1, 2, 2]
    assert len(occupancy(method, [3, 2, 4]).kind) == 6


def test_nothing_was_read():
    assert len(occupancy(build("ccm_concat"), []).kind) == 0
