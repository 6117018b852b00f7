"""How sessions read, answer and close: from a cache to the next, side by side in its rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax
import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.data.config import TurnsConfig
from jax_ccm.data.formats import turns_a_chunk
from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.cache import choose, init_cache, raw_capacity
from jax_ccm.memory.closing import Closing, policy, prefill
from jax_ccm.memory.generation import Sampling, for_decoding, generate
from jax_ccm.records.parsing import require_text
from jax_ccm.rules import rows
from jax_ccm.rules.types import Kind, MemoryCache

# Chunks are padded to whole multiples, so that turns of any length share few compilations.
MULTIPLE = 32
# Most tokens that are made at a time: an interrupt waits for so many.
AT_A_TIME = 8
NOTHING = np.zeros(0, np.int32)
# int32 tokens by the row that they are for, and several arrays of them.
Texts = Mapping[int, np.ndarray]
Chunks = Mapping[int, Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Answering:
    """How an answer is made.

    Attributes:
      max_tokens: most tokens of it.
      sampling: how they are drawn.
      seed: of the sampling.
      stop: texts that end it, and are left out of it.

    Raises:
      UserError: for fewer than one token, or an empty text that ends it.
    """

    max_tokens: int = 48
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.max_tokens < 1 or not all(self.stop):
            raise UserError(
                f"max_tokens is {self.max_tokens} and the stop texts are {list(self.stop)}; give 1 or more tokens, and "
                "no empty text"
            )

    def sure(self, text: str) -> str:
        """The part of an answer in the making that will stay as it is."""
        text = text.rstrip("\ufffd")  # half a character
        open_ends = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[: len(text) - max(open_ends, default=0)]


class Engine:
    """Reads turns, makes answers and closes both, in any rows of a cache; the other rows stay as they are.

    Methods differ in what an answer may see and in what can be closed as it was read; here is where that counts.

    Attributes:
      experiment: model, adapter, method and tokenizer.
      rows: B, sessions of a cache.
      template: what turns are put together with.
      stops: ids of tokens that end an answer.
    """

    def __init__(
        self,
        experiment: Experiment,
        rows: int,
        *,
        closing: Closing | None = None,
    ):
        """Prepares for so many sessions. Arguments and errors as `Conversations`."""
        data = experiment.config.data
        if experiment.tokenizer is None or not isinstance(data, TurnsConfig):
            raise UserError(f"data.format is {data.format!r}; only a model of dialogues or of questions can chat")
        if rows < 1:
            raise UserError(f"there are {rows} rows; give 1 or more")
        policy(experiment.method, closing, query=True)  # refuses what cannot be
        assert experiment.template is not None
        self.experiment, self.rows, self.template, self.data = experiment, rows, experiment.template, data
        self.closing = closing
        self.decoder = for_decoding(experiment.model, self.empty())
        self.stops = experiment.reply_ends

    def empty(self) -> MemoryCache:
        """A cache of the sizes that the config gives."""
        config = self.experiment.config.cache
        return init_cache(
            self.experiment.model,
            self.experiment.method,
            self.rows,
            memory_capacity=config.memory_capacity,
            raw_capacity=config.raw_capacity,
            overflow=config.overflow,
        )

    def question(self, text: str, *, first: bool) -> np.ndarray:
        """int32 tokens of a user turn, with those that open it.

        Raises:
          UserError: if there is nothing to read in it, or no text.
        """
        begins = first or self.experiment.method.context == "dropped"
        tokens = self.encode(text, first=first, what="the turn")
        opening = self.template.start if begins else self.template.separator
        return np.concatenate([opening, self.template.heads["user"], tokens])

    def answer(self, text: str) -> np.ndarray:
        """int32 tokens of an answer that was made elsewhere, not opened; none for an empty one."""
        require_text(text, "the answer")
        return self.template.target([text])[0] if text.strip() else NOTHING

    def encode(self, text: str, *, first: bool, what: str) -> np.ndarray:
        require_text(text, what)
        (tokens,) = (self.template.first if first else self.template.later)([text])
        if not text.strip() or not len(tokens):
            raise UserError("a turn is empty; say something" if what == "the turn" else f"{what} is empty")
        return tokens

    def chunks(self, question: np.ndarray, answer: np.ndarray) -> list[np.ndarray]:
        """What becomes memory of an exchange, each int32 array as a chunk: as training lays it out.

        Args:
          question: int32 tokens, opened.
          answer: int32 tokens, not opened; none if the model had nothing to say, which is no turn.
        """
        template = self.template
        asked = np.concatenate([question, template.tails["user"]])
        if not len(answer):
            return [asked]
        said = np.concatenate([answer, template.tails["assistant"]])
        if turns_a_chunk(self.data) == 1:
            return [asked, np.concatenate([template.separator, template.heads["assistant"], said])]
        return [np.concatenate([question, template.answer, said])]

    def document(self, text: str, *, first: bool) -> list[np.ndarray]:
        """int32 chunks of a text, each as a turn of the user's, and at most as long as one of the data may be.

        Raises:
          UserError: for an empty text, or a method that keeps nothing of it.
        """
        method, template = self.experiment.method, self.template
        if method.context == "dropped":
            raise UserError(f"method {method.name!r} keeps nothing of what is read before a turn")
        tokens = self.encode(text, first=first, what="the text")
        around = (
            len(template.heads["user"])
            + len(template.tails["user"])
            + max(len(template.start), len(template.separator))
        )
        room = self.experiment.config.cache.raw_capacity - around
        size = max(min(self.data.max_turn_tokens, room), 1)
        chunks = []
        for at in range(0, len(tokens), size):
            opening = template.start if first and not at else template.separator
            chunks.append(
                np.concatenate([opening, template.heads["user"], tokens[at : at + size], template.tails["user"]])
            )
        return chunks

    def before(self, cache: MemoryCache, questions: Texts, said: Texts, max_tokens: int) -> MemoryCache:
        """The sessions that answers are made in.

        Raises:
          UserError: where all text is compressed anew and finds no room.
        """
        if self.experiment.method.context == "joined":
            for row, question in questions.items():
                self.require_room(len(said[row]) + len(question) + len(self.template.answer) + max_tokens)
        return self.choose(questions, self.empty(), cache) if self.experiment.method.context == "dropped" else cache

    def answers(
        self,
        cache: MemoryCache,
        questions: Texts,
        how: Mapping[int, Answering],
        *,
        at_a_time: int = AT_A_TIME,
        numbers: Mapping[int, int] | None = None,
        left: Collection[int] = (),
    ) -> Iterator[tuple[dict[int, np.ndarray], MemoryCache, set[int]]]:
        """Makes answers: their int32 tokens so far, the cache that has read them, and the rows that are ready.

        Args:
          cache: the sessions.
          questions: the turns (`question`).
          how: each row's answer is made.
          at_a_time: most tokens between two results. The cache of the last one counts.
          numbers: of the turn of each session, so that each draws other tokens; none for its first.
          left: rows that nobody waits for any more; looked at between two results.
        """
        most = max(how[row].max_tokens for row in questions)
        opened = {row: np.concatenate([question, self.template.answer]) for row, question in questions.items()}
        before, cache = cache, self.read(cache, opened, query=True, room=most)
        made, running, cut = dict.fromkeys(questions, NOTHING), set(questions), set()
        of_row = lambda row: how.get(row, Answering())
        keys = [(of_row(row).seed, (numbers or {}).get(row, 0)) for row in range(self.rows)]
        keys = _keys(*np.asarray(keys, np.uint32).T)
        # All pieces of one size: each size is a program of its own.
        whole = math.gcd(*(how[row].max_tokens for row in questions))
        count = max(size for size in range(1, at_a_time + 1) if whole % size == 0)
        for done in range(0, most, count):
            cache, tokens, lengths = generate(
                self.decoder,
                cache,
                keys,
                method=self.experiment.method,
                max_tokens=count,
                sampling=[of_row(row).sampling for row in range(self.rows)],
                stop_tokens=self.stops,
                rows=self.mask(running),
                closing=self.closing,
                vocabulary=len(self.experiment.tokenizer),
                start=done,
            )
            tokens, lengths = np.asarray(tokens), np.asarray(lengths)
            for row in sorted(running):
                made[row] = np.concatenate([made[row], tokens[row, : lengths[row]]])
                end = self._stopped(made[row], how[row].stop)
                if end is not None:
                    made[row] = made[row][:end]
                    cut.add(row)
                if end is not None or lengths[row] < count or len(made[row]) == how[row].max_tokens:
                    running.discard(row)
            running -= set(left)
            if not running:
                break
            yield dict(made), cache, set(questions) - running
        if cut:  # more was read than what counts
            again = self.read(before, {row: np.concatenate([opened[row], made[row]]) for row in cut}, query=True)
            cache = self.choose(cut, again, cache)
        yield dict(made), cache, set(questions)

    def _stopped(self, answer: np.ndarray, stops: Sequence[str]) -> int | None:
        """How many tokens of an answer stand in front of a text that ends it; None if there is none."""
        text = self._decode(answer) if stops else ""
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if not found:
            return None
        return max(n for n in range(len(answer)) if len(self._decode(answer[:n])) <= min(found))

    def closed(
        self, questions: Texts, made: Texts, before: MemoryCache, after: MemoryCache, said: Texts
    ) -> tuple[MemoryCache, dict[int, list[np.ndarray]]]:
        """Sessions whose exchange has become memory, and the chunks that it is.

        Args:
          questions: the turns.
          made: the answers.
          before: the sessions before the turns.
          after: the sessions that have read turns and answers.
          said: as for `absorb`.
        """
        method = self.experiment.method
        chunks = {row: self.chunks(question, made[row]) for row, question in questions.items()}
        if method.context == "joined":
            return self.absorb(before, chunks, said), chunks
        if method.context == "dropped":
            return self.close(after, chunks), chunks
        rest = {row: self._behind(questions[row], made[row], chunks[row]) for row in chunks}
        again = {row: chunks[row] for row in chunks if rest[row] is None and self.closing is None}
        more = {row: tokens for row, tokens in rest.items() if tokens is not None and len(tokens)}
        stands = [row for row in chunks if row not in again]
        if stands:
            after = self.close(self.read(after, more) if more else after, stands)
        if again:
            after = self.absorb(self.choose(again, before, after), again, said)
        return after, chunks

    def _behind(self, question: np.ndarray, answer: np.ndarray, chunks: Sequence[np.ndarray]) -> np.ndarray | None:
        """int32, what is still to be read of an exchange before what was read for the answer can be closed.

        None if it cannot, and the exchange has to be read once more, as context.
        """
        method = self.experiment.method
        alike = method.sees_memory_in_context and Kind.QUERY in method.compresses
        read, whole = np.concatenate([question, self.template.answer, answer]), np.concatenate(chunks)
        apart = len(chunks) > 1 and method.chunk is None and self.closing is None
        if not alike or apart or not np.array_equal(read, whole[: len(read)]):
            return None
        return whole[len(read) :]

    def absorb(self, cache: MemoryCache, chunks: Chunks, said: Texts) -> MemoryCache:
        """Sessions that have read chunks as context, and closed each.

        Args:
          cache: the sessions.
          chunks: of each row.
          said: all text before them, which methods that compress all of it anew read again.
        """
        if self.experiment.method.context == "joined":
            # All that was said is one chunk.
            chunks = {row: [np.concatenate([said[row], *parts])] for row, parts in chunks.items()}
            for (text,) in chunks.values():
                self.require_room(len(text))
            cache = self.choose(chunks, self.empty(), cache)
        for number in range(max(map(len, chunks.values()))):
            now = {row: parts[number] for row, parts in chunks.items() if number < len(parts)}
            cache = self.close(self.read(cache, now), now)
        return cache

    def mask(self, wanted: Collection[int]) -> np.ndarray:
        """``bool [B]``, true in some rows."""
        return np.isin(np.arange(self.rows), list(wanted))

    def choose(self, wanted: Collection[int], here: MemoryCache, there: MemoryCache) -> MemoryCache:
        """Some rows of one cache, and the others of another."""
        return _choose(self.mask(wanted), here, there)

    def _decode(self, tokens: np.ndarray) -> str:
        return self.experiment.tokenizer.decode(tokens, skip_special_tokens=True)

    def text(self, tokens: np.ndarray) -> str:
        return self._decode(tokens).strip()

    def require_room(self, tokens: int) -> None:
        """Refuses a conversation that no longer fits where all of it is compressed anew."""
        most = self.experiment.config.cache.raw_capacity
        if tokens > most:
            raise UserError(
                f"method {self.experiment.method.name!r} compresses the whole conversation anew each turn, by now up "
                f"to {tokens} tokens, which do not fit cache.raw_capacity={most}; raise it, or take a method that "
                "compresses turn by turn (method.online: true for gist)"
            )

    def close(self, cache: MemoryCache, wanted: Collection[int]) -> MemoryCache:
        # A method that cuts text itself has compressed what was full already.
        method = self.experiment.method
        return cache if method.chunk else _compress(self.experiment.model, cache, self.mask(wanted), method=method)

    def read(self, cache: MemoryCache, texts: Texts, *, query: bool = False, room: int = 0) -> MemoryCache:
        """Sessions that have read a text each; with room for so many tokens of an answer, and what closes it."""
        longest = max(map(len, texts.values()))
        self.require_fit(longest, room, self._recent(cache, texts))
        size, most = -(-longest // MULTIPLE) * MULTIPLE, raw_capacity(cache)
        if self.experiment.method.chunk or self.closing:
            most = size  # it is closed as it is read
        chunk = rows.chunk(
            [texts.get(row, NOTHING) for row in range(self.rows)],
            min(size, most),
            self.experiment.model_config.vocab_size,
        )
        return _read(
            self.experiment.model, cache, chunk, method=self.experiment.method, query=query, closing=self.closing
        )

    def _recent(self, cache: MemoryCache, wanted: Collection[int]) -> int:
        """Most tokens that one of some sessions still holds as text, of closed chunks and of an open one."""
        if not self.experiment.method.recent:
            return 0
        text = np.asarray(cache.slots.live & (cache.slots.kind != Kind.MEMORY) & (cache.slots.kind != Kind.SINK))
        return int(text.sum(axis=1)[list(wanted)].max(initial=0))

    def require_fit(self, tokens: int, room: int, held: int = 0) -> None:
        """Refuses a text that is too long to be read at once.

        Args:
          tokens: of the text.
          room: tokens of an answer that there must be room for, too; 0 for none.
          held: tokens that stay beside it.

        Raises:
          UserError: with what it may be.
        """
        if (left := self.room_after(tokens + held)) is not None and (left < room if room else left + self._tail < 0):
            taken = f", of which {held} are taken" * bool(held)
            raise UserError(
                f"a turn of {tokens} tokens and an answer of up to {room} do not fit cache.raw_capacity="
                f"{self.experiment.config.cache.raw_capacity}{taken}; say it in several turns, or raise "
                "cache.raw_capacity"
            )

    def room_after(self, tokens: int) -> int | None:
        """How long an answer may be behind a turn of so many tokens, less than none if there is no room for it at all.

        None where text is compressed as it is made, so that it may be of any length.
        """
        config, method = self.experiment.config.cache, self.experiment.method
        if method.chunk or self.closing:
            return None
        return config.raw_capacity + int(method.sink) - tokens - self._tail

    @property
    def _tail(self) -> int:
        return len(self.template.tails["assistant"])


_read = jax.jit(prefill, static_argnames=("method", "query", "closing"))
_compress = jax.jit(steps.compress, static_argnames="method")
_choose = jax.jit(choose)
_keys = jax.jit(jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number)))
