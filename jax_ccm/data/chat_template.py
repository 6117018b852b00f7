"""A tokenizer's chat template, cut into what stands before and behind a message of each role.

A template is a program (Jinja) that writes whole conversations. A memory closes them piece by piece, so its output for
a probe is cut at the probe's contents; a cut that does not give the probe again is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax_ccm.errors import UserError

ROLES = ("user", "assistant")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The text around messages; control tokens stand in it by their names.

    Attributes:
      start: in front of the first message; without the system message that some templates put in by themselves.
      heads: role -> text before the content of its messages.
      tails: role -> text behind it.
      system: in front of the content of a system message, which stands before all others and takes the place of
        `start`, and behind it; None if the template writes none, or writes it into the message of somebody else.
    """

    start: str
    heads: dict[str, str]
    tails: dict[str, str]
    system: tuple[str, str] | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Cuts the template of a tokenizer of transformers.

        Raises:
          UserError: if there is none, or if what it writes is not one message behind the other.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "data.chat_template is true, but this tokenizer has no chat template; take the model's chat version, "
                "or set data.chat_template: false, and dialogues are lines of text"
            )
        # Probes without white space at their ends, which templates trim.
        user, assistant, again, last = (f"turn-{name}-of-probe" for name in ("one", "two", "three", "four"))
        said = [user, assistant, again, last]
        # Four turns, which show what stands between an answer and the next question, too.
        whole = _render(tokenizer, said)
        before, _, to_user, _, end = around = _cut(whole, said)
        # The user's turn alone, and the same with what invites an answer; what is more is the head of the answer.
        (_, user_tail), (_, prompt) = (_cut(_render(tokenizer, said[:1], p), said[:1]) for p in (False, True))
        if not prompt.startswith(user_tail):
            raise _uncut(
                f"the prompt for an answer, {prompt!r}, does not begin with the end of a message, {user_tail!r}"
            )
        # Between an answer and the next turn stand the assistant's tail, which also ends the whole, and the user's
        # head.
        heads = {"assistant": prompt[len(user_tail) :], "user": to_user.removeprefix(end)}
        found = cls(before.removesuffix(heads["user"]), heads, {"user": user_tail, "assistant": end})
        if found.text(said) != whole:
            raise _uncut(f"it writes {', '.join(map(repr, around))} around turns")
        return dataclasses.replace(found, start=_start(tokenizer, found), system=_system(tokenizer, found, said))

    def text(self, turns: Sequence[str], system: str = "") -> str:
        """A conversation of whole turns, the first one the user's, behind a system message if there is one."""
        roles = [ROLES[number % 2] for number in range(len(turns))]
        parts = (self.heads[role] + turn + self.tails[role] for role, turn in zip(roles, turns, strict=True))
        before, behind = self.system if self.system and system else (self.start, "")
        return before + system + behind + "".join(parts)


def _render(tokenizer: Any, turns: Sequence[str], prompt: bool = False, system: str = "") -> str:
    messages = [{"role": ROLES[number % 2], "content": turn} for number, turn in enumerate(turns)]
    messages = [{"role": "system", "content": system}] * bool(system) + messages
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # whatever the template itself raises
        raise _uncut(f"it fails ({type(error).__name__}: {error})") from None


def _cut(text: str, turns: Sequence[str]) -> list[str]:
    """What stands before, between and behind turns."""
    found = []
    for turn in turns:
        before, there, text = text.partition(turn)
        if not there or turn in text:
            raise _uncut(f"it does not write the content of each message once, as it is (the probe is {turn!r})")
        found.append(before)
    return [*found, text]


def _start(tokenizer: Any, template: ChatTemplate) -> str:
    """The beginning-of-sequence token, if the template writes it; not a system message that it puts in by itself."""
    bos = getattr(tokenizer, "bos_token", None) or ""
    # A token that opens every message (ChatML) is the message's own.
    own = template.heads["user"].startswith(bos)
    return bos if bos and template.start.startswith(bos) and not own else ""


def _system(tokenizer: Any, template: ChatTemplate, said: Sequence[str]) -> tuple[str, str] | None:
    """What stands around a system message, if it stands apart."""
    probe = "system-of-probe"
    try:
        before, between, *_ = _cut(whole := _render(tokenizer, said, system=probe), [probe, *said])
    except UserError:
        return None
    found = dataclasses.replace(template, system=(before, between.removesuffix(template.heads["user"])))
    return found.system if found.text(said, probe) == whole else None


def _uncut(why: str) -> UserError:
    return UserError(
        f"the chat template of this tokenizer cannot be cut into messages: {why}. Set data.chat_template: false, and "
        "dialogues are lines of text"
    )
