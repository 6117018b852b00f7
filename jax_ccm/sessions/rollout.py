"""Recorded conversations held anew: the user's turns as they stand, the answers made from what is held of them.

What a memory is worth is mostly measured behind recorded answers (an open loop). In use it is written from the model's
own answers, whose mistakes then stand in it (a closed loop).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jax_ccm.config.loading import Experiment
from jax_ccm.data.sources import Record
from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Engine, on_all_text

# Beside its tokens an answer has those of the template; for the size of a cache of full context.
AROUND = 16


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A conversation that is held anew.

    Attributes:
      turns: of a user and an assistant by turns, the user's first. A last turn of the user stays without an answer.
      system: the message with which it begins; "" for none.
    """

    turns: tuple[str, ...]
    system: str = ""

    @classmethod
    def of(cls, record: Record) -> Recorded:
        """What stands before the question of a record of format "online"."""
        return cls(tuple(record["contexts"]), record.get("system", ""))


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Conversations as they went.

    Attributes:
      conversations: their turns, in the order that was given.
      replies: how many answers were made.
      empty: how many of them said nothing; in their place stand the recorded ones.
      cut: how many were longer than they might be.
    """

    conversations: list[tuple[str, ...]]
    replies: int
    empty: int
    cut: int


def roll_out(
    talk: Conversations,
    conversations: Sequence[Recorded],
    *,
    max_tokens: int,
    log: Callable[[str], None] = lambda line: None,
) -> Rollout:
    """Holds conversations, as many side by side as there are sessions.

    Args:
      talk: whose sessions are used, from the first; they are made empty.
      conversations: what is held.
      max_tokens: most tokens of an answer.
      log: called with a line for people behind each conversation.

    Raises:
      UserError: for a turn that cannot be answered, with the conversation that it is of.
    """
    held: list[list[str]] = [list(each.turns) for each in conversations]
    rows, how = talk.engine.rows, dataclasses.replace(talk.how, max_tokens=max_tokens)
    replies = empty = cut = 0
    # Those of like length side by side, so that few sessions wait for others.
    order = sorted(range(len(held)), key=lambda number: -len(held[number]))
    for begin in range(0, len(order), rows):
        group = order[begin : begin + rows]
        for row, number in enumerate(group):
            talk.reset(row)
            if conversations[number].system:
                talk.instruct({row: conversations[number].system})
        for at in range(0, len(held[group[0]]) - 1, 2):
            asked = {row: held[number][at] for row, number in enumerate(group) if at + 1 < len(held[number])}
            try:
                *_, answered = talk.replies(asked, dict.fromkeys(asked, how))
            except UserError as error:
                numbers = ", ".join(str(group[row] + 1) for row in asked)
                raise UserError(f"turn {at + 1} of conversations {numbers}: {error}") from None
            for row, reply in answered.items():
                replies, cut = replies + 1, cut + (reply.ended == "length")
                if reply.text:
                    held[group[row]][at + 1] = reply.text
                else:
                    empty += 1
        log(f"{begin + len(group)} of {len(order)} conversations held")
    return Rollout([tuple(turns) for turns in held], replies, empty, cut)


def roll_out_records(
    talk: Conversations,
    records: Sequence[Record],
    *,
    max_tokens: int,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[Record], Rollout]:
    """`roll_out` of the contexts of records of format "online"; those with equal contexts share one conversation.

    Returns:
      The records with the contexts as they went, and what `roll_out` returned of the different ones.
    """
    different = {Recorded.of(record): None for record in records}
    rollout = roll_out(talk, list(different), max_tokens=max_tokens, log=log)
    held = dict(zip(different, rollout.conversations, strict=True))
    return [{**record, "contexts": list(held[Recorded.of(record)])} for record in records], rollout


def with_full_context(experiment: Experiment, records: Sequence[Record], max_tokens: int) -> Experiment:
    """The base with all that was said as text, and room for the longest of these conversations."""
    engine = Engine(on_all_text(experiment, 0), 1)

    def tokens(told: Recorded) -> int:
        said = [engine.question(text, first=not at) for at, text in enumerate(told.turns[::2])]
        said += [engine.instruction(told.system)] if told.system else []
        return sum(map(len, said)) + (len(told.turns) + 1) // 2 * (max_tokens + AROUND)

    return on_all_text(experiment, max(map(tokens, set(map(Recorded.of, records)))))
