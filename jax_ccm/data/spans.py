"""Which stretches of a text are compressed: spans that free the share of places asked for, and single tokens."""

from __future__ import annotations

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.sessions import Segment

SHORTEST = 2


def count_spans(length: int, ratio: float, longest: int) -> tuple[int, int]:
    """How many spans a text gets, and how many places they free; a span of m tokens frees m - 1.

    Args:
      length: tokens of the text.
      ratio: share of the text's places to free, in (0, 1).
      longest: most tokens of a span.

    Raises:
      UserError: if spans of 2 to ``longest`` tokens cannot free as much.
    """
    freed = round(ratio * length)
    if freed == 0:
        return 0, 0
    # As many as spans of uniform length would take, unless they would not fit into the text.
    usual = max(1, round(freed / ((SHORTEST + longest) / 2 - 1)))
    spans = min(usual, length - freed, freed)
    if spans < 1 or spans * (longest - 1) < freed:
        most = (longest - 1) / longest
        raise UserError(
            f"spans of at most {longest} tokens cannot free {ratio:.3g} of {length} places (at most {most:.3g}, "
            "less in short texts); lower data.ratio or raise data.span"
        )
    return spans, freed


def draw_spans(length: int, ratio: float, longest: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Spans ``[begin, end)`` of a text, in order and apart, that free just ``round(ratio * length)`` places.

    The released sampler of the Sentinel paper rejects overlaps and jams: asked for 0.9 it frees half. Here lengths are
    uniform in 2 .. ``longest`` up to what the exact share demands, and all placements are equally likely.

    Args:
      length: tokens of the text.
      ratio: share of places to free.
      longest: most tokens of a span.
      rng: draws.
    """
    spans, freed = count_spans(length, ratio, longest)
    if not spans:
        return []
    lengths = rng.integers(SHORTEST, longest + 1, spans)
    # One by one, so that no length is favoured, until the sum is right.
    while (excess := int((lengths - 1).sum()) - freed) != 0:
        movable = np.flatnonzero(lengths > SHORTEST) if excess > 0 else np.flatnonzero(lengths < longest)
        lengths[rng.choice(movable)] -= 1 if excess > 0 else -1
    free = length - int(lengths.sum())
    # A choice of places for the spans among the tokens outside them.
    places = np.sort(rng.choice(free + spans, spans, replace=False)) - np.arange(spans)
    begins = places + np.cumsum(lengths) - lengths
    return [(int(begin), int(begin + count)) for begin, count in zip(begins, lengths, strict=True)]


def segments_of(
    tokens: np.ndarray, scored: np.ndarray, ratio: float, longest: int, rng: np.random.Generator
) -> tuple[Segment, ...]:
    """A text as segments that end in a span each; what stands before the span is kept, and so is the tail.

    The last token is never in a span, so that something follows each.
    """
    bounds, last = [], 0
    for begin, end in draw_spans(len(tokens) - 1, ratio, longest, rng):
        bounds.append((last, begin, end))
        last = end
    pieces = [
        Segment(tokens[first:end], scored[first:end], np.arange(first, end) < begin) for first, begin, end in bounds
    ]
    return (*pieces, Segment(tokens[last:], scored[last:]))


def scattered(tokens: np.ndarray, scored: np.ndarray, ratio: float, rng: np.random.Generator) -> tuple[Segment, ...]:
    """A text as one segment of which each token is kept with probability ``1 - ratio``, and the last token."""
    kept = rng.random(len(tokens) - 1) >= ratio
    return Segment(tokens[:-1], scored[:-1], kept), Segment(tokens[-1:], scored[-1:])
