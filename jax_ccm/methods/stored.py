"""Descriptions of methods as they stand in files, which anybody may have changed."""

from __future__ import annotations

from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.records.parsing import fits
from jax_ccm.rules.describe import upgraded

_TOKEN = {"kind": str, "embedding_index": int}
_COUNT = (int, None)


def _is_seen(value: Any) -> bool:
    """Whether it says for pairs of kinds, by name, from how many segments back to how many."""
    return fits(value, dict) and all(
        fits(spans, [[(int, None)]]) and all(len(span) == 2 and span[0] is not None for span in spans)
        for spans in value.values()
    )


# What is read of a description. Whether it is true is found by comparing it with a method.
_FORM: dict[str, Any] = {
    "name": str, "sees": _is_seen, "both_ways": [str], "closes": [_TOKEN], "writes": [str], "pool": _COUNT,
    "mix": ({"kind": str}, None), "groups": int, "gate": [str], "sink": (int, bool), "context": str, "recent": int,
    "rope": str, "chunk": _COUNT, "repeat": (_TOKEN, None), "min_comp_tokens": _COUNT, "ratio": _COUNT,
    "eviction": ({"kind": str, "slots": int, "constant": bool}, None),
}  # fmt: skip


def described(stored: Any, where: str) -> dict[str, Any]:
    """A method's description from a file of any version, under the names of this one (`describe.upgraded`).

    Args:
      stored: JSON values.
      where: the file, for messages.

    Raises:
      UserError: if it is none.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("closes"), list):
        raise UserError(f"{where} is damaged: it does not say which method wrote it")
    found = upgraded(stored, where)
    for name, form in _FORM.items():
        # A field that an older file does not have yet has its default.
        if name in found and not fits(found[name], form):
            raise UserError(f"{where} is damaged: of its method it says {name} {str(found[name])[:60]!r}")
    return found
