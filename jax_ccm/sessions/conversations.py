"""Live conversations: turns in, answers out, the past of each session in a memory of its own, all on one cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.memory.cache import check, remove, select
from jax_ccm.memory.closing import Closing
from jax_ccm.memory.generation import Sampling
from jax_ccm.rules.types import Kind, MemoryCache
from jax_ccm.sessions.engine import AT_A_TIME, NOTHING, Answering, Chunks, Engine
from jax_ccm.weights.identity import describe_base


@dataclasses.dataclass(frozen=True)
class State:
    """What conversations have come to, each by its row.

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


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer, as far as it is made.

    Attributes:
      text: of it.
      tokens: of which it is made.
      read: tokens of the turn that it answers, with what stands around it.
      known: text tokens that the session had read before.
      ended: "stop" (a token or text that ends it), "length" (its limit), or empty while it goes on.
      refused: why it has not become memory, and the session is as it was; None once it has, or while it goes on.
    """

    text: str
    tokens: int
    read: int
    known: int
    ended: str = ""
    refused: UserError | None = None


class Conversations:
    """Sessions that talk side by side: any of them in one call, while the others wait.

    What is read and closed is what training lays out for the same turns (`jax_ccm.data.formats.session`): an answer is
    made with its question in place, behind the memory of all that was said before. Then both become memory: each by
    itself, or, with ``data.unit_of_memory: exchange``, together. Where an answer saw something else than what training
    has closed chunks see, it is read once more.

    Attributes:
      engine: how turns are read, answered and closed.
      how: answers are made where nothing else is asked for.
      state: replaced as a whole once turns are answered, so that a call that is refused or interrupted changes nothing.
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
        self.how = Answering(sampling=sampling, seed=seed, stop=tuple(stop))
        self.state = State(self.engine.empty(), ((),) * rows, (0,) * rows, (NOTHING,) * rows)

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
        *_, replies = self.replies(turns, self._alike(turns, max_tokens), at_a_time=AT_A_TIME)
        return {row: reply.text for row, reply in replies.items()}

    def stream(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> Iterator[tuple[int, str]]:
        """`say`, with the answers as they are made: a row and what its answer goes on with, again and again.

        The turns have been said when the iterator has ended; one that is given up changes nothing.
        """
        shown = dict.fromkeys(turns, "")
        for replies in self.replies(turns, self._alike(turns, max_tokens)):
            for row, reply in replies.items():
                text = reply.text if reply.ended else self.how.sure(reply.text)
                if len(text) > len(shown[row]):
                    yield row, text[len(shown[row]) :]
                    shown[row] = text

    def replies(
        self,
        turns: Mapping[int, str],
        how: Mapping[int, Answering],
        *,
        at_a_time: int = 1,
        apart: bool = False,
        left: Collection[int] = (),
    ) -> Iterator[dict[int, Reply]]:
        """The answers to turns as they are made, again and again; with the last ones all have become memory.

        Args:
          turns: what is said, by row.
          how: each row's answer is made.
          at_a_time: most tokens between two results.
          apart: what cannot become memory is refused for itself (`Reply.refused`), and the others go on; otherwise it
            refuses the whole call.
          left: rows that nobody waits for any more, looked at between two results: they stay as they were.

        Raises:
          UserError: if one of the turns cannot be answered; all sessions are then as they were.
        """
        self._require(turns)
        engine, state = self.engine, self.state
        said = dict(enumerate(state.said))
        questions = {row: engine.question(text, first=not state.tokens[row]) for row, text in turns.items()}
        most = max(how[row].max_tokens for row in turns)
        before = engine.before(state.cache, questions, said, most)
        made, after, reply = {}, before, {}
        numbers = {row: len(state.turns[row]) for row in turns}
        for made, after, ready in engine.answers(  # noqa: B007  (the last ones are used)
            before, questions, how, at_a_time=at_a_time, numbers=numbers, left=left
        ):
            for row, tokens in made.items():
                ended = "length" if len(tokens) == how[row].max_tokens else "stop"
                reply[row] = Reply(
                    engine.text(tokens), len(tokens), len(questions[row]), state.tokens[row], ended * (row in ready)
                )
            if len(ready) < len(turns):
                yield dict(reply)
        stay = {row: question for row, question in questions.items() if row not in left}
        if stay:
            after, chunks = engine.closed(stay, {row: made[row] for row in stay}, before, after, said)
            after = after if len(stay) == len(turns) else engine.choose(stay, after, state.cache)
            refused = self._keep(after, chunks, turn=True, apart=apart)
            reply |= {row: dataclasses.replace(reply[row], refused=why) for row, why in refused.items()}
        yield reply

    def say_alone(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> dict[int, str]:
        """What the same model answers to these turns alone, without memory. Arguments and errors as `say`."""
        self._require(turns)
        engine = self.engine
        questions = {row: engine.question(text, first=True) for row, text in turns.items()}
        *_, (made, _, _) = engine.answers(engine.empty(), questions, self._alike(turns, max_tokens))
        return {row: engine.text(tokens) for row, tokens in made.items()}

    def tell(self, exchanges: Mapping[int, Sequence[tuple[str, str]]]) -> None:
        """Reads turns that were answered elsewhere into some sessions, as if they had been said here.

        Args:
          exchanges: what was said and what was answered, from old to new, by row.

        Raises:
          UserError: for empty text, or where there is no room; all sessions are then as they were.
        """
        self._require(exchanges)
        before, engine = self.state, self.engine
        try:
            for number in range(max(map(len, exchanges.values()))):
                now = {row: pairs[number] for row, pairs in exchanges.items() if number < len(pairs)}
                chunks = {}
                for row, (asked, answered) in now.items():
                    question = engine.question(asked, first=not self.state.tokens[row])
                    chunks[row] = engine.chunks(question, engine.answer(answered))
                cache = self.engine.absorb(self.state.cache, chunks, dict(enumerate(self.state.said)))
                self._keep(cache, chunks, turn=True)
        except BaseException:
            self.state = before
            raise

    def read(self, texts: Mapping[int, str]) -> None:
        """Reads a text of any length into each of some sessions: in chunks as long as a turn of the data may be.

        Args:
          texts: what is read, by row.

        Raises:
          UserError: if there is no room, or the method keeps nothing of what was said before.
        """
        self._require(texts)
        state, engine = self.state, self.engine
        chunks = {row: engine.document(text, first=not state.tokens[row]) for row, text in texts.items()}
        self._keep(engine.absorb(state.cache, chunks, dict(enumerate(state.said))), chunks, turn=False)

    def reset(self, row: int) -> None:
        """Makes a session empty.

        Raises:
          UserError: for a row that does not exist.
        """
        self._require([row])
        self._put(row, self.engine.empty(), (), 0, NOTHING)

    def restore(self, row: int, earlier: State) -> None:
        """Makes a session what it was in an earlier state; the others stay.

        Raises:
          UserError: for a row that does not exist.
        """
        self._require([row])
        self._put(row, earlier.cache, earlier.turns[row], earlier.tokens[row], earlier.said[row])

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
        method, state = self.engine.experiment.method, self.state
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
        turns = state.turns[row]
        if not 0 <= turn < len(turns):
            raise UserError(f"there is no turn {turn + 1}; the session has {len(turns)}")
        slots, (first, end) = state.cache.slots, turns[turn]
        is_of = slots.live & (slots.kind != Kind.SINK) & (slots.segment >= first) & (slots.segment < end)
        gone = np.asarray(is_of) & self.engine.mask([row])[:, None]
        self._put(row, remove(state.cache, gone), turns, state.tokens[row], state.said[row])
        return int(gone.sum())

    def fork(self, row: int, to: int) -> None:
        """Puts a copy of a session into another row.

        Raises:
          UserError: for a row that does not exist.
        """
        self._require([row, to])
        state = self.state
        self._put(to, self._everywhere(state.cache, row), state.turns[row], state.tokens[row], state.said[row])

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
        experiment = self.engine.experiment
        files.save(
            select(self.state.cache, np.asarray([row])),
            path,
            experiment.model,
            fingerprints=self.fingerprints,
            method=experiment.method,
            about={
                "base": experiment.base_name,
                "adapter": experiment.loaded.source if experiment.loaded else "untrained",
                "turns": [list(turn) for turn in self.state.turns[row]],
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
        self._put(row, self._everywhere(one, 0), held.turns, int(one.tokens[0]), NOTHING)
        return held.header["about"]

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digests of all that a session can go on with only, for files of memory."""
        from jax_ccm.evals.systems import fingerprint

        experiment, template = self.engine.experiment, self.engine.template
        digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:16]
        fixed = [
            template.start,
            template.separator,
            template.answer,
            *template.heads.values(),
            *template.tails.values(),
        ]
        return {
            "base": describe_base(experiment.model, "")["fingerprint"],
            "adapter": fingerprint(experiment.model),
            "tokenizer": digest(json.dumps(sorted(experiment.tokenizer.get_vocab().items()))),
            "template": digest(json.dumps([piece.tolist() for piece in fixed])),
        }

    def memory_bytes(self, row: int = 0) -> tuple[int, int, int]:
        """Live slots (memory, and text that stays); their bytes; and what full context would hold by now."""
        cache, sizes = self.state.cache, self.engine.experiment.model_config
        slots = int(np.asarray(cache.slots.live[row]).sum())
        each, mixed = sizes.kv_bytes_per_slot(cache.k.dtype.itemsize), sizes.kv_bytes_per_slot(4)
        ours = slots * each + self.engine.experiment.method.mixed_slots * mixed
        return slots, ours, self.state.tokens[row] * each

    def _alike(self, rows: Collection[int], max_tokens: int) -> dict[int, Answering]:
        return dict.fromkeys(rows, dataclasses.replace(self.how, max_tokens=max_tokens))

    def _keep(self, cache: MemoryCache, chunks: Chunks, *, turn: bool, apart: bool = False) -> dict[int, UserError]:
        """Makes the sessions those of the state, if they are valid.

        Args:
          cache: the sessions.
          chunks: what they have read, by row.
          turn: whether that was a turn of the user's, and its answer.
          apart: sessions that are not valid stay as they were, and the others go on.

        Returns:
          Which they are, and why.
        """
        refused = {}
        try:
            check(cache, self.engine.mask(chunks))
        except UserError:
            if not apart:
                raise
            for row in chunks:
                try:
                    check(cache, self.engine.mask([row]))
                except UserError as why:
                    refused[row] = why
            chunks = {row: parts for row, parts in chunks.items() if row not in refused}
        cache = self.engine.choose(chunks, cache, self.state.cache) if refused else cache
        state, keep_text = self.state, self.engine.experiment.method.context == "joined"
        read = [sum(map(len, chunks.get(row, ()))) for row in range(self.engine.rows)]
        before, after = np.asarray(state.cache.chunks).tolist(), np.asarray(cache.chunks).tolist()
        # Where all text is compressed anew there is one chunk, of all turns.
        ends = {row: (0 if keep_text else before[row], after[row]) for row in chunks if turn}
        self.state = State(
            cache,
            tuple((*known, *([ends[row]] if row in ends else [])) for row, known in enumerate(state.turns)),
            tuple(n + more for n, more in zip(state.tokens, read, strict=True)),
            tuple(np.concatenate([x, *chunks.get(row, ())]) if keep_text else x for row, x in enumerate(state.said)),
        )
        return refused

    def _put(
        self, row: int, sessions: MemoryCache, turns: tuple[tuple[int, int], ...], tokens: int, said: np.ndarray
    ) -> None:
        """Takes a row from other sessions."""
        at = lambda values, new: (*values[:row], new, *values[row + 1 :])
        state = self.state
        cache = self.engine.choose([row], sessions, state.cache)
        self.state = State(cache, at(state.turns, turns), at(state.tokens, tokens), at(state.said, said))

    def _everywhere(self, cache: MemoryCache, row: int) -> MemoryCache:
        """B copies of a session."""
        return select(cache, np.full(self.engine.rows, row))

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
