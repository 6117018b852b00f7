"""The one exception for mistakes that the user can mend, and the two commonest of these."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: says what was given, what is allowed and what to do. Commands print it and exit 2."""


class RunError(RuntimeError):
    """A run that failed for a reason worth a plain sentence. Commands print it and exit 1."""


def unknown(what: str, given: str, allowed: Iterable[str]) -> UserError:
    """An error for a name outside a set, with the nearest allowed name as a suggestion."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {given!r}{hint} Allowed: {', '.join(allowed)}.")


def require_least(given: Any, prefix: str, **least: float) -> None:
    """Refuses values that are too small.

    Args:
      given: a dataclass, such as the options of a command or a section of a config.
      prefix: of its names as the user writes them, such as ``"--"`` or ``"train."``.
      **least: the smallest value of each of some fields.

    Raises:
      UserError: naming the first field that is smaller, or NaN.
    """
    for name, smallest in least.items():
        value = getattr(given, name)
        # Not ``value < smallest``: NaN is refused, too.
        if not value >= smallest:
            raise UserError(f"{prefix}{name} is {value}; it must be at least {smallest}")


def require_probability(given: Any, prefix: str, *names: str) -> None:
    """Refuses values that are no probabilities; arguments and errors are those of `require_least`."""
    for name in names:
        if not 0.0 <= getattr(given, name) <= 1.0:
            raise UserError(f"{prefix}{name} is {getattr(given, name)}; it is a probability, from 0 to 1")
