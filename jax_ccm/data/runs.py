"""A session as people can check it: its tokens in the order in which they are fed, in runs that are treated alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_ccm.rules import rows, visibility
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example
from jax_ccm.rules.types import Kind, Method


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one chunk and kind, all or none of which the LoRA acts on, and all or none scored.

    Attributes:
      chunk: the number of the chunk, from 1; None for the tail.
      kind: what the tokens are.
      positions: of each token.
      gated: whether the LoRA acts on them.
      scored: whether they are targets of the loss.
      text: what they say; for tokens that the method adds, their names.
    """

    chunk: int | None
    kind: Kind
    positions: tuple[int, ...]
    gated: bool
    scored: bool
    text: str


def runs(method: Method, example: Example, vocab_size: int, tokenizer: Any) -> tuple[list[Run], Batch]:
    """The runs of a session, read off the arrays that a training step gets.

    Args:
      method: what it is laid out for.
      example: the session.
      vocab_size: V.
      tokenizer: a fast tokenizer of transformers; None for data of token ids, which are then shown as numbers.

    Returns:
      The runs, in order, and the row (B = 1) that they were read off.

    Raises:
      UserError: for a session or a method that cannot be laid out (`jax_ccm.rules.rows.batch`).
    """
    batch = rows.batch(method, [example], rows.measure(method, example), vocab_size)
    tokens, slots = batch.tokens[0], batch.slots.map(lambda array: array[0])
    gate = visibility.gate(method, slots)
    gated = np.zeros(len(tokens), bool) if gate is None else np.asarray(gate) > 0
    scored = _scored(batch, vocab_size)
    last = int(slots.segment.max())
    # The last segment is the tail, unless it was closed, too.
    tail = None if (tokens[slots.segment == last] >= vocab_size).any() else last

    def key(place):
        return (int(slots.segment[place]), int(slots.kind[place]), bool(gated[place]), bool(scored[place]))

    found = []
    for (segment, kind, acts, counts), group in itertools.groupby(range(len(tokens)), key):
        places = list(group)
        text = _text(tokens[places], Kind(kind), vocab_size, tokenizer)
        positions = tuple(int(slots.position[place]) for place in places)
        found.append(Run(None if segment == tail else 1 + segment, Kind(kind), positions, acts, counts, text))
    return found, batch


def _scored(batch: Batch, vocab_size: int) -> np.ndarray:
    """bool ``[T]``: the places that are targets: the text behind each one that predicts, or a repeated place itself."""
    tokens, kind = batch.tokens[0], batch.slots.kind[0]
    scored = np.zeros(len(tokens), bool)
    text = np.flatnonzero(tokens < vocab_size)
    for place in batch.indices[0][batch.weights[0] > 0]:
        # ``place`` is the token that predicts: of text the next one in the row that is no compression token.
        scored[place if kind[place] == Kind.REPEAT else text[np.searchsorted(text, place, side="right")]] = True
    return scored


def _text(tokens: np.ndarray, kind: Kind, vocab_size: int, tokenizer: Any) -> str:
    added = [token - vocab_size for token in tokens if token >= vocab_size]
    if added:
        name = kind.name.lower()
        return f"<{name} x {len(added)}>" if kind == Kind.REPEAT else " ".join(f"<{name} {row}>" for row in added)
    if tokenizer is None:
        return " ".join(map(str, tokens))

    # Some tokenizers leave out the space before a text's first token; so one stands in front, and is cut off again.
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = tokens.tolist()
    return decode([ids[0], *ids])[len(decode(ids[:1])) :]


def positions(numbers: Sequence[int]) -> str:
    """Positions in few words: ``3-9``, or ``3, 7, 11``."""
    first, last = numbers[0], numbers[-1]
    if list(numbers) != list(range(first, last + 1)):
        return ", ".join(map(str, numbers))
    return str(first) if first == last else f"{first}-{last}"
