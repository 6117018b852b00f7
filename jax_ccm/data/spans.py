"""Which stretches of a text are compressed: spans that free the share of places asked for, and single tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.rules.examples import Segment

SHORTEST = 2
# Words of a line below which the released code leaves it alone.
RELEASED_SHORTEST_TEXT = 30


def count_spans(length: int, ratio: float, longest: int) -> tuple[int, int]:
    """How many spans a text gets, and how many places they free; a span of m tokens frees m - 1.

    Args:
      length: tokens of the text.
      ratio: share of the text's tokens to free, in (0, 1).
      longest: most tokens of a span.

    Raises:
      UserError: if spans of 2 to ``longest`` tokens cannot free as much.
    """
    freed = round(ratio * length)
    if freed == 0:
        return 0, 0
    # As many as spans of uniform length would take, unless they would not fit into the text.
    usual = max(1, round(freed / ((SHORTEST + longest) / 2 - 1)))
    # n spans of freed + n tokens in all: they must fit into the text, and each frees one place at least.
    spans = min(usual, length - freed, freed)
    if spans < 1 or spans * (longest - 1) < freed:
        most = (longest - 1) / longest
        raise UserError(
            f"spans of at most {longest} tokens cannot free {ratio:.3g} of {length} tokens (at most {most:.3g}, "
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
    # Stars and bars: for each span how many of the free tokens stand before it, all ways equally likely.
    places = np.sort(rng.choice(free + spans, spans, replace=False)) - np.arange(spans)
    begins = places + np.cumsum(lengths) - lengths
    return [(int(begin), int(begin + count)) for begin, count in zip(begins, lengths, strict=True)]


def draw_released(units: int, ratio: float, longest: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Spans as the released code of the Sentinel paper samples them, which jams: asked for 0.9 it frees half.

    Spans of 2 to ``longest`` units are placed at random and rejected if they overlap another, until enough units are
    covered or three times as many were tried as would be needed. Texts of fewer than 30 units are left alone, and the
    last unit is never covered.

    Args:
      units: words (in the paper) or tokens of the text.
      ratio: share of the units to free, as asked for.
      longest: most units of a span.
      rng: draws.
    """
    if units < RELEASED_SHORTEST_TEXT or units <= longest:
        return []
    mean = (SHORTEST + longest) / 2
    # Units to cover; of each span one slot is kept, which mean / (mean - 1) makes up for.
    wanted = int(ratio * mean / (mean - 1) * units)
    found: list[tuple[int, int]] = []
    covered = np.zeros(units, bool)
    for _ in range(_attempts(wanted, mean)):
        if covered.sum() >= wanted:
            break
        # The bound is exclusive, so that even the longest span ends before the last unit.
        begin = int(rng.integers(0, units - longest))
        end = begin + int(rng.integers(SHORTEST, longest + 1))
        if not covered[begin:end].any():
            covered[begin:end] = True
            found.append((begin, end))
    return sorted(found)


def _attempts(wanted: int, mean: float) -> int:
    # One more, without which short texts would get no span at low ratios; the code's own counts have them.
    return 3 * int(wanted / mean) + 1


