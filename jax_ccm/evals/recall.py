"""Where a memory forgets: by the age of what is asked for and by the length of the conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_ccm.evals.perplexity import Measured, Stage, summarise
from jax_ccm.evals.statistics import tree_to_json

# The most lengths that are told apart; more of them are put together, neighbour to neighbour.
MOST_LENGTHS = 10


def grid(questions: Sequence[Stage], measured: Mapping[str, list[Measured]], slot_bytes: int) -> list[dict[str, Any]]:
    """The numbers of each age and length, as `perplexity.summarise` gives them for an age alone.

    Args:
      questions: the ages.
      measured: what was measured of each system, by name.
      slot_bytes: bytes of a key/value slot over all layers.

    Returns:
      JSON values: rows as those of ``results.json``, with ``"age"`` in place of the step, and ``"chunks"``, the
      smallest and the largest number of chunks before the question; none if all conversations are of one length.
    """
    lengths = [np.array([len(q.examples[q.answer].segments) - 1 for q in stage.right]) for stage in questions]
    different = np.unique(np.concatenate(lengths))
    if len(different) < 2:
        return []
    cells = []
    # Parts of about as many different lengths, however many questions each has.
    for those in np.array_split(different, min(len(different), MOST_LENGTHS)):
        for number, (stage, own) in enumerate(zip(questions, lengths, strict=True)):
            where = np.flatnonzero(np.isin(own, those))
            if not len(where):
                continue
            part = {name: [_part(steps[number], where)] for name, steps in measured.items()}
            (row,) = summarise([_stage(stage, where)], part, slot_bytes)
            chunks = [int(those[0]), int(those[-1])]
            cells.append({"age": row.pop("step"), "chunks": chunks} | row)
    return tree_to_json(cells)


def _stage(stage: Stage, where: np.ndarray) -> Stage:
    def pick(side):
        return None if side is None else [side[i] for i in where]

    return dataclasses.replace(stage, right=pick(stage.right), wrong=pick(stage.wrong))


def _part(measured: Measured, where: np.ndarray) -> Measured:
    def pick(side):
        return None if side is None else [side[i] for i in where]

    said = measured.said and (pick(measured.said[0]), pick(measured.said[1]))
    return dataclasses.replace(
        measured, right=pick(measured.right), wrong=pick(measured.wrong), slots=measured.slots[where], said=said
    )
