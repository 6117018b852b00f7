"""The one exception for mistakes that the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
