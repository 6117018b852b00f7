"""Needles, chains of variables and counts of words at any length: tasks of RULER (Hsieh et al. 2024), generated.

Its two tasks about paragraphs are converters, `jax_ccm.data.converters.paragraphs`; ``kvpress:`` reads all of them.
Replies are scored by the answers that they hold. Words differ between the splits.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from jax_ccm.data import haystack
from jax_ccm.data.conversations import CHOICES
from jax_ccm.data.suite import Words

# Needles of a task with several.
NEEDLES = 4
# Steps of a chain of variables, and other chains.
HOPS, CHAINS = 4, 1
# Of common words: how many are asked for, and how often these and the others stand there.
COMMON, OFTEN, SELDOM = 10, 30, 3
# Of frequent words: how many are asked for, and the exponent of their Zipf distribution.
FREQUENT, ZIPF = 3, 2.0


@dataclasses.dataclass
class Asked:
    """What is hidden and asked for.

    Attributes:
      told: sentences in their order; between them is noise.
      query: the question.
      answers: all that are right.
      wrong: answers that are wrong, for tasks with one that is right.
    """

    told: list[str]
    query: str
    answers: list[str]
    wrong: Sequence[str] = ()


def _number(draw: Words, digits: int = 7) -> str:
    return str(int((1 + 9 * draw.rng.random()) * 10 ** (digits - 1)))


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _asked(keys: Sequence[str], several: bool) -> str:
    what = "are all the special magic numbers" if several else "is the special magic number"
    return f"What {what} for {', '.join(keys)} mentioned in the provided text?"


def niah_single(draw: Words, words: int) -> Asked:
    key, value = draw.word(), _number(draw)
    return Asked([_needle(key, value)], _asked([key], False), [value], [_number(draw) for _ in range(CHOICES - 1)])


def niah_multikey(draw: Words, words: int) -> Asked:
    pairs = [(draw.word(), _number(draw)) for _ in range(NEEDLES)]
    key, value = draw.pick(pairs)
    others = [other for _, other in pairs if other != value]
    return Asked([_needle(*pair) for pair in pairs], _asked([key], False), [value], others)


def niah_multivalue(draw: Words, words: int) -> Asked:
    key, values = draw.word(), [_number(draw) for _ in range(NEEDLES)]
    return Asked([_needle(key, value) for value in values], _asked([key], True), values)


def niah_multiquery(draw: Words, words: int) -> Asked:
    pairs = [(draw.word(), _number(draw)) for _ in range(NEEDLES)]
    return Asked([_needle(*pair) for pair in pairs], _asked([key for key, _ in pairs], True), [v for _, v in pairs])


def vt(draw: Words, words: int) -> Asked:
    """Variable tracking: names that a value was handed on to, beside chains of other values."""
    chains = []
    for _ in range(1 + CHAINS):
        names = [draw.word().upper() for _ in range(HOPS + 1)]
        value = _number(draw, 5)
        steps = [f"VAR {names[0]} = {value}."]
        steps += [f"VAR {new} = VAR {old}." for old, new in zip(names, names[1:], strict=False)]
        chains.append((value, names, steps))
    value, names, _ = chains[0]
    told = []
    left = [list(steps) for _, _, steps in chains]
    while left:
        chain = draw.pick(left)
        told.append(chain.pop(0))
        left = [each for each in left if each]
    return Asked(told, f"Find all variables that are assigned the value {value} in the text above.", names)


def cwe(draw: Words, words: int) -> Asked:
    """Common words among others, in a list."""
    common = [draw.word() for _ in range(COMMON)]
    # As many others as the length has room for; in short lists all stand there less often.
    often = min(OFTEN, max(SELDOM + 1, words // (2 * COMMON)))
    others = [draw.word() for _ in range(max(COMMON, (words - often * COMMON) // SELDOM))]
    listed = common * often + others * SELDOM
    asked = f"What are the {COMMON} most common words in the above list?"
    return Asked(_numbered(draw, listed), asked, common)


def fwe(draw: Words, words: int) -> Asked:
    """Coded words, each about half as often as the one before or less, among dots."""
    names = [draw.name().lower() for _ in range(2 * FREQUENT)]
    shares = [1 / rank**ZIPF for rank in range(1, len(names) + 1)]
    counts = [max(len(names) - n, round(words * share / sum(shares))) for n, share in enumerate(shares)]
    listed = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    asked = f"What are the {FREQUENT} most frequently appeared words in the above coded text? Ignore the dots."
    return Asked([f"{word} ..." for word in _shuffled(draw, listed)], asked, names[:FREQUENT])


def _shuffled(draw: Words, listed: Sequence[str]) -> list[str]:
    # By draws of random(), which alone stays the same between versions of Python.
    return sorted(listed, key=lambda _: draw.rng.random())


def _numbered(draw: Words, listed: Sequence[str]) -> list[str]:
    return [f"{number}. {word}" for number, word in enumerate(_shuffled(draw, listed), 1)]


# RULER's name of a task -> what it hides, in about so many words.
TASKS: dict[str, Callable[[Words, int], Asked]] = {
    "niah_single": niah_single, "niah_multikey": niah_multikey, "niah_multivalue": niah_multivalue,
    "niah_multiquery": niah_multiquery, "vt": vt, "cwe": cwe, "fwe": fwe,
}  # fmt: skip
# Those that are all list, without noise.
LISTS = ("cwe", "fwe")


@dataclasses.dataclass(frozen=True)
class Making:
    """How records are made.

    Attributes:
      tasks: keys of `TASKS`, taken in turn.
      words: of a record, about.
      chunk: most words of a context.
      books: a file or folder with books, as ``pg19:`` reads them, for what stands around needles; "" for small talk.
    """

    tasks: tuple[str, ...]
    words: int
    chunk: int
    books: str


def question(split: str, seed: int, index: int, making: Making) -> dict[str, Any]:
    """Record number ``index``: ``{"contexts", "query", "target", "choices"?, "age", "task"}``.

    With several answers all of them, with commas between, are the target. ``age`` counts contexts from the first
    needle.
    """
    task = making.tasks[index % len(making.tasks)]
    draw = Words(split, random.Random(f"ruler/{task}/{split}/{seed}/{index}"))
    asked = TASKS[task](draw, making.words)
    room = 0 if task in LISTS else making.words
    said, places = haystack.hidden(asked.told, making.books, split, room, draw.rng)
    contexts, at = haystack.contexts(said, places, making.chunk)
    target = ", ".join(asked.answers)
    record = {"contexts": contexts, "query": asked.query, "target": target, "age": len(contexts) - at[0], "task": task}
    if asked.wrong:
        record["choices"] = _shuffled(draw, [*asked.answers, *asked.wrong])
    return record
