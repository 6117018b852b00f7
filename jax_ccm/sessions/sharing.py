"""Sessions that several threads, and several streams of one, use at once: one step at a time, in a fair order."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence

from jax.sharding import Mesh

from jax_ccm.distributed import sharding
from jax_ccm.sessions.interrupts import whole
from jax_ccm.sessions.scratch import Scratch
from jax_ccm.sessions.turns import Reply, Turn, Turns, interrupted

# What tells a call, in a thread of its own, that its caller waits for it no more; None where nobody could say so.
GIVEN_UP: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("given_up", default=None)


class GivenUp(Exception):
    """Ends a call that nobody waits for any more."""


class FairLock:
    """A lock that no thread gets twice while another one waits; a thread that has it may take it again."""

    def __init__(self):
        """Nobody has it."""
        self._door, self._lock = threading.RLock(), threading.RLock()
        self._owner, self._depth = 0, 0

    def __enter__(self) -> None:
        # Read without the lock: nobody but this thread writes this thread's number there.
        if self._owner == threading.get_ident():
            self._lock.acquire()
        else:
            # Whoever is next stands in the door: a thread that gives the lock back and asks again comes behind it.
            with self._door:
                self._lock.acquire()
            self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
        self._lock.release()


class Shared:
    """Turns of several threads on one scratch, worked on side by side.

    Whoever waits for a reply goes on with all turns that are there, one step after the other, and between two steps the
    next thread may begin a turn, look at a session or take what has been made for it. What touches a cache does so
    within `cache`; calls that change sessions hold these (`sessions`) and so come one after the other.
    """

    def __init__(self, scratch: Scratch, mesh: Mesh):
        """Nobody is there yet.

        Args:
          scratch: where turns are worked on.
          mesh: of the devices that do it. JAX knows it thread by thread.
        """
        self.scratch, self._mesh = scratch, mesh
        self._going, self._lock = Turns(scratch), FairLock()
        self._sessions = [threading.RLock() for _ in range(scratch.engine.rows)]

    @contextlib.contextmanager
    def cache(self) -> Iterator[None]:
        """Nobody else touches a cache; an interrupt comes when it is over, so that nothing of others is lost."""
        with whole(), self._lock, sharding.use(self._mesh):
            yield

    @contextlib.contextmanager
    def sessions(self, rows: Collection[int]) -> Iterator[None]:
        """Waits for the calls of other threads that change these sessions, and lets others wait."""
        with contextlib.ExitStack() as held:
            # ExitStack gives back those that it has if waiting for the next one is interrupted.
            for row in sorted(set(rows)):  # one order for all: nobody waits in a circle
                held.enter_context(self._sessions[row])
            yield

    @contextlib.contextmanager
    def change(self, *rows: int) -> Iterator[None]:
        """Holds sessions and the cache, to change what they have come to.

        Raises:
          UserError: for a session that is in the middle of a turn, whose end would undo the change.
        """
        with self.sessions(rows), self.cache():
            for row in rows:
                self.scratch.require_idle(row)
            yield

    def replies(
        self,
        rows: Collection[int],
        start: Callable[[], Sequence[Turn]],
        keep: Callable[[Sequence[Turn]], None],
        at_a_time: int = 1,
    ) -> Generator[dict[int, Reply], None, None]:
        """Goes through with turns, of which all are kept, or none; their replies as they grow.

        Args:
          rows: of the turns.
          start: makes them.
          keep: keeps them.
          at_a_time: most tokens between two results, unless another caller asks for more at once.

        Raises:
          UserError: if one of the turns cannot be answered, or its session is in the middle of another one.
        """
        turns: Sequence[Turn] = ()
        # This generator holds no lock while a result is out: each piece may be asked for by another thread.
        try:
            with self.sessions(rows), self.cache():
                turns = start()
                for turn in turns:
                    self._going.join(turn)
            before = _grown(turns)
            while True:
                with self.cache():
                    over = self._step(turns, before, at_a_time)
                    if over:
                        keep(turns)
                    now, replies = _grown(turns), {turn.row: turn.reply for turn in turns}
                if over:
                    break
                if now != before:
                    yield replies
                before = now
        finally:
            with self.cache():
                for turn in turns:
                    # Rows may be lost and claimed by another turn since: that one stays.
                    if self._going.running.get(turn.row) is turn:
                        self._going.leave(turn.row)
        # Behind the end: whoever sees the last replies may begin a turn in these rows at once.
        yield replies

    def _step(self, turns: Sequence[Turn], before: tuple[int, int], at_a_time: int) -> bool:
        """Goes on by a little, unless another thread has; whether these turns are over."""
        self._require(turns)
        # Where another caller's step has brought something, that is shown before the next step is made.
        if not _over(turns) and _grown(turns) == before:
            try:
                self._going.step(at_a_time)
            except BaseException:
                self.scratch.lose()  # what was made may have reached some turns and not others
                raise
            self._require(turns)
        return _over(turns)

    def _require(self, turns: Sequence[Turn]) -> None:
        given_up = GIVEN_UP.get()
        if given_up is not None and given_up.is_set():
            raise GivenUp
        for turn in turns:
            if turn.refused is not None:
                raise turn.refused
            if not self.scratch.owns(turn.row, turn):
                raise interrupted(turn.row)


def _over(turns: Sequence[Turn]) -> bool:
    return all(turn.over for turn in turns)


def _grown(turns: Sequence[Turn]) -> tuple[int, int]:
    """Another pair for each step that gave some of them tokens, or ended one."""
    return sum(len(turn.made) for turn in turns), sum(turn.over for turn in turns)
