"""Rows of JSON, JSONL and Parquet files, which name their place; and the records that are made of them."""

from __future__ import annotations

import collections
import dataclasses
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError, unknown
from jax_ccm.records.parsing import parse_json, require_text

# Behind these a text is cut, if it has to be.
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclasses.dataclass
class Converted:
    """Records made of a file.

    Attributes:
      records: in the format of the converter.
      places: where each comes from, for messages.
      dropped: (reason, place) of each row that became no record.
      changed: what was done to records -> to how many.
    """

    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    changed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, record: dict[str, Any], place: str) -> None:
        self.records.append(record)
        self.places.append(place)

    def drop(self, reason: str, place: str) -> None:
        self.dropped.append((reason, place))


@dataclasses.dataclass(frozen=True)
class Fields:
    """A JSON object and its place; a field that is missing or of another type is refused with both.

    Attributes:
      place: file and line, or file and number.
      content: the object.
    """

    place: str
    content: Mapping[str, Any]

    @classmethod
    def of(cls, content: Any, place: str) -> Fields:
        if not isinstance(content, dict):
            raise UserError(f"{place}: a JSON object is needed, this is a {type(content).__name__}")
        return cls(place, content)

    def get(self, name: str) -> Any:
        if name not in self.content:
            found = ", ".join(sorted(self.content)) or "none"
            raise UserError(f"{self.place}: there is no field {name!r} (the fields: {found})")
        return self.content[name]

    def text(self, name: str) -> str:
        """A string."""
        return self._text(self.get(name), f"field {name!r}")

    def said(self, name: str) -> str:
        """A string, or a number as it is written."""
        value = self.get(name)
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else self.text(name)

    def texts(self, name: str) -> list[str]:
        """A list of strings, or one string."""
        value = self.get(name)
        if isinstance(value, str):
            return [self.text(name)]
        return [self._text(item, f"item {number} of field {name!r}") for number, item in enumerate(self._list(name))]

    def inside(self, name: str) -> list[Fields]:
        """A list of objects, which name their numbers."""
        return [Fields.of(item, f"{self.place}: {name}[{number}]") for number, item in enumerate(self._list(name))]

    def lists(self, name: str) -> list[list[Fields]]:
        """A list of lists of objects."""
        found = []
        for number, inner in enumerate(self._list(name)):
            place = f"{self.place}: {name}[{number}]"
            if not isinstance(inner, list):
                raise UserError(f"{place} must be a list, it is {reprlib.repr(inner)}")
            found.append([Fields.of(item, f"{place}[{at}]") for at, item in enumerate(inner)])
        return found

    def pairs(self, name: str) -> list[tuple[Any, Any]]:
        """A list of lists of two."""
        found = []
        for number, pair in enumerate(self._list(name)):
            if not isinstance(pair, list) or len(pair) != 2:
                raise UserError(f"{self.place}: {name}[{number}] must be a list of two, it is {reprlib.repr(pair)}")
            found.append((pair[0], pair[1]))
        return found

    def _list(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise UserError(f"{self.place}: field {name!r} must be a list, it is {reprlib.repr(value)}")
        return value

    def _text(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise UserError(f"{self.place}: {what} must be a string, it is {reprlib.repr(value)}")
        require_text(value, f"{self.place}: {what}")
        return value


def rows(path: Path, *, lines_of_json: Sequence[str] = ()) -> Iterator[Fields]:
    """The objects that a file holds: ``.jsonl`` one a line, ``.json`` a list of them or a single one, ``.parquet``.

    Args:
      path: the file.
      lines_of_json: endings besides ``.jsonl`` under which a data set keeps one object a line.

    Raises:
      UserError: for another ending, a file that cannot be read, and what is no object.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    allowed = (*lines_of_json, *(end for end in (".jsonl", ".json") if end not in lines_of_json))
    if path.suffix not in allowed:
        raise UserError(f"{path} ends in {path.suffix!r}; allowed are {', '.join(allowed)} and .parquet")
    content = _content(path)
    if path.suffix == ".jsonl" or path.suffix in lines_of_json:
        yield from json_lines(content, str(path))
        return
    whole = parse_json(content, str(path))
    for number, row in enumerate(whole) if isinstance(whole, list) else [(0, whole)]:
        yield Fields.of(row, f"{path}[{number}]")


def json_lines(content: bytes, path: str) -> Iterator[Fields]:
    """The objects of a file that has one a line."""
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped, but no line breaks.
    for number, line in enumerate(re.split(b"\r\n|\n|\r", content.removeprefix(b"\xef\xbb\xbf")), 1):
        if line.strip():
            yield Fields.of(parse_json(line, f"{path}:{number}"), f"{path}:{number}")


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line of a text file.

    Raises:
      UserError: for a file that cannot be read, or is no UTF-8.
    """
    for number, line in enumerate(re.split(b"\r\n|\n|\r", _content(path).removeprefix(b"\xef\xbb\xbf")), 1):
        try:
            yield f"{path}:{number}", line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not UTF-8 text; convert it") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _parquet(path: Path) -> Iterator[Fields]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: to read Parquet needs the package pyarrow; pip install 'jax-ccm[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Fields(f"{path}[{number}]", row)
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); get it again") from None


def sessions(talk: Fields) -> list[int]:
    """Numbers of the sessions ``session_1``, ``session_2`` … of a talk, in order.

    Raises:
      UserError: if there is none.
    """
    numbers = sorted(int(found[1]) for name in talk.content if (found := re.fullmatch(r"session_(\d+)", name)))
    if not numbers:
        raise UserError(f"{talk.place}: there is no session; fields session_1, session_2 … are needed")
    return numbers


def kept_words(text: str, words: int, made: Converted, what: str) -> str:
    """The first words of a text, counted where that is not all of it; 0 for all."""
    if not 0 < words < len(text.split()):
        return text
    made.changed[f"{what} cut after {words} words"] += 1
    return " ".join(text.split()[:words])


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line."""
    return [said for part in _SENTENCE.split(text.strip()) if (said := " ".join(part.split()))]


def pieces(text: str, words: int) -> list[str]:
    """A text in pieces of up to so many words, which end with a sentence where one ends within them."""
    found: list[list[str]] = []
    for sentence in _SENTENCE.split(text.strip()):
        said = sentence.split()
        for first in range(0, len(said), words):
            part = said[first : first + words]
            if found and len(found[-1]) + len(part) <= words:
                found[-1] += part
            else:
                found.append(part)
    return [" ".join(part) for part in found]


def closed_set(converted: Converted, most: int) -> None:
    """Gives every record the targets of all as choices, if there are 2 to ``most`` different ones."""
    targets = sorted({record["target"] for record in converted.records})
    if 2 <= len(targets) <= most:
        for record in converted.records:
            record["choices"] = targets


def at_least(least: int, **given: int) -> None:
    """Refuses an option below the smallest value."""
    for name, value in given.items():
        if value < least:
            raise UserError(f"the option {name}={value} of a source must be at least {least}")


def chosen(what: str, given: str, allowed: Sequence[str]) -> list[str]:
    """The names in a list with commas.

    Raises:
      UserError: for one that is not allowed.
    """
    names = given.split(",")
    for name in names:
        if name not in allowed:
            raise unknown(what, name, allowed)
    return names
