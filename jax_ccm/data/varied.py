"""Several hundred kinds of facts, put together from families of sentences: what makes a memory general.

A family is a way to tell something and ask for it ("my {a} is called {v}", "What is my {a} called?"), and what it can
be told of (brother, boat, book club, …). Each split has members and sentences of its own, validation too, so that
settings are chosen by what was never trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax_ccm.data.conversations import split_of, wordlist

# The field of a family's sentences that stands for its member.
MEMBER = "a"
# Of deeds, the past tense.
PAST = "past"


class _Keep(dict[str, str]):
    """Fields that are filled later stay as they are."""

    def __missing__(self, field: str) -> str:
        return "{" + field + "}"


@functools.cache
def kinds(split: str, wide: bool = False) -> dict[str, dict[str, Any]]:
    """The kinds of facts of a split.

    Args:
      split: "train", "validation" or "test".
      wide: whether training has many more sentences for each, and families of its own. The other splits stay as they
        are: what a memory is chosen and reported by does not grow with what it is trained on.

    Returns:
      By name: ``value`` and ``slots``, names of entities, and lists of sentences: ``say``, ``wh``, ``ask``, ``react``
      and ``change``, with the fields of ``slots`` and ``v`` for the value; ``member`` is what it is told of.
    """
    wide = wide and split == "train"
    made = {}
    for name, family in wordlist("varied").items():
        if name == "wrappers":
            continue
        more = wordlist("wide")["wordings"][name] if wide else {}
        parts = {part: [*texts, *more.get(part, ())] for part, texts in family[split].items()}
        for number, (member, entry) in enumerate(family["of"].items()):
            if split_of(number) == split:
                made[f"{name}: {member}"] = _kind(member, entry, family["slots"], parts)
    if wide:
        for name, family in wordlist("wide")["families"].items():
            for member, value in family["of"].items():
                made[f"{name}: {member}"] = _kind(member, {"value": value}, family["slots"], family[split])
    return made


def _kind(
    member: str, entry: Mapping[str, str], slots: Mapping[str, str], parts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    own = {MEMBER: member, PAST: member} | {k: text for k, text in entry.items() if k != "value"}

    # What a member brings (a question of its own) has fields, too.
    def fill(text):
        return text.format_map(_Keep(own)).format_map(_Keep(own))

    sentences = {part: [fill(text) for text in texts] for part, texts in parts.items()}
    return {"value": entry["value"], "slots": slots, "member": member, **sentences}


def wrappers(split: str, wide: bool = False) -> tuple[str, ...]:
    """What questions are put into: ``q`` is the question, ``p`` the same with a small first letter."""
    more = wordlist("wide")["wrappers"] if wide and split == "train" else ()
    return (*wordlist("varied")["wrappers"][split], *more)
