"""Sessions as data gives them: stretches of text, to be laid out for a method by `jax_ccm.rules.rows`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of text.

    Attributes:
      tokens: int32 ``[c]``.
      scored: bool ``[c]``, True on tokens that are targets.
      kept: bool ``[c]``, True on tokens that are never compressed; None for none. Only methods that keep text know it
        (`Method.kept_kind`).
    """

    tokens: np.ndarray
    scored: np.ndarray
    kept: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One session: context chunks, then a tail.

    Attributes:
      start: int32, tokens before the first segment (beginning of sequence).
      separator: int32, tokens that open every segment but the first.
      segments: the context chunks, and last the tail: the input and what follows it.
      id: names the record in error messages.
      num_comp_tokens: how many of the method's tokens close its chunks, the first ones; None for all.
      repeats: whether its closed chunks are repeated, where the method has a `Method.repeat`.
      keeps_start: whether ``start`` is never compressed: it holds a system message.
    """

    start: np.ndarray
    # It stands behind the compression tokens of the segment before, as in CCM's code for dialogues.
    separator: np.ndarray
    segments: tuple[Segment, ...]
    id: str = ""
    num_comp_tokens: int | None = None
    repeats: bool = True
    keeps_start: bool = False


def concat(*segments: Segment) -> Segment:
    """One segment of several."""
    kept = None
    if any(segment.kept is not None for segment in segments):
        kept = np.concatenate([np.zeros(len(s.tokens), bool) if s.kept is None else s.kept for s in segments])
    return Segment(
        np.concatenate([s.tokens for s in segments]).astype(np.int32),
        np.concatenate([s.scored for s in segments]),
        kept,
    )


def with_prefix(prefix: np.ndarray, segment: Segment, *, keep: bool = False) -> Segment:
    """The segment with unscored tokens in front, kept if its first token is, or if that is asked for."""
    if not len(prefix):
        return segment
    kept = None if segment.kept is None else np.repeat(segment.kept[:1], len(prefix))
    kept = np.ones(len(prefix), bool) if keep else kept
    return concat(Segment(prefix, np.zeros(len(prefix), bool), kept), segment)


def join(example: Example, groups: Sequence[int]) -> Example:
    """Joins neighbouring segments into one, with the separator between them.

    Args:
      example: the session.
      groups: sizes of the groups, in order; they add up to the number of segments. A last group larger than 1
        joins context into the tail.
    """
    if sum(groups) != len(example.segments) or min(groups) < 1:
        raise ValueError(f"groups {list(groups)} do not partition {len(example.segments)} segments")
    joined, first = [], 0
    for size in groups:
        head, *rest = example.segments[first : first + size]
        joined.append(concat(head, *(with_prefix(example.separator, piece) for piece in rest)))
        first += size
    return dataclasses.replace(example, segments=tuple(joined))


def cut(segment: Segment, size: int) -> tuple[Segment, ...]:
    """The segment in parts of ``size`` tokens; the last has the rest, from 1 to ``size``."""
    parts = [slice(first, first + size) for first in range(0, len(segment.tokens), size)]

    def kept(part):
        return None if segment.kept is None else segment.kept[part]

    return tuple(Segment(segment.tokens[part], segment.scored[part], kept(part)) for part in parts)
