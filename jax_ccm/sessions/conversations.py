"""Live conversations: turns in, answers out, the past of each session in a memory of its own, all on one cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.memory.cache import check, raw_capacity, select
from jax_ccm.memory.closing import Closing
from jax_ccm.memory.generation import Sampling
from jax_ccm.rules.types import MemoryCache
from jax_ccm.sessions.engine import AT_A_TIME, NOTHING, Chunks, Engine
from jax_ccm.weights.identity import describe_base


@dataclasses.dataclass(frozen=True)
class State:
    """What conversations have come to, each by its row.

    Attributes:
      cache: the sessions.
      turns: user turns since the session began, or was loaded.
      tokens: text tokens so far.
      said: int32, all text so far; kept only for methods that compress all of it anew each turn.
    """

    cache: MemoryCache
    turns: tuple[int, ...]
    tokens: tuple[int, ...]
    said: tuple[np.ndarray, ...]


class Conversations:
    """Sessions that talk side by side: any of them in one call, while the others wait.

    What is read and closed is what training lays out for the same turns (`jax_ccm.data.formats.session`): an answer is
    made with its question in place, behind the memory of all that was said before. Then both become memory: each by
    itself, or, with ``data.unit_of_memory: exchange``, together. Where an answer saw something else than what training
    has closed chunks see, it is read once more.

    Attributes:
      engine: how turns are read, answered and closed.
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
        self.engine = Engine(experiment, rows, sampling=sampling, seed=seed, closing=closing, stop=stop)
        self.state = State(self.engine.empty(), (0,) * rows, (0,) * rows, (NOTHING,) * rows)

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
        *_, replies = self._run(turns, max_tokens, AT_A_TIME)
        return replies

    def stream(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> Iterator[tuple[int, str]]:
        """`say`, with the answers as they are made: a row and what its answer goes on with, again and again.

        The turns have been said when the iterator has ended; one that is given up changes nothing.
        """
        shown = dict.fromkeys(turns, "")
        texts: dict[int, str] = {}
        for texts in self._run(turns, max_tokens, 1):
            for row, text in texts.items():
                sure = self.engine.sure(text)
                if len(sure) > len(shown[row]):
                    yield row, sure[len(shown[row]) :]
                    shown[row] = sure
        yield from ((row, text[len(shown[row]) :]) for row, text in texts.items() if len(text) > len(shown[row]))

    def say_alone(self, turns: Mapping[int, str], *, max_tokens: int = 48) -> dict[int, str]:
        """What the same model answers to these turns alone, without memory. Arguments and errors as `say`."""
        self._require(turns, max_tokens)
        questions = {row: self.engine.question(text, first=True) for row, text in turns.items()}
        *_, (made, _) = self.engine.answers(
            self.engine.empty(), questions, max_tokens=max_tokens, number=sum(self.state.turns)
        )
        return {row: self.engine.text(tokens) for row, tokens in made.items()}

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
        self._keep(engine.absorb(state.cache, chunks, dict(enumerate(state.said))), chunks, turns=0)

    def reset(self, row: int) -> None:
        """Makes a session empty.

        Raises:
          UserError: for a row that does not exist.
        """
        self._require([row])
        self._put(row, self.engine.empty(), 0, 0, NOTHING)

    def fork(self, row: int, to: int) -> None:
        """Puts a copy of a session into another row.

        Raises:
          UserError: for a row that does not exist.
        """
        self._require([row, to])
        state = self.state
        self._put(to, self._everywhere(state.cache, row), state.turns[row], state.tokens[row], state.said[row])

    def save(self, row: int, path: str | Path) -> None:
        """Writes the memory of a session to a file.

        Raises:
          UserError: for a row that does not exist, an invalid session, a file that cannot be written, or a method that
            needs the text of all turns.
        """
        self._require_memory_alone(row)
        one = select(self.state.cache, np.asarray([row]))
        files.save(one, path, fingerprint=self.fingerprint, method=self.engine.experiment.method)

    def load(self, row: int, path: str | Path) -> None:
        """Goes on in a row from a file that `save` wrote.

        Raises:
          UserError: for a row that does not exist, or a file of another model, adapter, method or size.
        """
        self._require_memory_alone(row)
        experiment = self.engine.experiment
        one = files.load(path, experiment.model, fingerprint=self.fingerprint, method=experiment.method)
        size = lambda cache: (cache.memory_capacity, raw_capacity(cache) - int(experiment.method.sink), cache.overflow)
        if len(one.tokens) != 1 or size(one) != size(self.state.cache):
            show = "memory_capacity {}, raw_capacity {}, overflow {}".format
            raise UserError(
                f"{path} holds {len(one.tokens)} sessions with {show(*size(one))}; a row here is one with "
                f"{show(*size(self.state.cache))}. Set the cache section of the config to that of the file"
            )
        self._put(row, self._everywhere(one, 0), 0, int(one.tokens[0]), NOTHING)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names base and adapter in files of memory."""
        from jax_ccm.evals.systems import fingerprint

        model = self.engine.experiment.model
        return f"{describe_base(model, '')['fingerprint']}-{fingerprint(model)}"

    def memory_bytes(self, row: int = 0) -> tuple[int, int, int]:
        """Live slots (memory, and text that stays); their bytes; and what full context would hold by now."""
        cache, sizes = self.state.cache, self.engine.experiment.model_config
        slots = int(np.asarray(cache.slots.live[row]).sum())
        each, mixed = sizes.kv_bytes_per_slot(cache.k.dtype.itemsize), sizes.kv_bytes_per_slot(4)
        ours = slots * each + self.engine.experiment.method.mixed_slots * mixed
        return slots, ours, self.state.tokens[row] * each

    def _run(self, turns: Mapping[int, str], max_tokens: int, at_a_time: int) -> Iterator[dict[int, str]]:
        """The answers so far, after each piece; the last ones are whole, and have become memory."""
        self._require(turns, max_tokens)
        engine, state = self.engine, self.state
        said = dict(enumerate(state.said))
        questions = {row: engine.question(text, first=not state.tokens[row]) for row, text in turns.items()}
        before = engine.before(state.cache, questions, said, max_tokens)
        made, after = {}, before
        for made, after in engine.answers(  # noqa: B007  (the last ones are used)
            before, questions, max_tokens=max_tokens, at_a_time=at_a_time, number=sum(state.turns)
        ):
            yield {row: engine.text(tokens) for row, tokens in made.items()}
        after, chunks = engine.closed(questions, made, before, after, said)
        self._keep(after, chunks, turns=1)
        yield {row: engine.text(tokens) for row, tokens in made.items()}

    def _keep(self, cache: MemoryCache, chunks: Chunks, *, turns: int) -> None:
        """Makes the sessions those of the state, if they are valid.

        Args:
          cache: the sessions.
          chunks: what they have read, by row.
          turns: how many of the user's that was.
        """
        check(cache, self.engine.mask(chunks))
        state, keep_text = self.state, self.engine.experiment.method.context == "joined"
        read = [sum(map(len, chunks.get(row, ()))) for row in range(self.engine.rows)]
        self.state = State(
            cache,
            tuple(n + turns * (row in chunks) for row, n in enumerate(state.turns)),
            tuple(n + more for n, more in zip(state.tokens, read, strict=True)),
            tuple(np.concatenate([x, *chunks.get(row, ())]) if keep_text else x for row, x in enumerate(state.said)),
        )

    def _put(self, row: int, sessions: MemoryCache, turns: int, tokens: int, said: np.ndarray) -> None:
        """Takes a row from other sessions."""
        at = lambda values, new: (*values[:row], new, *values[row + 1 :])
        state = self.state
        cache = self.engine.choose([row], sessions, state.cache)
        self.state = State(cache, at(state.turns, turns), at(state.tokens, tokens), at(state.said, said))

    def _everywhere(self, cache: MemoryCache, row: int) -> MemoryCache:
        """B copies of a session."""
        return select(cache, np.full(self.engine.rows, row))

    def _require(self, rows: Collection[int], max_tokens: int = 1) -> None:
        if not rows or max_tokens < 1:
            raise UserError(f"there are {len(rows)} turns, and max_tokens is {max_tokens}; both must be at least 1")
        most = self.engine.rows - 1
        for row in rows:
            if not isinstance(row, int) or not 0 <= row <= most:
                raise UserError(f"there is no session {row!r}; they are numbered from 0 to {most}")

    def _require_memory_alone(self, row: int) -> None:
        self._require([row])
        method = self.engine.experiment.method
        if method.context == "joined":
            raise UserError(f"method {method.name!r} compresses all text anew each turn: its memory alone goes nowhere")
