"""Several hundred kinds of facts, put together from families of sentences: what makes a memory general.

A family is a way to tell something and ask for it ("my {a} is called {v}", "What is my {a} called?"), and what it can
be told of (brother, boat, book club, …). Each split has members and sentences of its own, validation too, so that
settings are chosen by what was never trained on.
"""

from __future__ import annotations

import functools
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
def kinds(split: str) -> dict[str, dict[str, Any]]:
    """The kinds of facts of a split.

    Args:
      split: "train", "validation" or "test".

    Returns:
      By name: ``value`` and ``slots``, names of entities, and lists of sentences: ``say``, ``wh``, ``ask``, ``react``
      and ``change``, with the fields of ``slots`` and ``v`` for the value; ``member`` is what it is told of.
    """
    made = {}
    for name, family in wordlist("varied").items():
        if name == "wrappers":
            continue
        for number, (member, entry) in enumerate(family["of"].items()):
            if split_of(number) != split:
                continue
            own = {MEMBER: member, PAST: member} | {k: text for k, text in entry.items() if k != "value"}
            # What a member brings (a question of its own) has fields, too.
            fill = lambda text, own=own: text.format_map(_Keep(own)).format_map(_Keep(own))
            sentences = {part: [fill(text) for text in texts] for part, texts in family[split].items()}
            made[f"{name}: {member}"] = {
                "value": entry["value"], "slots": family["slots"], "member": member, **sentences,
            }  # fmt: skip
    return made


def wrappers(split: str) -> tuple[str, ...]:
    """What questions are put into: ``q`` is the question, ``p`` the same with a small first letter."""
    return tuple(wordlist("varied")["wrappers"][split])
