"""Live conversations: turns in, answers out, the past of each session in a memory of its own, all on one cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.memory.cache import put_row, remove
from jax_ccm.memory.closing import Closing
from jax_ccm.memory.generation import Sampling
from jax_ccm.rules.types import Kind, MemoryCache
from jax_ccm.sessions import kinship
from jax_ccm.sessions.engine import NOTHING, Answering, Engine
from jax_ccm.sessions.scratch import AT_A_TIME, Scratch, take
from jax_ccm.sessions.sharing import Shared
from jax_ccm.sessions.state import Session, State
from jax_ccm.sessions.turns import Exchange, Reply, Turn, interrupted


class Conversations:
    """Sessions that talk side by side: any of them in one call, or each by itself (`turn`).

    What is read and closed is what training lays out for the same turns (`jax_ccm.data.formats.session`): an answer is
    made with its question in place, behind the memory of all that was said before. Then both become memory: each by
    itself, or, with ``data.unit_of_memory: exchange``, together. Where an answer saw something else than what training
    has closed chunks see, it is read once more.

    It may be used by several threads. Calls that change the same session come one after the other; turns of different
    sessions are answered side by side. An iterator of replies has its sessions from its first result to its last, or
    until it is closed: until then they are what they were, and whatever would change them is refused, whoever asks.
    Two things are for programs of one thread: turns that they work on themselves (`turn`, `keep`), and `state`, whose
    arrays are gone once another thread has changed a session (`session` is a copy that stays).

    Attributes:
      engine: how turns are read, answered and closed.
      how: answers are made where nothing else is asked for.
      scratch: where turns are worked on until they are kept.
      state: replaced as a whole once turns are kept, so that a call that is refused or interrupted changes nothing.
    """

    def __init__(
        self,
        experiment: Experiment,
        rows: int = 1,
        *,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        closing: Closing | None = None,
        stop: Sequence[str] = (),
    ):
        """Starts empty sessions.

        Args:
          experiment: model, adapter, method and tokenizer.
          rows: B, how many sessions.
          sampling: how tokens are drawn.
          seed: of the sampling.
          closing: where text is compressed while it is read and made; None for turn by turn.
          stop: texts that end an answer, and are left out of it.

        Raises:
          UserError: for a model of other data, or a method whose text cannot be closed in that way.
        """
        self.engine = Engine(experiment, rows, closing=closing)
        self.scratch = Scratch(self.engine)
        self.how = Answering(sampling=sampling, seed=seed, stop=tuple(stop))
        self.state = State(self.engine.empty(), ((),) * rows, (0,) * rows, (NOTHING,) * rows)
        self._shared = Shared(self.scratch, experiment.mesh)

    def say(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> dict[int, str]:
        """Answers a turn in each of some sessions from its memory, then compresses turn and answer into it.

        Args:
          turns: what is said, by row.
          max_tokens: most tokens of an answer.

        Returns:
          The answers, by row.

        Raises:
          UserError: if one of the turns cannot be answered; all sessions are then as they were.
        """
        self._require(turns)
        # Held to the end of the call, so that other calls about these sessions wait. `stream` holds nothing between
        # pieces.
        with self._shared.sessions(turns):
            *_, replies = self.replies(turns, self._alike(turns, max_tokens), at_a_time=AT_A_TIME)
        return {row: reply.text for row, reply in replies.items()}

    def stream(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> Generator[tuple[int, str], None, None]:
        """`say`, with the answers as they are made: a row and what its answer goes on with, again and again.

        The turns have been said when the iterator has ended; one that is given up changes nothing.
        """
        shown = dict.fromkeys(turns, "")
        for replies in self.replies(turns, self._alike(turns, max_tokens)):
            for row, reply in replies.items():
                # Half a character, or what may be the beginning of a stop text, is held back: what was yielded cannot
                # be taken back.
                text = reply.text if reply.ended else self.how.sure(reply.text)
                if len(text) > len(shown[row]):
                    yield row, text[len(shown[row]) :]
                    shown[row] = text

    def replies(
        self, turns: Mapping[int, str], how: Mapping[int, Answering], *, at_a_time: int = 1
    ) -> Generator[dict[int, Reply], None, None]:
        """The answers to turns as they are made, again and again; with the last ones all have become memory.

        Args:
          turns: what is said, by row.
          how: each row's answer is made.
          at_a_time: most tokens between two results.

        Raises:
          UserError: if one of the turns cannot be answered; all sessions are then as they were.
        """
        self._require(turns)

        # Called within `Shared.cache`: a turn takes numbers from `state`, which another thread may be about to replace.
        def start():
            return [self.turn(row, text, how[row]) for row, text in turns.items()]

        yield from self._shared.replies(turns, start, self.keep, at_a_time)

    def turn(
        self,
        row: int,
        text: str | None,
        how: Answering | None = None,
        *,
        system: str = "",
        told: Sequence[tuple[str, str]] = (),
        shorter: bool = False,
    ) -> Turn:
        """A turn for `Turns`, which answers any number of them side by side; `keep` it once it is over.

        Args:
          row: the session; nothing else may change it until the turn has left.
          text: what is said; None to be told something only.
          how: the answer is made; None for `how`.
          system: a message with which an empty session begins, and which is never compressed; "" for none.
          told: turns before it that were answered elsewhere.
          shorter: whether the answer may be made shorter than ``how`` says, where there is no room for so much.

        Raises:
          UserError: for a row that does not exist, a text with nothing to read, or a system message in a session that
            has begun, or for a model or method that has none.
        """
        self._require([row])
        known, exchanges = self.state.tokens[row], [Exchange.instructing(self.engine, system)] if system else []
        if system and known:
            raise UserError("a system message begins a conversation, and this one has begun; reset it first")
        # A system message is always one chunk.
        known += sum(len(part.chunks[0]) for part in exchanges)
        for asked, answered in told:
            # Only what begins a session has the tokens that begin a text, so that each turn must know what was read
            # before it.
            question = self.engine.question(asked, first=not known)
            exchanges.append(Exchange(self.engine.chunks(question, self.engine.answer(answered))))
            known += sum(map(len, exchanges[-1].chunks))
        return self._turn(row, told=exchanges, text=text, how=how or self.how, shorter=shorter)

    def keep(self, turns: Sequence[Turn]) -> None:
        """Makes sessions what they have become by turns that are over and were not refused; all of them, or none.

        Raises:
          UserError: if one of the turns was interrupted.
        """
        with self._shared.cache():
            # All are checked before one is put: all of them become memory, or none.
            for turn in turns:
                if not self.scratch.owns(turn.row, turn):
                    raise interrupted(turn.row)
            for turn in turns:
                row, state = turn.row, self.state
                # Texts that were read are chunks, too, but no turns that could be forgotten.
                ends = [end for part, end in turn.exchanges if part.turn]
                read = sum(len(chunk) for part, _ in turn.exchanges for chunk in part.chunks)
                made = Session(self.scratch.take(row), (*state.turns[row], *ends), state.tokens[row] + read, turn.said)
                self._put(row, made)

    def session(self, row: int) -> Session:
        """A session as it is now, for `restore`.

        Raises:
          UserError: for a row that does not exist.
        """
        self._require([row])
        with self._shared.cache():
            state = self.state
            return Session(take(state.cache, np.int32(row)), state.turns[row], state.tokens[row], state.said[row])

    def say_alone(self, turns: Mapping[int, str], *, system: str = "", max_tokens: int = 48) -> dict[int, str]:
        """What the same model answers to these turns alone, without memory. Arguments, errors as `say`, `turn`."""
        self._require(turns)
        how, nobody = dataclasses.replace(self.how, max_tokens=max_tokens), self.engine.nobody
        told = [Exchange.instructing(self.engine, system)] if system else []

        def new(row, text):
            return Turn(self.scratch, row, lambda: nobody, told=told, text=text, how=how, keeps=False)

        def start():
            return [new(row, text) for row, text in turns.items()]

        with self._shared.sessions(turns):
            *_, replies = self._shared.replies(turns, start, lambda turns: None, AT_A_TIME)
        return {row: reply.text for row, reply in replies.items()}

    def instruct(self, systems: Mapping[int, str]) -> None:
        """Begins empty sessions with a system message each, which all later text sees and which is never compressed.

        Raises:
          UserError: as `turn`; all sessions are then as they were.
        """
        self._require(systems)
        self._all(systems, lambda row: self.turn(row, None, system=systems[row]))

    def tell(self, exchanges: Mapping[int, Sequence[tuple[str, str]]]) -> None:
        """Reads turns that were answered elsewhere into some sessions, as if they had been said here.

        Args:
          exchanges: what was said and what was answered, from old to new, by row.

        Raises:
          UserError: for empty text, or where there is no room; all sessions are then as they were.
        """
        self._require(exchanges)
        self._all(exchanges, lambda row: self.turn(row, None, told=exchanges[row]))

    def read(self, texts: Mapping[int, str]) -> None:
        """Reads a text of any length into each of some sessions: in chunks as long as a turn of the data may be.

        Args:
          texts: what is read, by row.

        Raises:
          UserError: if there is no room, or the method keeps nothing of what was said before.
        """
        self._require(texts)

        def chunks(row):
            return self.engine.document(texts[row], first=not self.state.tokens[row])

        self._all(texts, lambda row: self._turn(row, told=[Exchange(chunks(row), turn=False)]))

    def reset(self, row: int) -> None:
        """Makes a session empty.

        Raises:
          UserError: for a row that does not exist.
        """
        self.restore(row, Session(self.engine.nobody))

    def restore(self, row: int, session: Session) -> None:
        """Puts a copy of a session into a row; the other rows stay where they are.

        Raises:
          UserError: for a row that does not exist, or is in the middle of a turn.
        """
        self._require([row])
        with self._shared.change(row):
            self._put(row, session)

    def forget(self, row: int, turn: int) -> int:
        """Drops the memory of a turn and its answer, or their text where that is still there.

        What was read later, and has seen it, stays.

        Args:
          row: the session.
          turn: its number, from 0.

        Returns:
          How many slots that were.

        Raises:
          UserError: for a row or turn that does not exist, or a method whose slots are not those of one turn each.
        """
        self._require([row])
        method = self.engine.experiment.method
        reason = (
            "blends all turns into the same slots" if method.mix is not None
            else "chooses what to keep from all turns" if method.eviction is not None
            else "compresses all text anew each turn" if method.context == "joined"
            else "closes text every so many tokens, across turns" if method.chunk is not None
            else "keeps no memory of turns" if not method.remembers
            else ""
        )  # fmt: skip
        if reason:
            raise UserError(f"method {method.name!r} {reason}: there is no memory of a single turn to drop")
        with self._shared.change(row):
            session = self.session(row)
            if not 0 <= turn < len(session.turns):
                raise UserError(f"there is no turn {turn + 1}; the session has {len(session.turns)}")
            slots, (first, end) = session.cache.slots, session.turns[turn]
            # bool [1, S]. Slots of the sink belong to no turn: the first tokens of a session, and a system message.
            gone = np.asarray(slots.live & (slots.kind != Kind.SINK) & (slots.segment >= first) & (slots.segment < end))
            self._put(row, dataclasses.replace(session, cache=remove(session.cache, gone)))
        return int(gone.sum())

    def fork(self, row: int, to: int) -> None:
        """Puts a copy of a session into another row.

        Raises:
          UserError: for a row that does not exist.
        """
        self._require([row, to])
        # Sessions first and then the cache, in this order everywhere: two threads never wait for each other.
        with self._shared.sessions([row, to]), self._shared.change(to):
            self._put(to, self.session(row))

    def save(self, row: int, path: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Writes the memory of a session to a file, with where its turns lie in it.

        Args:
          row: the session.
          path: the file.
          about: JSON values to write down with it (`files.save`).

        Raises:
          UserError: for a row that does not exist, an invalid session, a file that cannot be written, or a method that
            needs the text of all turns.
        """
        self._require_memory_alone(row)
        experiment, session = self.engine.experiment, self.session(row)
        files.save(
            session.cache,
            path,
            experiment.model,
            fingerprints=self.fingerprints,
            method=experiment.method,
            about={
                "base": experiment.base_name,
                "adapter": experiment.loaded.source if experiment.loaded else "untrained",
                "turns": [list(turn) for turn in session.turns],
                **(about or {}),
            },
        )

    def load(self, row: int, path: str | Path) -> dict[str, Any]:
        """Goes on in a row from a file that `save` wrote.

        Returns:
          What `save` wrote down about it.

        Raises:
          UserError: for a row that does not exist, or a file that is damaged, of another model, adapter, tokenizer,
            template or method, or holds more than a row has room for.
        """
        self._require_memory_alone(row)
        held, one = self.opened(path)
        # `said` stays empty: methods that need it have no files.
        self.restore(row, Session(one, held.turns, int(np.asarray(one.tokens)[0])))
        return held.header["about"]

    def opened(self, path: str | Path) -> tuple[files.Held, MemoryCache]:
        """What a file holds, and the session in it. Raises as `load`; no session changes."""
        experiment, cache = self.engine.experiment, self.engine.experiment.config.cache
        held = files.read(path)
        if held.header["sessions"] != 1:
            raise UserError(f"{path} holds {held.header['sessions']} sessions; a row takes a file of one")
        one = files.load(
            held,
            experiment.model,
            fingerprints=self.fingerprints,
            method=experiment.method,
            memory_capacity=cache.memory_capacity,
            raw_capacity=cache.raw_capacity,
            overflow=cache.overflow,
        )
        return held, one

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digests of all that a session can go on with only, for files of memory."""
        return kinship.fingerprints(self.engine)

    def memory_bytes(self, row: int = 0) -> tuple[int, int, int]:
        """Live slots (memory, and text that stays); their bytes; and what full context would hold by now."""
        self._require([row])
        sizes = self.engine.experiment.model_config
        with self._shared.cache():
            state = self.state
            slots = int(np.asarray(state.cache.slots.live)[row].sum())
        # Mixed slots are also held in float32, to which the next chunk is added.
        each, mixed = sizes.kv_bytes_per_slot(state.cache.k.dtype.itemsize), sizes.kv_bytes_per_slot(4)
        ours = slots * each + self.engine.experiment.method.mixed_slots * mixed
        return slots, ours, state.tokens[row] * each

    def _alike(self, rows: Collection[int], max_tokens: int) -> dict[int, Answering]:
        return dict.fromkeys(rows, dataclasses.replace(self.how, max_tokens=max_tokens))

    def _turn(self, row: int, **options: Any) -> Turn:
        """A turn that goes on from a session as it is."""
        state = self.state
        return Turn(
            # The state as it is when this is called: the start of a turn, and again where it has to be read anew. Until
            # the turn is kept only the scratch changes.
            self.scratch, row, lambda: take(self.state.cache, np.int32(row)), known=state.tokens[row],
            number=len(state.turns[row]), said=state.said[row], **options,
        )  # fmt: skip

    def _all(self, rows: Collection[int], turn: Callable[[int], Turn]) -> None:
        """Goes through with a turn of each session, in which nothing is asked."""
        with self._shared.sessions(rows):
            list(self._shared.replies(rows, lambda: [turn(row) for row in rows], self.keep))

    def _put(self, row: int, session: Session) -> None:
        """Puts a session into a row, within `Shared.cache`."""

        def at(values, new):
            return (*values[:row], new, *values[row + 1 :])

        state = self.state
        # The old state's cache is donated: whoever still held `self.state` of before would read arrays that are gone.
        cache = _put(state.cache, session.cache, np.int32(row))
        turns, tokens = at(state.turns, session.turns), at(state.tokens, session.tokens)
        self.state = State(cache, turns, tokens, at(state.said, session.said))

    def _require(self, rows: Collection[int]) -> None:
        if not rows:
            raise UserError("there are no turns; give at least one")
        most = self.engine.rows - 1
        for row in rows:
            if not isinstance(row, int) or not 0 <= row <= most:
                raise UserError(f"there is no session {row!r}; they are numbered from 0 to {most}")

    def _require_memory_alone(self, row: int) -> None:
        self._require([row])
        method = self.engine.experiment.method
        if method.context == "joined":
            raise UserError(f"method {method.name!r} compresses all text anew each turn: its memory alone goes nowhere")


# Donated: a change costs a row, and not a copy of all of them.
_put = jax.jit(put_row, donate_argnums=0)
