"""A generated task that only memory can solve: facts, one a chunk, then a question for every one of them.

A fact is two tokens, a name and its thing. The tail is all the names in random order, each followed by its thing, which
is scored. Asking for every fact in every sequence matters: with one question a sequence the same model stalls.

Token ids, without a tokenizer: 0 starts a session, then come the names, then the things.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.rules.examples import Example, Segment

START = 0


@dataclasses.dataclass(frozen=True)
class Recall:
    """The task.

    Attributes:
      facts: facts in a sequence; their names differ.
      names: how many names there are.
      things: how many things there are. Without memory the answer is right once in ``things`` times.
    """

    facts: int = 8
    names: int = 50
    things: int = 50

    def __post_init__(self):
        if not 1 <= self.facts <= self.names:
            raise UserError(
                f"recall: {self.facts} facts need as many different names, there are {self.names}; "
                "raise names or lower facts"
            )

    @property
    def vocab_size(self) -> int:
        """V, the ids in use."""
        return 1 + self.names + self.things

    def record(self, split: str, seed: int, index: int) -> dict[str, Any]:
        """Record number ``index``: ``{"facts": [[name, thing], …], "asked": [place in facts, …]}``, token ids."""
        # A string seeds the generator through SHA-512, and so the same on every machine.
        rng = random.Random(f"recall/{split}/{seed}/{index}")

        def pick(count):
            return int(rng.random() * count)

        names = list(range(self.names))
        for place in range(self.facts):  # the first steps of a Fisher-Yates shuffle
            other = place + pick(self.names - place)
            names[place], names[other] = names[other], names[place]
        facts = [[1 + name, 1 + self.names + pick(self.things)] for name in names[: self.facts]]
        asked = sorted(range(self.facts), key=lambda _: rng.random())
        return {"facts": facts, "asked": asked}


def example(record: dict[str, Any], id: str = "", facts: int | None = None) -> Example:
    """A record as a session: a chunk for each fact, then the tail.

    Args:
      record: see `Recall.record`.
      id: names the record in messages.
      facts: keep only so many of the first facts, and the questions for them.
    """
    kept = record["facts"][:facts]
    chunks = [Segment(np.array(fact, np.int32), np.zeros(2, bool)) for fact in kept]
    # name, thing, name, thing, ...: every second one is scored.
    answers = np.array([kept[place] for place in record["asked"] if place < len(kept)], np.int32).reshape(-1)
    tail = Segment(answers, np.arange(len(answers)) % 2 == 1)
    return Example(np.array([START], np.int32), np.zeros(0, np.int32), (*chunks, tail), id)
