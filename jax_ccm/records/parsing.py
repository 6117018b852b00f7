"""Text and JSON from outside: used as it is, or refused with where it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError

# Surrogates. JSON can write one alone (\ud83d), and no UTF-8 can.
_HALF = re.compile("[\ud800-\udfff]")
# Longer whole numbers are read as floats: Python refuses to make integers of thousands of digits of text.
_DIGITS = 300


class Repeated(dict):
    """A JSON object in which a key stands twice; the last value counts.

    Attributes:
      keys_twice: those keys.
    """

    keys_twice: frozenset[str] = frozenset()


def require_text(text: str, where: str) -> None:
    """Refuses text that no tokenizer and no file can take.

    Raises:
      UserError: for half of a character that UTF-16 writes as two (a lone surrogate): text that was cut within an
        emoji, or bytes of the command line that are not UTF-8.
    """
    if half := _HALF.search(text):
        raise UserError(
            f"{where} holds half a character (\\u{ord(half[0]):04x} at place {half.start()}): it was cut within one, "
            "or is not UTF-8; mend it, or remove it"
        )


def read_text(path: Path) -> str:
    """The text that a file holds.

    Raises:
      UserError: if it is missing, cannot be read, or is not UTF-8.
    """
    try:
        # A byte order mark is no text.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON value; an object in which a key stands twice is a `Repeated`.

    Args:
      text: with or without a byte order mark.
      where: names its place in messages.

    Raises:
      UserError: for anything that is not JSON in UTF-8, or is nested too deep to be read.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text.removeprefix("\ufeff"), parse_int=_whole, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); convert it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep to be read; flatten it, or leave it out") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      UserError: if the file is missing or cannot be read, or holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = parse_json(content, str(path))
    except UserError as error:
        raise UserError(f"{error}; the file is not JSON, or cut short: get it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}; an object is needed")
    if isinstance(found, Repeated):
        raise UserError(f"{path} gives {', '.join(map(repr, sorted(found.keys_twice)))} twice; keep one")
    return found


def fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has a form: what it holds may then be taken for what it should be.

    Args:
      value: JSON values.
      form: a type (a bool is no number); a tuple of forms of which one is enough, None among them; a list of one form,
        for lists of such values; a dict of forms, for objects with these names, whatever others they have; or a
        function of the value.
    """
    if isinstance(form, tuple):
        return any(fits(value, each) for each in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(each, form[0]) for each in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(name in value and fits(value[name], own) for name, own in form.items())
    if isinstance(form, type):
        return isinstance(value, form) and (form is bool or not isinstance(value, bool))
    return value is None if form is None else bool(form(value))


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated, names = Repeated(found), [name for name, _ in pairs]
    repeated.keys_twice = frozenset(name for name in names if names.count(name) > 1)
    return repeated
