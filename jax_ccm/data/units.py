"""Tokenised sessions, from which examples are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self, overload

import numpy as np


@dataclasses.dataclass(frozen=True)
class Unit:
    """A tokenised session from which examples are drawn.

    Attributes:
      id: names the record.
      pieces: read-only int32 tokens of its turns, contexts or chunks, in order; the last is the target (or tail).
      marked: numbers of the turns that the record names for the loss; None for all.
      start: int32 tokens of a system message with which the session begins; None for the template's own beginning.
      task: what the record is an example of, "" where there are no tasks; accuracies are averaged over tasks.
    """

    id: str
    pieces: tuple[np.ndarray, ...]
    marked: frozenset[int] | None = dataclasses.field(default=None, kw_only=True)
    start: np.ndarray | None = dataclasses.field(default=None, kw_only=True)
    task: str = dataclasses.field(default="", kw_only=True)

    def __post_init__(self):
        for piece in self.pieces:
            # Examples are put together of the same arrays again and again.
            piece.setflags(write=False)

    def stored(self) -> dict[str, np.ndarray]:
        """int32 arrays of which `restored` makes it again; what it lacks is not there."""
        found = {"tokens": np.concatenate(self.pieces), "lengths": np.array([len(piece) for piece in self.pieces])}
        if self.marked is not None:
            found["scored"] = np.array(sorted(self.marked))
        if self.start is not None:
            found["start"] = self.start
        return {name: array.astype(np.int32) for name, array in found.items()}

    @classmethod
    def restored(cls, id: str, arrays: Mapping[str, np.ndarray]) -> Self:
        """The unit of these arrays; see `stored`."""
        pieces = tuple(np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1]))
        marked = frozenset(arrays["scored"].tolist()) if "scored" in arrays else None
        return cls(id, pieces, marked=marked, start=arrays.get("start"))


class Units(Sequence[Unit]):
    """Some of the units of several sequences, one sequence after the other, each read when it is asked for."""

    def __init__(self, sequences: Sequence[Sequence[Unit]], numbers: Sequence[np.ndarray]):
        """Chooses units.

        Args:
          sequences: of units.
          numbers: int64, of those that are chosen of each sequence.
        """
        self._sequences = sequences
        # For each chosen unit the sequence that it is in.
        self._of = np.repeat(np.arange(len(sequences)), [len(own) for own in numbers])
        self._numbers = np.concatenate([*numbers, np.zeros(0, np.int64)])

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._sequences[int(self._of[index])][int(self._numbers[index])]