def draw_words(edges: np.ndarray, ratio: float, longest: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Spans of whole words, in tokens, that free the share of places asked for as nearly as words allow.

    Args:
      edges: int ``[w + 1]``, the first token of each word, and the end of the text.
      ratio: share of the text's tokens to free.
      longest: most words of a span.
      rng: draws.
    """
    spans = draw_spans(len(edges) - 1, ratio, longest, rng)
    wanted = round(ratio * int(edges[-1]))
    freed = sum(int(edges[end] - edges[begin]) - 1 for begin, end in spans)
    size = np.diff(edges)
    while True:
        # Word by word at the ends of spans, as long as that leads nearer to the share.
        moves = []
        for number, (begin, end) in enumerate(spans):
            follows = spans[number + 1][0] if number + 1 < len(spans) else len(size)
            if freed > wanted and end - begin > SHORTEST:
                moves.append((number, end - 1, -int(size[end - 1])))
            elif freed < wanted and end - begin < longest and end < follows:
                moves.append((number, end + 1, int(size[end])))
        moves = [move for move in moves if abs(freed + move[2] - wanted) < abs(freed - wanted)]
        if not moves:
            return [(int(edges[begin]), int(edges[end])) for begin, end in spans]
        number, end, change = moves[rng.integers(len(moves))]
        spans[number] = (spans[number][0], end)
        freed += change


def word_edges(begins: np.ndarray) -> np.ndarray:
    """The first token of each word and the end of the text, of bool ``[c]``; a text may begin within a word."""
    starts = np.flatnonzero(begins)
    # Unique, since 0 is among the starts where the text begins with a word.
    return np.unique(np.concatenate([[0], starts, [len(begins)]]))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Which spans of a text are compressed in training.

    Attributes:
      ratio: share of the text's tokens to free, in (0, 1).
      longest: most units of a span.
      released: as the released code samples them, and not exactly the share.
    """

    ratio: float
    longest: int = 25
    released: bool = False

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio is {self.ratio}; it must lie in (0, 1): the share of tokens that spans free")

    def draw(self, begins: np.ndarray, words: bool, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Spans ``[begin, end)`` in tokens, in order and apart.

        Args:
          begins: bool ``[c]``, tokens with which a word begins; of the text without its last token, which no span has.
          words: spans are of whole words, and ``longest`` counts words.
          rng: draws.
        """
        edges = word_edges(begins) if words else np.arange(len(begins) + 1)
        if self.released:
            spans = draw_released(len(edges) - 1, self.ratio, self.longest, rng)
            return [(int(edges[begin]), int(edges[end])) for begin, end in spans]
        if words:
            return draw_words(edges, self.ratio, self.longest, rng)
        return draw_spans(len(edges) - 1, self.ratio, self.longest, rng)

    def reaches(self, begins: np.ndarray, words: bool) -> bool:
        """Whether the text is long enough for spans that free the share."""
        try:
            self.most(begins, words)
        except UserError:
            return False
        return True

    def most(self, begins: np.ndarray, words: bool) -> int:
        """The most spans that `draw` may give.

        Raises:
          UserError: if no spans of this length free the share.
        """
        units = len(word_edges(begins)) - 1 if words else len(begins)
        if not self.released:
            return count_spans(units, self.ratio, self.longest)[0]
        mean = (SHORTEST + self.longest) / 2
        return min(_attempts(int(self.ratio * mean / (mean - 1) * units), mean), units // SHORTEST)


def split(tokens: np.ndarray, scored: np.ndarray, spans: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """A text as segments that end in a span each; what stands before the span is kept, and so is the tail.

    Args:
      tokens: int32 ``[c]``.
      scored: bool ``[c]``.
      spans: ``[begin, end)`` of each, in order and apart; the last token is in none, so that something follows each.

    Raises:
      UserError: for spans that cross, are empty or lie outside the text.
    """
    pieces, last, before = [], 0, None
    for begin, end in spans:
        if not 0 <= begin < end <= len(tokens) - 1:
            raise UserError(
                f"the span ({begin}, {end}) must hold a token and end before the last of the {len(tokens)} tokens"
            )
        if begin < last:
            raise UserError(
                f"the span ({begin}, {end}) crosses, or stands behind, the span {before}; give spans in order and apart"
            )
        # Kept is what stands before the span.
        pieces.append(Segment(tokens[last:end], scored[last:end], np.arange(last, end) < begin))
        last, before = end, (begin, end)
    return (*pieces, Segment(tokens[last:], scored[last:]))


def marked(tokens: Sequence[int], opener: int, closer: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """A text in which sentinels stand, and the spans that they bracket.

    Args:
      tokens: ids of the text, sentinels among them.
      opener: id that stands before a span.
      closer: id that stands behind it.

    Returns:
      int32 tokens without the sentinels, and for each span its ``[begin, end)`` in them.

    Raises:
      UserError: for a sentinel without its partner, a span within a span, or one that is empty.
    """
    plain: list[int] = []
    spans: list[tuple[int, int]] = []
    opened: tuple[int, int] | None = None
    for place, token in enumerate(tokens):
        if token == opener:
            if opened is not None:
                raise UserError(
                    f"the sentinel at place {place} opens a span within the one opened at place {opened[0]}; spans "
                    "neither cross nor nest"
                )
            opened = place, len(plain)
        elif token == closer:
            if opened is None:
                raise UserError(f"the sentinel at place {place} closes a span that none opened")
            if opened[1] == len(plain):
                raise UserError(f"the span from place {opened[0]} to {place} is empty")
            spans.append((opened[1], len(plain)))
            opened = None
        else:
            plain.append(token)
    if opened is not None:
        raise UserError(f"the sentinel at place {opened[0]} opens a span that none closes")
    return np.array(plain, np.int32), spans


def scattered(tokens: np.ndarray, scored: np.ndarray, ratio: float, rng: np.random.Generator) -> tuple[Segment, ...]:
    """A text as one segment of which each token is kept with probability ``1 - ratio``, and the last token."""
    if not 0 < ratio < 1:
        raise UserError(f"ratio is {ratio}; it must lie in (0, 1): the share of tokens that are hidden")
    kept = rng.random(len(tokens) - 1) >= ratio
    return Segment(tokens[:-1], scored[:-1], kept), Segment(tokens[-1:], scored[-1:])
