"""The same conversation with what its question asks for told otherwise.

The memory of another conversation differs in everything from the right one. This control differs in what is asked for
alone, so that a system that only knows what such conversations are about does as well behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jax_ccm.data.sources import Record

_PIECES = re.compile(r"\w+|\s+|[^\w\s]")


def exchanged(record: Record) -> list[str] | None:
    """The contexts of an online record with choices, the right answer's words exchanged for those of another choice.

    The words are what the right choice and the other have not in common; wherever they stand in the contexts, as words
    and in whatever case, the other's take their place. Of the choices that is the first whose words nobody has said,
    and else the first with words of its own.

    Args:
      record: ``{"contexts", "target", "choices", …}``.

    Returns:
      As many contexts; None for a record without choices, or whose contexts do not say the answer word for word.
    """
    pairs = [_apart(record["target"], choice) for choice in record.get("choices", ()) if choice != record["target"]]
    pairs = [(own, other) for own, other in pairs if own and other and _said(own, record["contexts"])]
    if not pairs:
        return None
    own, other = next((pair for pair in pairs if not _said(pair[1], record["contexts"])), pairs[0])
    return [_word(own).sub(lambda found: _cased(other, found[0]), text) for text in record["contexts"]]


def _apart(one: str, other: str) -> tuple[str, str]:
    """What stands between the words with which both begin and those with which both end."""
    a, b = _PIECES.findall(one), _PIECES.findall(other)
    begin = 0
    while begin < min(len(a), len(b)) and a[begin] == b[begin]:
        begin += 1
    end = 0
    while end < min(len(a), len(b)) - begin and a[-1 - end] == b[-1 - end]:
        end += 1
    return "".join(a[begin : len(a) - end]).strip(), "".join(b[begin : len(b) - end]).strip()


def _word(words: str) -> re.Pattern[str]:
    # "storms" is not what "thunderstorms" tells.
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


def _said(words: str, contexts: Sequence[str]) -> bool:
    return any(_word(words).search(text) for text in contexts)


def _cased(words: str, found: str) -> str:
    """The words with the first letter as large as that of what they replace; what has none keeps them as they are."""
    if found[:1].isupper():
        return words[:1].upper() + words[1:]
    return words[:1].lower() + words[1:] if found[:1].islower() else words
