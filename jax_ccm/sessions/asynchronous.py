"""Live conversations for an event loop: what `Conversations` does is done in threads, and the loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.sharing import GIVEN_UP
from jax_ccm.sessions.state import Session
from jax_ccm.sessions.turns import Reply

T = TypeVar("T")


class AsyncConversations:
    """`Conversations` with ``await`` and ``async for``: nothing of it blocks the event loop.

    Turns of different sessions are answered side by side, calls about the same session in the order in which they were
    made. Cancelling a task that waits for a reply stops the reply, not the conversation: its sessions are what they
    were, unless the turn was over already. `asyncio.timeout` may stand around every call.

    A stream has its sessions from its first piece to its last, or until it is closed, as with `Conversations`. One that
    may be left early belongs into ``async with contextlib.aclosing(talk.stream(...)) as pieces``.

    Attributes:
      talk: the conversations; threads may use them at the same time.
    """

    def __init__(self, talk: Conversations):
        """For one event loop at a time.

        Args:
          talk: the conversations.
        """
        self.talk = talk
        # A thread for each session that may be in a call, and some for those who only look.
        self._threads = ThreadPoolExecutor(talk.engine.rows + 4, thread_name_prefix="conversations")
        self._asked: dict[int, list[asyncio.Future[None]]] = {}  # by session: the calls about it that are not over

    async def say(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> dict[int, str]:
        """As `Conversations.say`."""
        return await self._call(turns, self.talk.say, turns, max_tokens=max_tokens)

    def stream(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> AsyncIterator[tuple[int, str]]:
        """As `Conversations.stream`."""
        return self._stream(turns, self.talk.stream(turns, max_tokens=max_tokens))

    def replies(
        self, turns: Mapping[int, str], how: Mapping[int, Answering], *, at_a_time: int = 1
    ) -> AsyncIterator[dict[int, Reply]]:
        """As `Conversations.replies`."""
        return self._stream(turns, self.talk.replies(turns, how, at_a_time=at_a_time))

    async def say_alone(self, turns: Mapping[int, str], *, system: str = "", max_tokens: int = 48) -> dict[int, str]:
        """As `Conversations.say_alone`."""
        return await self._call(turns, self.talk.say_alone, turns, system=system, max_tokens=max_tokens)

    async def instruct(self, systems: Mapping[int, str]) -> None:
        """As `Conversations.instruct`."""
        await self._call(systems, self.talk.instruct, systems)

    async def tell(self, exchanges: Mapping[int, Sequence[tuple[str, str]]]) -> None:
        """As `Conversations.tell`."""
        await self._call(exchanges, self.talk.tell, exchanges)

    async def read(self, texts: Mapping[int, str]) -> None:
        """As `Conversations.read`."""
        await self._call(texts, self.talk.read, texts)

    async def session(self, row: int) -> Session:
        """As `Conversations.session`."""
        return await self._call([row], self.talk.session, row)

    async def restore(self, row: int, session: Session) -> None:
        """As `Conversations.restore`."""
        await self._call([row], self.talk.restore, row, session)

    async def reset(self, row: int) -> None:
        """As `Conversations.reset`."""
        await self._call([row], self.talk.reset, row)

    async def forget(self, row: int, turn: int) -> int:
        """As `Conversations.forget`."""
        return await self._call([row], self.talk.forget, row, turn)

    async def fork(self, row: int, to: int) -> None:
        """As `Conversations.fork`."""
        await self._call([row, to], self.talk.fork, row, to)

    async def save(self, row: int, path: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """As `Conversations.save`."""
        await self._call([row], self.talk.save, row, path, about=about)

    async def load(self, row: int, path: str | Path) -> dict[str, Any]:
        """As `Conversations.load`."""
        return await self._call([row], self.talk.load, row, path)

    async def memory_bytes(self, row: int = 0) -> tuple[int, int, int]:
        """As `Conversations.memory_bytes`."""
        return await self._call([row], self.talk.memory_bytes, row)

    async def _call(self, rows: Collection[int], act: Callable[..., T], *given: Any, **named: Any) -> T:
        """Calls something in a thread once all earlier calls about these sessions are over."""
        async with self._in_order(rows):
            return await self._run(act, *given, **named)

    async def _stream(self, rows: Collection[int], pieces: Generator[T, None, None]) -> AsyncIterator[T]:
        # `next` without a default would raise StopIteration in the thread, which no future can carry.
        end: Any = object()

        def following() -> T:
            return next(pieces, end)

        try:
            # Until the first piece the calls before it are waited for. From then on the sessions are claimed in the
            # scratch, and calls that would change them are refused: one that waited for a stream that nobody reads on
            # would never end.
            async with self._in_order(rows):
                piece = await self._run(following)
            while piece is not end:
                yield piece
                piece = await self._run(following)
        finally:
            # In a thread, too: closing waits for the cache, which another turn may hold.
            await self._run(pieces.close)

    @contextlib.asynccontextmanager
    async def _in_order(self, rows: Collection[int]) -> AsyncIterator[None]:
        """Waits until the calls about these sessions that were made before are over."""
        # No await up to the end of the loop: calls are in the order in which they come here. All earlier calls are
        # waited for, not the last one alone: that one may be cancelled while an older one still runs.
        before = {call for row in rows for call in self._asked.get(row, ())}
        over = asyncio.get_running_loop().create_future()
        for row in set(rows):
            self._asked.setdefault(row, []).append(over)
        try:
            if before:
                await asyncio.wait(before)
            yield
        finally:
            # Also for a call that was cancelled while it waited: those behind it must not wait for ever.
            over.set_result(None)
            for row in set(rows):
                self._asked[row].remove(over)
                if not self._asked[row]:
                    del self._asked[row]

    async def _run(self, act: Callable[..., T], *given: Any, **named: Any) -> T:
        """Calls something in a thread; a task that is cancelled has it stop, and waits until it has."""
        # `run_in_executor` takes no context along. The flag is seen by this call alone, in whatever thread it runs.
        given_up, context = threading.Event(), contextvars.copy_context()
        context.run(GIVEN_UP.set, given_up)

        def work() -> T:
            return context.run(act, *given, **named)

        done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        # Cancelling the future would not stop the thread: it sees the flag at its next step, and until then the
        # sessions are in the middle of a turn.
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            given_up.set()
            while not done.done():  # it is soon, however often the task is cancelled
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([done])
            done.exception()  # nobody waits for it
            raise
