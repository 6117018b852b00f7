"""Conversations as programs and people export them: lists of messages, each with a role and a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_ccm.data.converters.rows import Converted, Fields, rows
from jax_ccm.errors import UserError, unknown

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
# What the role of a message is called.
OPENAI = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL, "function": TOOL}
SHAREGPT = {
    "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT,
    "bard": ASSISTANT, "system": SYSTEM, "tool": TOOL, "observation": TOOL, "function_call": TOOL,
    "function_response": TOOL,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
      role: `SYSTEM`, `USER`, `ASSISTANT` or `TOOL`.
      text: what it says.
      learned: whether it is to be learned from, as OpenAI's ``weight`` says.
    """

    role: str
    text: str
    learned: bool = True


class Unusable(Exception):
    """A conversation that does not become turns, for a reason that is counted."""


def openai(path: str, system: str = "keep") -> Converted:
    """``{"messages": [{"role", "content", "weight"?}]}``, as OpenAI's chat and fine-tuning take them.

    Args:
      path: a .jsonl, .json or .parquet file.
      system: "keep" keeps a first system message as one, beside the memory; "join" puts it in front of the user's next
        turn, where those always go that come later; "drop" leaves out all.
    """

    def read(message: Fields) -> Message:
        role = _role(message, "role", OPENAI)
        if role == TOOL or message.content.get("tool_calls") or message.content.get("function_call"):
            raise Unusable("with calls of tools, which turns do not hold")
        weight = message.content.get("weight")
        if weight not in (None, 0, 1):
            raise UserError(f"{message.place}: field 'weight' must be 0 or 1, it is {weight!r}")
        return Message(role, _content(message), weight != 0)

    return _conversations(path, "messages", read, system)


def sharegpt(path: str, system: str = "keep") -> Converted:
    """``{"conversations": [{"from", "value"}]}``, as ShareGPT's exports and most fine-tuning tools have them.

    Args:
      path: a .json, .jsonl or .parquet file.
      system: "keep" keeps a first system message as one, beside the memory; "join" puts it in front of the user's next
        turn, where those always go that come later; "drop" leaves out all.
    """

    def read(message: Fields) -> Message:
        role = _role(message, "from", SHAREGPT)
        if role == TOOL:
            raise Unusable("with calls of tools, which turns do not hold")
        return Message(role, message.text("value"))

    return _conversations(path, "conversations", read, system)


def _role(message: Fields, field: str, known: dict[str, str]) -> str:
    role = message.text(field)
    if role not in known:
        raise unknown(f"role in {message.place}: field {field!r} is", role, known)
    return known[role]


def _content(message: Fields) -> str:
    """The text of a message, or of its parts."""
    if not isinstance(message.get("content"), list):
        return message.text("content")
    parts = message.inside("content")
    if any(part.content.get("type") != "text" for part in parts):
        raise Unusable("with pictures, sound or files, which turns do not hold")
    return "\n".join(part.text("text") for part in parts)


def _conversations(path: str, field: str, read: Any, system: str) -> Converted:
    if system not in ("keep", "join", "drop"):
        raise unknown("value of the option system:", system, ("keep", "join", "drop"))
    made = Converted()
    for row in rows(Path(path)):
        try:
            messages = [read(message) for message in row.inside(field)]
            made.add(dialogue(messages, made, system=system), row.place)
        except Unusable as reason:
            made.drop(str(reason), row.place)
    return made


def dialogue(messages: Sequence[Message], made: Converted, *, system: str) -> dict[str, Any]:
    """A dialogue record, in which user and assistant take turns: the user begins, the assistant ends.

    Args:
      messages: in order.
      made: where it is counted what had to be done for that.
      system: "keep", "join" or "drop": what becomes of system messages.

    Raises:
      Unusable: if not both of them speak.
    """
    first = 0
    while system == "keep" and first < len(messages) and messages[first].role == SYSTEM:
        first += 1
    turns = in_turns(messages[first:], made, keep_system=system != "drop")
    record: dict[str, Any] = {"turns": [turn.text for turn in turns]}
    if first:
        record["system"] = "\n\n".join(message.text for message in messages[:first])
    if not all(turn.learned for turn in turns):
        record["scored"] = [number for number, turn in enumerate(turns) if number % 2 and turn.learned]
        # The last turn is always scored: what stands behind the last that is to be learned is not needed.
        last = max(record["scored"], default=-1)
        if last < 0:
            raise Unusable("whose weights are all 0")
        if last + 1 < len(turns):
            made.changed["without turns behind the last that is learned from"] += 1
        record["turns"] = record["turns"][: last + 1]
    return record


def in_turns(messages: Sequence[Message], made: Converted, *, keep_system: bool = True) -> list[Message]:
    """Messages as turns of a user and an assistant; system messages go in front of the user's next turn, or away."""
    turns: list[Message] = []
    waiting: list[str] = []
    done: set[str] = set()
    for message in messages:
        if message.role == SYSTEM:
            if keep_system:
                waiting.append(message.text)
            done.add("with their system message " + ("in front of a turn" if keep_system else "left out"))
            continue
        if not turns and message.role == ASSISTANT:
            done.add("without what the assistant says before the user")
            continue
        if message.role == USER and waiting:
            message = dataclasses.replace(message, text="\n\n".join([*waiting, message.text]))
            waiting = []
        if turns and turns[-1].role == message.role:
            done.add("with neighbouring messages of one role joined")
            before = turns.pop()
            learned = before.learned and message.learned
            message = Message(message.role, f"{before.text}\n\n{message.text}", learned)
        turns.append(message)
    if turns and turns[-1].role == USER:
        turns.pop()
        done.add("without a last turn that nobody answers")
    if not turns:
        raise Unusable("in which user and assistant do not both speak")
    made.changed.update(done)
    return turns
