"""Any number of sessions on the few rows of a cache: seated when they speak, the longest idle on disk."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.serving.admission import Busy, Limits, Missing, Turn
from jax_ccm.serving.metrics import Metrics
from jax_ccm.serving.store import RESPONSE, Store
from jax_ccm.sessions import turns
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.turns import Reply

log = logging.getLogger("jax_ccm.serve")


class Pool:
    """Sessions by name. One thread does all that touches the cache.

    Turns are answered side by side: each takes a row as soon as one is free, between the tokens of the others, and
    gives it back when it ends.
    """

    def __init__(
        self, talk: Conversations, store: Store, *, durable: bool = True, limits: Limits = Limits(), metrics: Metrics
    ):
        """Begins to answer.

        Args:
          talk: conversations; their rows are the pool's.
          store: where sessions are kept.
          durable: a turn is on disk before its answer ends; otherwise when its session leaves its row.
          limits: how much it takes on.
          metrics: what is counted.
        """
        self.talk, self.store, self.durable, self.limits, self.metrics = talk, store, durable, limits, metrics
        self._rows: OrderedDict[str, int] = OrderedDict()  # by name, the longest idle first
        # By name, what is to be kept with sessions whose last turn is not on disk yet.
        self._dirty: dict[str, Mapping[str, Any]] = {}
        self._waiting: list[Turn] = []
        # What `do` is to call, and the session it is about.
        self._orders: list[tuple[str | None, Callable[[], None]]] = []
        self._running: list[Turn] = []  # those that have not heard their last yet
        self._seated: dict[int, Turn] = {}  # by row
        self._staying: set[str] = set()  # those that were to go, and whose files cannot be removed
        self._going = turns.Turns(talk.scratch)
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="pool", daemon=True)
        self._thread.start()

    def say(self, turn: Turn) -> None:
        """Has a turn answered.

        Raises:
          Busy: if too many wait, or the server is about to end.
        """
        with self._change:
            if self._closed:
                raise Busy("the server is shutting down; ask another one, or later")
            if len(self._waiting) + len(self._running) >= self.limits.waiting:
                raise Busy(f"{self.limits.waiting} turns are waiting; ask again later")
            self._waiting.append(turn)
            self._change.notify()

    def do(self, act: Callable[[], Any], name: str | None = None) -> Any:
        """Calls something when nothing else touches the sessions; what it returns or raises.

        Args:
          act: what is called.
          name: the session that it is about, if it is about one: turns of that one end first, and others wait.
        """
        done, result = threading.Event(), []

        def order():
            # What goes wrong with it is the asker's affair: the thread goes on for all others.
            try:
                result.append((act(), None))
            except Exception as e:
                result.append((None, e))
            done.set()

        with self._change:
            if self._closed:
                raise Busy("the server is shutting down; ask another one, or later")
            self._orders.append((name, order))
            self._change.notify()
        done.wait()
        ((value, error),) = result
        if error is not None:
            raise error
        return value

    def saved(self, name: str) -> Path:
        """The file of a session, with its last turn in it. To be called by `do`.

        Raises:
          Missing: if there is no such session.
        """
        if name in self._dirty:
            self._save(name)
        if name not in self.store:
            raise Missing(f"there is no {_kind(name)} {name!r}")
        return self.store.path(name)

    def about(self, name: str) -> Mapping[str, Any]:
        """What was kept with a session. To be called by `do`. Raises as `saved`."""
        return self._dirty[name] if name in self._dirty else files.read(self.saved(name)).header["about"]

    def put(self, name: str, path: Path) -> None:
        """Makes a file that came from elsewhere that of a session. To be called by `do`.

        Raises:
          UserError: if it does not go with what is served, or a limit is reached.
        """
        self._require_room(name, 0)
        # Checked before anything of the session that is there changes.
        held = self.talk.opened(path)[0]
        with self.store.writing(name) as there:
            files.write(held, there)
        self._staying.discard(name)
        self._dirty.pop(name, None)
        # The row has what the session was before; the next turn loads the file.
        if (row := self._rows.pop(name, None)) is not None:
            self.talk.reset(row)

    def remove(self, name: str) -> bool:
        """Removes every copy of a session; whether there was one. To be called by `do`. Raises as `erase`.

        With it go the responses that were made in it, those that went on from these, and the files it was saved to.
        """
        saved, responses = self.store.remove_saved(name), self.store.made_in(name)
        responses += [other for other, about in self._dirty.items() if about.get("session") == name]
        gone = [self.erase(each) for each in dict.fromkeys((name, *responses))]
        for row in set(range(self.talk.engine.rows)) - set(self._seated):  # where turns of it were worked on
            self.talk.scratch.put(row, self.talk.engine.nobody)
        return saved or any(gone)

    def erase(self, name: str) -> bool:
        """Removes a session, but not what was made of it; whether it was there. To be called by `do`.

        Raises:
          Unkept: if its file cannot be removed; then it is as it was.
        """
        # The file first: if it cannot be removed, the row still has the session, and nothing was changed.
        found = self.store.remove(name)
        row, dirty = self._rows.pop(name, None), self._dirty.pop(name, None)
        if row is not None:
            self.talk.reset(row)
        self._staying.discard(name)
        return found or dirty is not None

    def names(self) -> set[str]:
        """Of all sessions. To be called by `do`."""
        return {*self.store.names(), *self._rows}

    def slots(self) -> list[dict[str, Any]]:
        """The sessions that have a row, as llama.cpp shows its slots. To be called by `do`."""
        # A session in its first turn has a row, but no entry in `_rows` before that turn is kept.
        busy = {turn.keep: row for row, turn in self._seated.items() if turn.keep is not None}
        rows, state = {**busy, **self._rows}, self.talk.state
        return [
            {
                "id": name, "is_processing": name in busy, "n_ctx": int(state.cache.k.shape[2]),
                "n_past": state.tokens[row] if name in self._rows else 0,
            }
            for name, row in rows.items()
            if not name.startswith(RESPONSE)  # whoever knows the name of one may go on from it
        ]  # fmt: skip

    def require_disk(self) -> None:
        """Raises `Busy` unless one more file may be kept. To be called by `do`."""
        count, size = self.store.size()
        if count + len(self._dirty) >= self.limits.sessions or size >= self.limits.disk:
            raise Busy(
                f"this server keeps {count:,} sessions in {size:,} bytes, as many as it may "
                f"({self.limits.sessions:,} in {self.limits.disk:,}); remove one"
            )

    def live(self) -> int:
        """Sessions that have a row."""
        return len(self._rows)

    def close(self) -> None:
        """Answers what waits, keeps all that is not on disk yet, and ends."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    # What follows is done by the thread.

    def _work(self) -> None:
        with sharding.use(self.talk.engine.experiment.mesh):
            self._serve()

    def _serve(self) -> None:
        while True:
            with self._change:
                while not (self._waiting or self._orders or self._seated or self._closed):
                    # Wakes up by itself only to look for sessions that have been idle for too long.
                    self._change.wait(timeout=60)
                    if self.limits.idle and not self._waiting:
                        break
                busy = _names(self._running)
                # An order about a session waits for its turns, and later turns wait for the order (`taken`).
                orders = [(name, order) for name, order in self._orders if name not in busy]
                self._orders = [(name, order) for name, order in self._orders if name in busy]
                joining = self._next(busy | {name for name, _ in self._orders if name is not None})
                if self._closed and not (orders or joining or self._seated):
                    break
            # Without the lock, so that others may ask in the meantime.
            for _, order in orders:
                order()
            self._expire(busy)
            for turn in joining:
                self._join(turn)
            self._go_on()
        # Without `durable` these turns were acknowledged, and are on disk nowhere.
        for name in list(self._dirty):
            try:
                self._save(name)
            except UserError:
                log.exception("the session %r is lost", name)  # and the others are not

    def _next(self, taken: set[str]) -> list[Turn]:
        """As many turns as there are rows for, of a session one at a time."""
        found = []
        for turn in list(self._waiting):
            names = _names([turn])
            if turn.left:
                self._waiting.remove(turn)
            elif len(self._seated) + len(found) < self.talk.engine.rows and not names & taken:
                self._waiting.remove(turn)
                self._running.append(turn)
                found.append(turn)
            # Also of turns that stay: later ones of the same session must not overtake them.
            taken = taken | names
        return found

    def _join(self, turn: Turn) -> None:
        """Seats a turn; it is read and answered from now on."""
        row = None
        try:
            row = self._seat(turn.start, turn.keep)
            if turn.keep is not None:
                # Before it is read: what cannot be kept need not be answered.
                self._require_room(turn.keep, len(self.talk.state.turns[row]) + len(turn.told))
                if turn.snapshot is not None:
                    self._require_room(turn.snapshot, 0)
            self._going.join(
                self.talk.turn(row, turn.text, turn.how, system=turn.system, told=turn.told, shorter=turn.shorter)
            )
        except Exception as e:
            if row is not None:
                self._unseat(row)
            self._end(turn, e)
            return
        self._seated[row] = turn
        self.metrics.observe("batch", len(self._seated))

    def _go_on(self) -> None:
        """Goes on with all turns by a little; each hears its own replies, and what went wrong with it."""
        for row, turn in list(self._seated.items()):
            if turn.left:
                self._stand_up(row, turn, None)
        try:
            moved = self._going.step()
        except Exception as e:
            # A program that fails takes the donated scratch along: nobody's row can be gone on with.
            for row, turn in list(self._seated.items()):
                self._stand_up(row, turn, e)
            return
        for row in sorted(moved):
            turn, going = self._seated[row], self._going.running[row]
            if going.over:
                self._settle(row, turn, going)
                continue
            if turn.first is None:
                turn.first = time.perf_counter()
                self.metrics.observe("first_token", turn.first - turn.began)
            # An answer may have ended while its memory is still made: its end is heard when it is kept, and not before.
            turn.hear(dataclasses.replace(going.reply, ended=""))

    def _settle(self, row: int, turn: Turn, going: turns.Turn) -> None:
        """Keeps what a turn has come to, then lets its last reply be heard."""
        reply = going.reply
        try:
            if going.refused is not None:
                raise going.refused
            if not turn.left and turn.keep is not None:
                # A copy, to return to if the disk takes no file.
                before = self.talk.session(row)
                self.talk.keep([going])
                about = turn.about(reply)
                try:
                    # The snapshot first: killed between the two, the session is as its last acknowledged turn left it,
                    # beside a response that nobody has heard of.
                    if turn.snapshot is not None:
                        self._write(turn.snapshot, row, about)
                    # What is to be kept goes with the response; the session goes on and says nothing of it.
                    self._keep(turn.keep, row, {} if turn.snapshot is not None else about)
                except Exception:
                    self._going.leave(row)
                    self.talk.restore(row, before)
                    if turn.snapshot is not None:
                        self._drop(turn.snapshot)
                    raise
        except Exception as e:
            self._stand_up(row, turn, e)
            return
        self.metrics.add("tokens_read", reply.read)
        self.metrics.add("tokens_made", reply.tokens)
        self._stand_up(row, turn, reply)

    def _stand_up(self, row: int, turn: Turn, what: Reply | Exception | None) -> None:
        """Ends a turn that was seated; its row is free."""
        self._going.leave(row)
        del self._seated[row]
        self._unseat(row)
        self._end(turn, what)

    def _unseat(self, row: int) -> None:
        """Clears a row, unless it is that of a session: that one is as it was, or what it has become."""
        if row not in self._rows.values():
            self.talk.reset(row)

    def _end(self, turn: Turn, what: Reply | Exception | None) -> None:
        """Lets the last be heard of a turn, which waits no more: whoever hears it may ask again at once."""
        with self._change:
            self._running.remove(turn)
        if what is not None:
            turn.hear(what)

    def _require_room(self, name: str, turns: int) -> None:
        if turns >= self.limits.turns:
            raise Busy(f"the session {name!r} has {turns} turns, as many as this server allows")
        if name in self._rows or name in self.store:
            return
        self.require_disk()

    def _seat(self, start: str | None, keep: str | None) -> int:
        """The row in which a session speaks now."""
        # What is kept under its own name begins with its first turn; whatever else is gone on from must be there.
        if start is not None and start not in self._rows and start not in self.store:
            if start != keep:
                raise Missing(f"there is no {_kind(start)} {start!r}")
            start = None
        if start is not None:
            self.store.touch(start)
        if start is not None and start == keep and start in self._rows:
            self._rows.move_to_end(start)
            return self._rows[start]
        row = self._vacate(start)
        try:
            if start is None:
                # The row may hold what somebody else left in it.
                self.talk.reset(row)
            elif start in self._rows:
                # A copy, as of a file: a response stays as it is, whatever goes on from it.
                self.talk.fork(self._rows[start], row)
            else:
                self.talk.load(row, self.store.path(start))
                self.metrics.add("loads", 1)
        except Exception:
            # The row is nobody's now, and nobody who is deleted is looked for in it.
            self.talk.reset(row)
            raise
        # A row becomes that of a new session in `_keep`, when the turn is over.
        if start is not None and start == keep:
            self._rows[start] = row
        return row

    def _vacate(self, start: str | None) -> int:
        """A row for somebody else: an empty one, or that of the longest idle session, which goes to disk.

        The row of ``start`` is taken last: it is about to be copied from.
        """
        taken = {*self._rows.values(), *self._seated}
        if empty := set(range(self.talk.engine.rows)) - taken:
            return min(empty)
        idle = [name for name, row in self._rows.items() if row not in self._seated]
        name = next((name for name in idle if name != start), None) or idle[0]
        if name in self._dirty:
            self._save(name)
        self.metrics.add("evictions", 1)
        return self._rows.pop(name)

    def _keep(self, name: str, row: int, about: Mapping[str, Any]) -> None:
        """Makes a row that of a session that has changed."""
        if self.durable:
            self._write(name, row, about)
        else:
            # In memory alone; on disk when its row is wanted, at the end, or when its file is asked for.
            self._dirty[name] = about
        # It was kept from another row: the old one has what it was before.
        if (old := self._rows.pop(name, row)) != row:
            self.talk.reset(old)
        self._rows[name] = row

    def _save(self, name: str) -> None:
        self._write(name, self._rows[name], self._dirty[name])
        del self._dirty[name]

    def _write(self, name: str, row: int, about: Mapping[str, Any]) -> None:
        with self.store.writing(name, about.get("session")) as path:
            self.talk.save(row, path, about=about)
        self._staying.discard(name)

    def _expire(self, busy: set[str]) -> None:
        if self.limits.idle:
            for name in set(self.store.older(self.limits.idle)) - busy - self._staying:
                self._drop(name)

    def _drop(self, name: str) -> None:
        """Removes what nobody asked to have removed: where that fails, the log says so, once, and all else goes on."""
        try:
            self.erase(name)
        except UserError:
            self._staying.add(name)
            log.exception("%s %r stays on disk until the server is started again", _kind(name), name)


def _kind(name: str) -> str:
    return "response" if name.startswith(RESPONSE) else "session"


def _names(of: Sequence[Turn]) -> set[str]:
    """The sessions that turns are about."""
    return {name for turn in of for name in (turn.start, turn.keep, turn.within) if name is not None}
