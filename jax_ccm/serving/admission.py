"""What a pool of sessions is asked for, how much of it it takes on, and how it refuses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.turns import Reply


class Missing(UserError):
    """A session that is not there."""


class Busy(UserError):
    """More was asked for at once than is allowed."""


@dataclasses.dataclass(eq=False)
class Turn:
    """A turn that waits for its answer.

    Attributes:
      text: what is said; None to be told something only.
      how: the answer is made.
      system: the message with which it begins, if it is empty; "" for none.
      told: turns before it that were answered elsewhere.
      start: the session that it goes on from; None for an empty one. One that is to be kept under this name begins if
        it is not there when its turn comes.
      keep: the session that it makes, or changes; None to keep nothing.
      snapshot: a name under which what the session has come to is kept, too; None for none.
      within: the session whose memory it goes on from under another name: it goes when that one is removed.
      shorter: whether the answer may be made shorter than `how` says, if there is no room for so much.
      about: JSON values to keep with it, or with the snapshot if there is one, made of the reply.
      hear: called with each reply so far, from another thread; the last one has `Reply.ended`. With what went wrong
        instead, if something did.
    """

    text: str | None
    how: Answering
    hear: Callable[[Reply | Exception], None]
    system: str = ""
    told: Sequence[tuple[str, str]] = ()
    start: str | None = None
    keep: str | None = None
    snapshot: str | None = None
    within: str | None = None
    shorter: bool = False
    about: Callable[[Reply], Mapping[str, Any]] = lambda reply: {}
    left: bool = False
    began: float = dataclasses.field(default_factory=time.perf_counter)
    first: float | None = None

    def leave(self) -> None:
        """Nobody waits for the answer any more: the session stays as it was, unless it is kept already."""
        self.left = True


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a pool takes on.

    Attributes:
      waiting: turns that wait or are answered at once.
      sessions: on disk.
      turns: of a session.
      disk: bytes of all sessions.
      idle: seconds after which an unused session is removed; 0 for never.
    """

    waiting: int = 256
    sessions: int = 100_000
    turns: int = 100_000
    disk: int = 2**40
    idle: float = 0.0
