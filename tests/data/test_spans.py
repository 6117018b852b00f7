"""Spans reach the share that is asked for, and taking them in changes no token."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm import layout
from jax_ccm.data import spans
from jax_ccm.errors import UserError
from jax_ccm.methods import baselines, sentinel
from tests.data.test_formats import laid_out, load

RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_is_reached(ratio):
    """Exactly, at any length, where the released sampler jams at a half (trap S7)."""
    for length in (30, 120, 1000):
        for seed in range(20):
            found = spans.draw_spans(length, ratio, 25, rng(seed))
            freed = sum(end - begin - 1 for begin, end in found)
            assert freed == round(ratio * length)
            ends = [end for _, end in found]
            assert all(begin >= last for (begin, _), last in zip(found, [0, *ends[:-1]], strict=True))
            assert ends[-1] <= length and all(2 <= end - begin <= 25 for begin, end in found)
            assert len(found) == spans.count_spans(length, ratio, 25)[0]


def test_spans_lie_everywhere():
    """Placement favours no part of the text, and lengths are spread over the whole range."""
    covered, lengths = np.zeros(200), []
    for seed in range(3000):
        for begin, end in spans.draw_spans(200, 0.4, 25, rng(seed)):
            covered[begin:end] += 1 / 3000
            lengths.append(end - begin)
    middle = covered[25:-25]
    assert middle.min() > 0.38 and middle.max() < 0.5
    counts = np.bincount(lengths, minlength=26)[2:]
    assert counts.min() > 0.3 * counts.mean()


@pytest.mark.parametrize("length, ratio, longest", [(100, 0.97, 25), (100, 0.6, 2), (3, 0.9, 25)])
def test_ratios_out_of_reach(length, ratio, longest):
    with pytest.raises(UserError, match=f"spans of at most {longest} tokens cannot free"):
        spans.draw_spans(length, ratio, longest, rng())


def test_tiny_shares_draw_nothing():
    assert spans.draw_spans(10, 0.01, 25, rng()) == []


TEXT = [{"text": "abcdefghijklmnopqrstuvwxyz" * 4}]
FIELDS = dict(format="text", chunk=4, max_chunks=12, tokens=120, loss="all")


@pytest.mark.parametrize("hide", ["spans", "tokens"])
def test_windows_with_spans(hide):
    """The same tokens, all scored but the first, whatever is hidden; of the announced size (S6, S15)."""
    method = sentinel.sentinel() if hide == "spans" else baselines.scattered()
    format, units, _ = load(TEXT, ratio=0.5, hide=hide, **FIELDS)
    plain, same, _ = load(TEXT, **FIELDS)
    shapes = set()
    for unit, other in zip(units, same, strict=True):
        expected = laid_out(plain.draw(other, rng()), baselines.full())
        for seed in range(10):
            example = format.draw(unit, rng(seed))
            made = laid_out(example, method)
            assert np.array_equal(made.targets[0][made.weights[0] > 0], expected.targets[0][expected.weights[0] > 0])
            assert layout.measure(method, example) == format.needs(unit, method)
            shapes.add(tuple(len(segment.tokens) for segment in example.segments) + tuple(example.segments[0].kept))
            if hide == "spans":
                kept = sum(int(s.kept.sum()) for s in example.segments[:-1]) + len(example.segments[-1].tokens)
                length = sum(len(piece) for piece in unit.pieces)
                assert kept + len(example.segments) - 1 == length - round(0.5 * (length - 1))
    assert len(shapes) >= 10


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(ratio=1.0), r"data.ratio is 1.0; it must lie in \(0, 1\)"),
        (dict(span=10), "no effect without data.ratio"),
        (dict(hide="tokens"), "no effect without data.ratio"),
        (dict(ratio=0.5, hide="words"), "data.hide"),
        (dict(ratio=0.5, span=1), "data.span is 1"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(UserError, match=message):
        load(TEXT, **FIELDS, **fields)


def test_loss_on_everything_is_for_text():
    with pytest.raises(UserError, match="data.loss='all' is for format 'text'"):
        load([{"turns": ["a", "b", "c"]}], loss="all")
