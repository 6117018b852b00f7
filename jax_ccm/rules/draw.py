"""Pictures in text of who sees whom: at a prompt, and on the pages of the docs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_ccm.rules import rows, visibility
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Kind, Method, Slots

_SIGNS = {Kind.COMP: "C", Kind.OPEN: "[", Kind.REPEAT: "r"}
_LETTERS = 26


def draw(method: Method, lengths: Sequence[int], kept: Sequence[int] = ()) -> str:
    """The visibility of a parallel forward, computed by the same code that training runs.

    Rows are queries, columns keys: the tokens of the row itself, then ``|``, then the memory (``M`` and the number of
    the chunk that wrote it). Behind each row stands the position. Text is ``a b c ...``, compression tokens are
    ``C``, a span's opener ``[``, repetition tokens ``r``.

    Methods that have no parallel form are drawn as if they had one: who sees whom does not depend on what a selection
    keeps, only how much it keeps; and indices in the cache are no position of a token, so none are shown.

    Args:
      method: the method.
      lengths: tokens of the context chunks, and last of the tail.
      kept: for each chunk how many tokens at its begin are kept; none if left out.
    """
    text = iter(range(_LETTERS))
    segments = []
    for number, count in enumerate(lengths):
        tokens = np.array([next(text) for _ in range(count)], np.int32)
        keep = np.arange(count) < kept[number] if number < len(kept) else None
        segments.append(Segment(tokens, np.zeros(count, bool), keep))
    none = np.zeros(0, np.int32)
    example = Example(none, none, tuple(segments))
    laid_out = dataclasses.replace(method, rope="running", eviction=None)
    batch = rows.batch(laid_out, [example], rows.measure(laid_out, example), _LETTERS)
    memory = None if batch.memory is None else batch.memory.slots
    if method.eviction is not None:
        chunks = range(len(lengths) - 1)
        owner = np.repeat(chunks, [method.memory_slots(1 + chunk) for chunk in chunks])[None]
        memory = Slots(np.full_like(owner, Kind.MEMORY), owner, 0 * owner, 0 * owner)
    names = [
        chr(ord("a") + token) if token < _LETTERS else _SIGNS[Kind(kind)]
        for token, kind in zip(batch.tokens[0], batch.slots.kind[0], strict=True)
    ]
    seen = [visibility.visible(method.rule, batch.slots, batch.slots)[0]]
    columns = [*names]
    if memory is not None:
        seen.append(visibility.visible(method.rule, batch.slots, memory)[0])
        columns += ["|", *(f"M{1 + segment}" for segment in memory.segment[0])]
    widths = [max(1, len(name)) for name in columns]

    def line(cells):
        return " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))

    running = method.rope == "running"
    lines = ["  " + line(columns) + "   position" * running]
    for i, name in enumerate(names):
        parts = [["x" if hit else "." for hit in part[i]] for part in seen]
        cells = parts[0] if len(parts) == 1 else [*parts[0], "|", *parts[1]]
        lines.append(f"{name} {line(cells)}" + f"   {batch.slots.position[0, i]}" * running)
    return "\n".join(line.rstrip() for line in lines)
