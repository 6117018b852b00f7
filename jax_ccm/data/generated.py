"""The generated data sets by name, with the options that each takes: what ``generated:NAME?option=value`` can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax_ccm.data import chats, conversations, haystack, recall, ruler, suite, worlds
from jax_ccm.errors import UserError, unknown

SPLITS = ("train", "validation", "test")
# What all take: how many records there are, and which.
COMMON = {"split": "train", "size": "2000", "seed": "0"}
# What makes record number i of a split and a seed.
Make = Callable[[str, int, int], dict[str, Any]]


class Given:
    """The options of one source, taken one after the other."""

    def __init__(self, source: str, options: Mapping[str, str]):
        self.source, self._options = source, options

    def text(self, name: str) -> str:
        return self._options[name]

    def number(self, name: str, least: int) -> int:
        """A whole number."""
        text = self._options[name]
        if not text.isdecimal() or int(text) < least:
            raise UserError(f"data source {self.source!r}: {name}={text!r} must be a whole number, at least {least}")
        return int(text)

    def share(self, name: str) -> float:
        """A number from 0 to 1."""
        text = self._options[name]
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            raise UserError(f"data source {self.source!r}: {name}={text!r} must be a number from 0 to 1")
        return share

    def ages(self, name: str, most: int) -> tuple[int, ...]:
        """Different whole numbers; () if the option was not given."""
        text = self._options[name]
        if text == ANY:
            return ()
        parts = text.split(",")
        # More than ``most``, or one of them twice.
        if not all(part.isdecimal() and int(part) for part in parts) or len(parts) > min(most, len(set(parts))):
            raise UserError(
                f"data source {self.source!r}: {name}={text!r} must be a whole number, at least 1, or up to {most} "
                "different ones: 1,4,8"
            )
        return tuple(map(int, parts))

    def tasks(self, known: Iterable[str]) -> tuple[str, ...]:
        """Names of tasks with commas between; all for "any"."""
        text, names = self._options["task"], tuple(known)
        given = names if text == ANY else tuple(text.split(","))
        for name in given:
            if name not in names:
                raise unknown(f"task in {self.source!r}:", name, names)
        return given


# Of `chats.Making`, in its order.
SHARES = ("arbitrary", "wordy", "quoted", "reactions", "changes", "varied", "wide")
# The default of an option that limits nothing.
ANY = "any"


@dataclasses.dataclass(frozen=True)
class Generator:
    """A generated data set.

    Attributes:
      format: the ``data.format`` of its records.
      about: what it is, in a line.
      options: what it takes besides `COMMON`, with defaults.
      make: checks the options, and gives what makes records.
    """

    format: str
    about: str
    options: Mapping[str, str]
    make: Callable[[Given], Make]


def _recall(given: Given) -> Make:
    return recall.Recall(
        facts=given.number("facts", 1), names=given.number("names", 1), things=given.number("things", 2)
    ).record


def _small_talk(hold: Callable[..., dict[str, Any]]) -> Callable[[Given], Make]:
    def make(given: Given) -> Make:
        turns = conversations.parse_turns(given.text("turns"))
        return lambda split, seed, index: hold(split, seed, index, turns)

    return make


def _chats(hold: Callable[..., dict[str, Any]]) -> Callable[[Given], Make]:
    def make(given: Given) -> Make:
        turns = conversations.parse_turns(given.text("turns"), most=chats.MOST_TURNS)
        ages = given.ages("age", chats.MOST_AGES)
        making = chats.Making(turns, ages, *(given.share(name) for name in SHARES))
        if max(turns) < making.fewest:
            raise UserError(
                f"data source {given.source!r}: to tell something and ask for it takes turns of at least "
                f"{making.fewest}"
            )
        return lambda split, seed, index: hold(split, seed, index, making)

    return make


def _suite(name: str) -> Callable[[Given], Make]:
    def make(given: Given) -> Make:
        turns = conversations.parse_turns(given.text("turns"), most=chats.MOST_TURNS)
        ages, behind = given.ages("age", chats.MOST_AGES), suite.TASKS[name][2]
        if ages and min(ages) <= behind:
            raise UserError(
                f"data source {given.source!r}: age={min(ages)} leaves no exchange for what is told later; "
                f"give at least {behind + 1}"
            )
        if max(turns) < suite.fewest(name, ages):
            raise UserError(
                f"data source {given.source!r}: to tell what is asked for and ask takes turns of at least "
                f"{suite.fewest(name, ages)}"
            )
        return lambda split, seed, index: suite.question(name, split, seed, index, turns, ages)

    return make


def _books(given: Given) -> str:
    """The file or folder of books, which is read once, when the source is opened."""
    books = given.text("books")
    haystack.noise(books, "test")
    return books


def _worlds(given: Given) -> Make:
    making = worlds.Making(
        given.tasks(worlds.TASKS), given.number("facts", 4), given.number("words", 0), given.number("chunk", 4),
        _books(given),
    )  # fmt: skip
    return lambda split, seed, index: worlds.question(split, seed, index, making)


def _ruler(given: Given) -> Make:
    making = ruler.Making(given.tasks(ruler.TASKS), given.number("words", 1), given.number("chunk", 4), _books(given))
    return lambda split, seed, index: ruler.question(split, seed, index, making)


_CHATS = {"turns": "4-16", "age": ANY} | dict.fromkeys(SHARES, "0")

GENERATED = {
    "conversations": Generator(
        "dialogue", "small talk of two people, with facts worth remembering", {"turns": "4-16"},
        _small_talk(conversations.dialogue),
    ),
    "questions": Generator(
        "online", "the same, and a question for one of the facts, with choices", {"turns": "4-16"},
        _small_talk(conversations.question),
    ),
    "chats": Generator("dialogue", "a user who tells and asks, an assistant who answers", _CHATS, _chats(chats.chat)),
    "chat_questions": Generator(
        "online", "the same, and a question for what was told some exchanges ago, with choices", _CHATS,
        _chats(chats.question),
    ),
    **{
        name: Generator("online", about, {"turns": "8-16", "age": ANY}, _suite(name))
        for name, (*_, about) in suite.TASKS.items()
    },
    "babi": Generator(
        "online", "people who walk, carry and give things, between sentences of books: BABILong's tasks qa1 to qa5",
        {"task": ANY, "facts": "8", "words": "400", "chunk": "64", "books": ""}, _worlds,
    ),
    "ruler": Generator(
        "online", "needles, chains of variables and counts of words, at any length: tasks of RULER",
        {"task": ANY, "words": "400", "chunk": "64", "books": ""}, _ruler,
    ),
    "recall": Generator(
        "recall", "facts of two tokens, all asked for; needs no tokenizer",
        {"facts": "8", "names": "50", "things": "50"}, _recall,
    ),
}  # fmt: skip


def generate(source: str, name: str, options: Mapping[str, str], format: str) -> tuple[int, Callable[[int], Any]]:
    """How many records a source has, and what gives the one at an index.

    Args:
      source: the whole source, for messages.
      name: a key of `GENERATED`.
      options: what was given.
      format: the ``data.format`` that reads it.

    Raises:
      UserError: for a name, an option or a value that there is not, or records of another format.
    """
    if name not in GENERATED:
        raise unknown("generated data set", name, GENERATED)
    kind = GENERATED[name]
    if kind.format != format:
        raise UserError(
            f"data source {source!r} gives records for format {kind.format!r}, but data.format is {format!r}"
        )
    known = {**COMMON, **kind.options}
    for option in options:
        if option not in known:
            raise unknown(f"option of {source!r}:", option, known)
    given = Given(source, {**known, **options})
    split = given.text("split")
    if split not in SPLITS:
        raise unknown(f"split in {source!r}:", split, SPLITS)
    size, seed, make = given.number("size", 1), given.number("seed", 0), kind.make(given)
    return size, lambda index: make(split, seed, index)
