"""A conversation at a terminal or in a pipe: the reply as it is made, and commands that show and handle the memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.errors import UserError, unknown
from jax_ccm.memory import files
from jax_ccm.rules.types import Kind
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import on_all_text
from jax_ccm.sessions.state import Session
from jax_ccm.sessions.turns import Reply

HELP = """/memory       what the memory holds, turn by turn
/save FILE    write the memory to a file; a memory is personal data
/load FILE    go on from a file
/fork         go on in a copy; /back returns to the conversation as it was
/forget N     drop the memory of turn N, where each turn has slots of its own
/reset        begin anew
/compare      answer the last turn from memory, full context, another conversation's memory, and nothing
/compare TEXT ask this from all four, with what each holds; the conversation goes on as if it had not been asked
/help         this list
An empty line or Ctrl-D ends the conversation, Ctrl-C stops a reply. A turn that begins with a slash takes two."""
# What the memory of another conversation is made of, for comparison.
OTHER = (
    ("I am Henrik and keep bees in Bergen.", "Nice to meet you, Henrik."),
    ("My sister Solveig has a red boat.", "That sounds like fun."),
)
# What a terminal would take for orders, not for text; and what stands for bytes that are no UTF-8.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclasses.dataclass
class _Told:
    """A conversation, and what of it is known here: the texts of its turns, or None if it came from a file; and the
    system message with which it begins."""

    session: Session
    past: list[tuple[str, str]] | None
    system: str


class Terminal:
    """Talks in one session of some conversations, and prints."""

    def __init__(
        self, talk: Conversations, *, max_tokens: int, alone: bool = False, system: str = "", status: bool = True
    ):
        """Begins in the session that is there.

        Args:
          talk: conversations of one row.
          max_tokens: most tokens of a reply.
          alone: whether each turn is also answered without memory.
          system: the system message with which the session that is there begins.
          status: whether a line under each reply says what has been read, what is held, and how fast it went.
        """
        self.talk, self.max_tokens, self.alone = talk, max_tokens, alone
        self.system, self.status = system, status
        # A text that was read first is not known turn by turn.
        begun = talk.state.tokens[0] - (len(talk.engine.instruction(system)) if system else 0)
        self._past: list[tuple[str, str]] | None = None if begun else []
        self._last: tuple[str, _Told] | None = None
        self._behind: list[_Told] = []
        self._full: tuple[Conversations, _Told] | None = None

    def say(self, text: str, entry: dict[str, Any]) -> None:
        """Has a turn answered; the answers are printed, and written into its entry of a record.

        Raises:
          UserError: if it cannot be answered; the memory is as it was.
        """
        if self.alone:
            entry["without_memory"] = self._alone(text)
            print(f"without  {printable(entry['without_memory'])}")
        # Kept before the turn: `/compare` answers the last turn from what was known then.
        before = self._here()
        reply, first, seconds = self._reply(self.talk, text, "memory   " if self.alone else "model    ")
        self._last = text, before
        self._past = None if self._past is None else [*self._past, (text, reply.text)]
        slots, ours, full = self.talk.memory_bytes()
        entry |= {"memory": reply.text, "slots": slots, "memory_bytes": ours, "full_context_bytes": full}
        if not self.status:
            return
        turns, tokens = len(self.talk.state.turns[0]), self.talk.state.tokens[0]
        rate = f"; {(reply.tokens - 1) / seconds:.1f} tokens/s" if reply.tokens > 1 and seconds > 0 else ""
        print(
            f"         [turn {turns}; {tokens:,} tokens read; {slots} slots, {ours / 2**20:.2f} MiB; full context "
            f"{full / 2**20:.2f} MiB; first token after {first:.1f} s{rate}]"
        )

    def _reply(self, talk: Conversations, text: str, label: str) -> tuple[Reply, float, float]:
        """A reply, printed as it is made, with dots where its limit cut it; seconds to its first token, and from there
        to the last."""
        how, shown, reply = {0: dataclasses.replace(talk.how, max_tokens=self.max_tokens)}, "", None

        def indented(piece):
            return printable(piece).replace("\n", "\n" + " " * len(label))

        began = first = last = time.perf_counter()
        print(label, end="", flush=True)
        try:
            for replies in talk.replies({0: text}, how):
                if reply is None:
                    first = time.perf_counter()
                reply = replies[0]
                sure = reply.text if reply.ended else how[0].sure(reply.text)
                print(indented(sure[len(shown) :]), end="", flush=True)
                # What is sure may be shorter than before: an end that begins like a stop text is held back.
                shown = max(shown, sure, key=len)
                if not reply.ended:
                    last = time.perf_counter()
        except BaseException:
            print()
            raise
        assert reply is not None
        print(" ..." if reply.ended == "length" else "")
        return reply, first - began, last - first

    def command(self, line: str, entry: dict[str, Any] | None = None) -> None:
        """Does what a line that begins with a slash asks for; what is compared is written into its entry of a record.

        Raises:
          UserError: for a command that there is not, or that cannot be done; nothing has changed then.
        """
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        commands: dict[str, Callable[..., None]] = {
            "memory": self._memory, "save": self._save, "load": self._load, "fork": self._fork, "back": self._back,
            "forget": self._forget, "reset": self._reset, "help": lambda: print(HELP),
            "compare": lambda text="": self._compare(text, {} if entry is None else entry),
        }  # fmt: skip
        if name not in commands:
            raise unknown("command", f"/{name}", (f"/{known}" for known in commands))
        takes = {"save": "FILE", "load": "FILE", "forget": "N"}.get(name, "")
        if bool(rest) != bool(takes) and name != "compare":
            raise UserError(f"/{name} takes {takes or 'nothing'}; {rest!r} was given")
        commands[name](*([rest] if rest else []))

    def _memory(self) -> None:
        slots, ours, full = self.talk.memory_bytes()
        cache, turns = self.talk.state.cache, self.talk.state.turns[0]
        kind, segment = (np.asarray(x[0]) for x in (cache.slots.kind, cache.slots.segment))
        method, kept = self.talk.engine.experiment.method, kind == Kind.MEMORY
        print(
            f"{slots} slots, {ours / 2**20:.2f} MiB; full context would hold {self.talk.state.tokens[0]:,} tokens, "
            f"{full / 2**20:.2f} MiB"
        )
        if method.mix is not None or method.eviction is not None or not method.remembers:
            what = "keeps no memory" if not method.remembers else f"its {kept.sum()} slots are of all turns together"
            print(f"{method.name}: {what}")
            return
        known, of_turns = self._past or [], np.zeros(kept.shape, bool)
        for number, (first, end) in enumerate(turns):
            # bool [S]
            of = kept & (segment >= first) & (segment < end)
            of_turns |= of
            said = f"  {printable(known[number][0])[:60]}" if number < len(known) else ""
            print(f"turn {number + 1:3}  {of.sum()} slots{said}")
        if rest := int((kept & ~of_turns).sum()):
            print(f"{rest} slots of text that was read")
        if others := int(((kind != Kind.PAD) & ~kept).sum()):
            print(f"{others} slots of text as it is")

    def _save(self, path: str) -> None:
        # Not by pathlib, which raises for a name that is none: it is refused in words when it is written.
        if os.path.exists(path):
            files.read(path)  # what is no memory is not overwritten
        self.talk.save(0, path)
        print(f"wrote {path}, {Path(path).stat().st_size:,} bytes")

    def _load(self, path: str) -> None:
        self.talk.load(0, path)
        self._past, self._last, self.system = None, None, ""
        print(f"goes on from {path}: {len(self.talk.state.turns[0])} turns, {self.talk.state.tokens[0]:,} tokens read")

    def _fork(self) -> None:
        self._behind.append(self._here())
        print(f"this is a copy; /back returns to the conversation as it is now ({len(self._behind)} to return to)")

    def _back(self) -> None:
        if not self._behind:
            raise UserError("there is nothing to return to; /fork makes a copy")
        self._put(self._behind.pop())
        print(f"back at turn {len(self.talk.state.turns[0])}")

    def _forget(self, number: str) -> None:
        if not number.isdecimal() or not number.isascii():
            raise UserError(f"/forget takes the number of a turn, as /memory shows them; {number!r} was given")
        slots = self.talk.forget(0, int(number) - 1)
        self._last = None
        print(f"turn {int(number)} is forgotten, {slots} slots; later turns, which have seen it, stay")

    def _reset(self) -> None:
        self._anew()
        self._past, self._last = [], None
        print("the memory is empty" + ", but for the system message" * bool(self.system))

    def _compare(self, text: str, entry: dict[str, Any]) -> None:
        """Answers a text, or else the last turn, from four memories, of which each is then what it was."""
        told = self._here()
        if not text:
            if self._last is None:
                raise UserError("there is no last turn to compare; say something first, or give what to ask")
            text, told = self._last
        compared: dict[str, Any] = {}
        # Each begins from the same state, and the conversation is put back whatever happens.
        with self._at(told):
            compared["memory"] = self._answer(self.talk, text, "memory")
        if told.past is None:
            print("full     not known here: the conversation came from a file, or began with a text")
        else:
            compared["full"] = self._answer(self._from_all(told, text), text, "full")
        with self._at(told):
            self._anew()
            # The turns of `OTHER` have the same form: what differs from the right memory is its contents.
            self.talk.tell({0: OTHER})
            compared["another"] = self._answer(self.talk, text, "another")
        with self._at(told):
            self._anew()
            compared["nothing"] = self._answer(self.talk, text, "nothing")
        entry["compared"] = compared

    def _answer(self, talk: Conversations, text: str, name: str) -> dict[str, Any]:
        """The reply from one of the memories, behind the bytes that this held before it was asked."""
        _, held, _ = talk.memory_bytes()
        reply, _, _ = self._reply(talk, text, f"{name:8}{held / 2**20:6.2f} MiB  ")
        return {"reply": reply.text, "bytes": held}

    def _alone(self, text: str) -> str:
        return self.talk.say_alone({0: text}, system=self.system, max_tokens=self.max_tokens)[0]

    def _anew(self) -> None:
        self.talk.reset(0)
        if self.system:
            self.talk.instruct({0: self.system})

    def _here(self) -> _Told:
        return _Told(self.talk.session(0), self._past, self.system)

    def _from_all(self, told: _Told, text: str) -> Conversations:
        """The base with all that was told as text in its cache, and room for the answer; kept for the next text."""
        experiment = self.talk.engine.experiment
        question = self.talk.engine.question(text, first=not told.session.tokens)
        needed = told.session.tokens + len(question) + self.max_tokens + 64
        full = self._full[0] if self._full is not None else None
        if full is None or full.engine.experiment.config.cache.raw_capacity < needed:
            how = self.talk.how
            base = on_all_text(experiment, needed)
            full = Conversations(base, sampling=how.sampling, seed=how.seed, stop=how.stop)
        elif self._full is not None and (self._full[1].past, self._full[1].system) == (told.past, told.system):
            # The same past as for the text before: it stands in the kept session, and need not be read again.
            full.restore(0, self._full[1].session)
            return full
        full.reset(0)
        if told.system:
            full.instruct({0: told.system})
        if told.past:
            full.tell({0: told.past})
        self._full = full, _Told(full.session(0), told.past, told.system)
        return full

    @contextlib.contextmanager
    def _at(self, there: _Told) -> Iterator[None]:
        """The conversation as it was at another time, for as long as this lasts."""
        here = self._here()
        self._put(there, last=self._last)
        try:
            yield
        finally:
            self._put(here, last=self._last)

    def _put(self, there: _Told, last: tuple[str, _Told] | None = None) -> None:
        self.talk.restore(0, there.session)
        self._past, self.system, self._last = there.past, there.system, last


def printable(text: str) -> str:
    """Text without what a terminal would take for orders."""
    return _CONTROL.sub("\ufffd", text)
