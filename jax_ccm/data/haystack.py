"""What is told between sentences of books or small talk, at any length: the noise of BABILong and RULER."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from jax_ccm.data.conversations import wordlist
from jax_ccm.data.converters import corpora
from jax_ccm.data.converters.rows import pieces, sentences
from jax_ccm.errors import UserError


@functools.cache
def noise(books: str, split: str) -> tuple[str, ...]:
    """Sentences in their order: of the books in a file or folder; of "", small talk."""
    if not books:
        side = "test" if split == "test" else "train"
        return tuple(text for pair in wordlist("chats")[side]["chat"] for text in pair)
    found = tuple(sentence for book in corpora.pg19(books).records for sentence in sentences(book["text"]))
    if not found:
        raise UserError(f"books={books}: there is no text in it")
    return found


def hidden(told: Sequence[str], books: str, split: str, words: int, rng: random.Random) -> tuple[list[str], list[int]]:
    """Sentences of noise with what is told between them, in order.

    Args:
      told: sentences.
      books: as for `noise`, read from a sentence that is drawn.
      split: of the small talk.
      words: about so many in all; with fewer than are told, there is no noise.
      rng: draws, by ``random()`` alone.

    Returns:
      All sentences, and the numbers of those that are told.
    """
    around, start = noise(books, split), rng.random()
    room = words - sum(len(sentence.split()) for sentence in told)
    between: list[str] = []
    number = int(start * len(around))
    while room > 0:
        sentence = around[number % len(around)]
        between.append(sentence)
        room, number = room - len(sentence.split()), number + 1
    # Each as likely in front of any sentence of the noise, or behind it.
    gaps = sorted(int(rng.random() * (len(between) + 1)) for _ in told)
    found, places = [], []
    for at, sentence in zip((*gaps, len(between)), (*told, ""), strict=True):
        found += between[len(found) - len(places) : at]
        if sentence:
            places.append(len(found))
            found.append(sentence)
    return found, places


def contexts(said: Sequence[str], places: Sequence[int], chunk: int) -> tuple[list[str], list[int]]:
    """Sentences as contexts of up to ``chunk`` words; and in which of them each of some sentences begins."""
    found, at, wanted = [], [], set(places)
    for number, sentence in enumerate(said):
        parts = pieces(sentence, chunk)
        if found and len(found[-1].split()) + len(parts[0].split()) <= chunk:
            found[-1] += f" {parts.pop(0)}"
            begins = len(found) - 1
        else:
            begins = len(found)
        found += parts
        if number in wanted:
            at.append(begins)
    return found, at
