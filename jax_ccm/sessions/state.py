"""What sessions have come to: all of them on one cache, or a copy of one."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_ccm.rules.types import MemoryCache
from jax_ccm.sessions.engine import NOTHING


@dataclasses.dataclass(frozen=True)
class Session:
    """What a conversation has come to: a copy, which stays as it is.

    Attributes:
      cache: of one row.
      turns, tokens, said: as of `State`, of this session.
    """

    cache: MemoryCache
    turns: tuple[tuple[int, int], ...] = ()
    tokens: int = 0
    said: np.ndarray = dataclasses.field(default_factory=lambda: NOTHING)


@dataclasses.dataclass(frozen=True)
class State:
    """What conversations have come to, each by its row.

    Its cache is the only one: the next state takes its place in memory, and this one's is gone. `Conversations.session`
    is a copy of a row that stays.

    Attributes:
      cache: the sessions.
      turns: of each session where its turns lie, ``(first, end)`` of their chunks; text that was read is none.
      tokens: text tokens so far.
      said: int32, all text so far; kept only for methods that compress all of it anew each turn.
    """

    cache: MemoryCache
    turns: tuple[tuple[tuple[int, int], ...], ...]
    tokens: tuple[int, ...]
    said: tuple[np.ndarray, ...]
