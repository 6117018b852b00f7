"""Spans reach the share that is asked for, and taking them in changes no token."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.data import spans
from jax_ccm.errors import UserError
from jax_ccm.methods import baselines, sentinel
from jax_ccm.rules import rows
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


@pytest.mark.parametrize("units, reached", [(30, 0.44), (120, 0.51), (1000, 0.56), (5000, 0.57)])
def test_released_sampler_jams(units, reached):
    """Asked to free 0.9 of a line it covers what the specification measured of it (trap S7)."""
    freed = []
    for seed in range(max(20, 60_000 // units)):
        found = spans.draw_released(units, 0.9, 25, rng(seed))
        assert all(a[1] <= b[0] for a, b in zip(found, found[1:], strict=False))
        assert all(2 <= end - begin <= 25 and end < units for begin, end in found)
        freed.append(sum(end - begin - 1 for begin, end in found) / units)
    assert np.mean(freed) == pytest.approx(reached, abs=0.01)
    assert spans.draw_released(29, 0.9, 25, rng()) == []
    assert len(spans.draw_released(60, 0.1, 25, rng())) == 1


@pytest.mark.parametrize("ratio", RATIOS)
def test_words_reach_the_ratio(ratio):
    """Spans begin and end with words, and free the share of tokens as nearly as whole words can."""
    for seed in range(20):
        begins = np.ones(160, bool)
        begins[1:] = rng(seed).random(159) < 0.75
        sampler = spans.Sampler(ratio)
        found = sampler.draw(begins, True, rng(seed))
        freed = sum(end - begin - 1 for begin, end in found)
        assert abs(freed / 160 - ratio) < 0.02
        edges = {*np.flatnonzero(begins).tolist(), 160}
        words = [int(begins[begin:end].sum()) for begin, end in found]
        assert {place for span in found for place in span} <= edges and all(2 <= count <= 25 for count in words)
        assert len(found) == sampler.most(begins, True)


@pytest.mark.parametrize("words", [False, True])
def test_released_sampler_stays_within_its_bound(words):
    begins = rng(0).random(200) < 0.7
    sampler = spans.Sampler(0.9, released=True)
    assert all(len(sampler.draw(begins, words, rng(s))) <= sampler.most(begins, words) for s in range(50))


def test_marked_text():
    """Sentinels in a text give its spans; the text without them is what it was (S6)."""
    tokens, found = spans.marked([5, 90, 6, 7, 91, 8, 90, 9, 91], 90, 91)
    assert tokens.tolist() == [5, 6, 7, 8, 9] and found == [(1, 3), (4, 5)]


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([5, 91, 6, 90, 7, 8], "at place 1 closes a span that none opened"),  # [x y CR z CL u v] of S8, both orphans
        ([5, 90, 7, 8], "at place 1 opens a span that none closes"),
        ([90, 5, 90, 6, 91, 91], "at place 2 opens a span within the one opened at place 0"),
        ([5, 90, 91, 6], "from place 1 to 2 is empty"),
    ],
)
def test_unmatched_sentinels(tokens, message):
    """The released blocks cut through spans, and orphans compress what they should not; here they are refused (S8)."""
    with pytest.raises(UserError, match=message):
        spans.marked(tokens, 90, 91)


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([(1, 4), (3, 6)], r"\(3, 6\) crosses, or stands behind, the span \(1, 4\)"),
        ([(4, 6), (1, 3)], r"\(1, 3\) crosses, or stands behind, the span \(4, 6\)"),
        ([(2, 2)], r"\(2, 2\) must hold a token"),
        ([(5, 10)], "before the last of the 10 tokens"),
    ],
)
def test_spans_that_cross(bounds, message):
    with pytest.raises(UserError, match=message):
        spans.split(np.arange(10), np.ones(10, bool), bounds)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_ratios_outside_their_range(ratio):
    with pytest.raises(UserError, match=rf"ratio is {ratio}; it must lie in \(0, 1\)"):
        spans.Sampler(ratio)
    with pytest.raises(UserError, match=rf"ratio is {ratio}; it must lie in \(0, 1\)"):
        spans.scattered(np.arange(9), np.ones(9, bool), ratio, rng())


TEXT = [{"text": "abcdefghijklmnopqrstuvwxyz" * 4}]
FIELDS = dict(format="text", chunk=4, max_chunks=12, tokens=120, loss="all")


@pytest.mark.parametrize("sampler, unit", [("released", "words"), ("released", "tokens"), ("exact", "words")])
def test_windows_of_other_samplers(sampler, unit):
    """The same tokens again; no draw needs more than was announced."""
    text = [{"text": "a in on is it me we " * 5}]
    fields = FIELDS | dict(chunk=7, tokens=120)
    format, units, _ = load(text, ratio=0.6, sampler=sampler, unit=unit, span=6, **fields)
    plain, same, _ = load(text, **fields)
    assert len(units) == len(same) > 0
    for one, other in zip(units, same, strict=True):
        expected = laid_out(plain.draw(other, rng()), baselines.full())
        needs, counts = format.needs(one, sentinel.sentinel()), set()
        for seed in range(10):
            example = format.draw(one, rng(seed))
            made = laid_out(example, sentinel.sentinel())
            assert np.array_equal(made.targets[0][made.weights[0] > 0], expected.targets[0][expected.weights[0] > 0])
            need = rows.measure(sentinel.sentinel(), example)
            assert need.tokens <= needs.tokens and need.memory <= needs.memory and need.scored == needs.scored
            counts.add(len(example.segments))
        assert max(counts) > 3


def test_windows_that_are_too_short():
    """What is left at the end of a text may have too few words; it is dropped and counted."""
    text = [{"text": "a in on is it me we " * 3 + "whatsoever"}]
    fields = FIELDS | dict(chunk=7, max_chunks=6, tokens=120, ratio=0.8, unit="words")
    _, units, report = load(text, **fields)
    assert len(units) == 1 and report.dropped == {"too short for spans that free 0.8 of them": 1}


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
            assert rows.measure(method, example) == format.needs(unit, method)
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
        (dict(unit="words"), "data.unit has no effect without data.ratio"),
        (dict(ratio=0.5, hide="tokens", sampler="released"), "data.sampler has no effect with data.hide='tokens'"),
        (dict(ratio=0.5, sampler="theirs"), "data.sampler"),
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
