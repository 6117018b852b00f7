"""Live conversations: turns in, answers out, the past in a memory of constant size."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.data.formats import turns_a_chunk
from jax_ccm.data.pieces import Pieces
from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.cache import check, init_cache, raw_capacity
from jax_ccm.memory.closing import Closing, policy, prefill
from jax_ccm.memory.generation import Sampling, for_decoding, generate
from jax_ccm.records.parsing import require_text
from jax_ccm.rules import rows
from jax_ccm.rules.types import Kind, MemoryCache

# Chunks are padded to whole multiples, so that turns of any length share few compilations.
MULTIPLE = 32
# Most tokens that are made at a time: an interrupt waits for so many.
AT_A_TIME = 8


@dataclasses.dataclass(frozen=True)
class State:
    """What a conversation has come to.

    Attributes:
      cache: the session's state.
      turns: user turns so far.
      tokens: text tokens so far.
      said: int32, the text of all turns; kept only for methods that compress all of it anew each turn.
    """

    cache: MemoryCache
    turns: int
    tokens: int
    said: np.ndarray


class Conversation:
    """One session: turns in, answers out, the past in a memory of constant size.

    What is read and closed is what training lays out for the same turns (`jax_ccm.data.formats.session`): an answer is
    made with its question in place, behind the memory of all that was said before. Then both become memory: each by
    itself, or, with ``data.unit_of_memory: exchange``, together. Where an answer saw something else than what training
    has closed chunks see, it is read once more.

    Attributes:
      state: replaced as a whole once a turn is answered, so that one that is refused or interrupted changes nothing.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        max_tokens: int = 48,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        closing: Closing | None = None,
    ):
        """Starts an empty session.

        Args:
          experiment: model, adapter, method and tokenizer.
          max_tokens: most tokens of an answer.
          sampling: how tokens are drawn.
          seed: of the sampling.
          closing: where text is compressed while it is read and made; None for turn by turn.
        """
        if experiment.tokenizer is None or experiment.config.data.format not in ("dialogue", "online"):
            raise UserError(
                f"data.format is {experiment.config.data.format!r}; only a model of dialogues or of questions can chat"
            )
        self.experiment = experiment
        self.pieces = Pieces.of(experiment.config.data, experiment.tokenizer)
        self.sampling, self.max_tokens, self.closing = sampling, max_tokens, closing
        policy(experiment.method, closing, query=True)  # refuses what cannot be
        self.key = jax.random.key(seed)
        self.state = State(self.empty(), 0, 0, np.zeros(0, np.int32))
        self.decoder = for_decoding(experiment.model, self.state.cache)
        self.stops = sorted({*experiment.ends, *self._turn_ends()})

    @property
    def cache(self) -> MemoryCache:
        """The session's state."""
        return self.state.cache

    @property
    def turns(self) -> int:
        """User turns so far."""
        return self.state.turns

    def empty(self) -> MemoryCache:
        """A cache of the sizes that the config gives."""
        config = self.experiment.config.cache
        return init_cache(
            self.experiment.model,
            self.experiment.method,
            1,
            memory_capacity=config.memory_capacity,
            raw_capacity=config.raw_capacity,
            overflow=config.overflow,
        )

    def say(self, text: str) -> str:
        """Answers a turn from the memory, then compresses the turn and its answer into it.

        Raises:
          UserError: if the turn cannot be answered; the session is then as it was.
        """
        question, state, method = self.question(text, first=self.turns == 0), self.state, self.experiment.method
        if method.context == "joined":
            self._require_room(len(state.said) + len(question) + len(self.pieces.answer) + self.max_tokens)
        before = self.empty() if method.context == "dropped" else state.cache
        tokens, after = self._answer(before, question)
        chunks = self.chunks(question, tokens)
        said = state.said
        if method.context == "joined":
            # All that was said is one chunk.
            said = np.concatenate([said, *chunks])
            after = self._close(self._read(self.empty(), said))
        elif method.context == "dropped":
            after = self._close(after)
        elif (rest := self._behind(question, tokens, chunks)) is not None:
            after = self._close(self._read(after, rest) if len(rest) else after)
        elif self.closing is not None:
            after = self._close(after)
        else:
            after = before
            for chunk in chunks:
                after = self._close(self._read(after, chunk))
        check(after)
        reply = self._text(tokens)
        self.state = State(after, state.turns + 1, state.tokens + sum(map(len, chunks)), said)
        return reply

    def say_without_memory(self, text: str) -> str:
        """What the same model answers to this turn alone."""
        return self._text(self._answer(self.empty(), self.question(text, first=True))[0])

    def question(self, text: str, *, first: bool) -> np.ndarray:
        """int32 tokens of a user turn, with those that open it.

        Raises:
          UserError: if there is nothing to read in it, or no text.
        """
        require_text(text, "the turn")
        begins = first or self.experiment.method.context == "dropped"
        (tokens,) = (self.pieces.first if first else self.pieces.later)([text])
        if not text.strip() or not len(tokens):
            raise UserError("a turn is empty; say something")
        opening = self.pieces.start if begins else self.pieces.separator
        return np.concatenate([opening, self.pieces.heads["user"], tokens])

    def chunks(self, question: np.ndarray, answer: np.ndarray) -> list[np.ndarray]:
        """What becomes memory of an exchange, each int32 array as a chunk: as training lays it out.

        Args:
          question: int32 tokens, opened.
          answer: int32 tokens, not opened; none if the model had nothing to say, which is no turn.
        """
        pieces = self.pieces
        asked = np.concatenate([question, pieces.tails["user"]])
        if not len(answer):
            return [asked]
        said = np.concatenate([answer, pieces.tails["assistant"]])
        if turns_a_chunk(self.experiment.config.data) == 1:
            return [asked, np.concatenate([pieces.separator, pieces.heads["assistant"], said])]
        return [np.concatenate([question, pieces.answer, said])]

    def memory_bytes(self) -> tuple[int, int, int]:
        """Live slots (memory, and text that stays); their bytes; and what full context would hold by now."""
        slots = int(np.asarray(self.cache.slots.live).sum())
        sizes = self.experiment.model_config
        each, mixed = sizes.kv_bytes_per_slot(self.cache.k.dtype.itemsize), sizes.kv_bytes_per_slot(4)
        ours = slots * each + self.experiment.method.mixed_slots * mixed
        return slots, ours, self.state.tokens * each

    def _behind(self, question: np.ndarray, answer: np.ndarray, chunks: list[np.ndarray]) -> np.ndarray | None:
        """int32, what is still to be read of an exchange before what was read for the answer can be closed.

        None if it cannot, and the exchange has to be read once more, as context.
        """
        method = self.experiment.method
        alike = method.sees_memory_in_context and Kind.QUERY in method.compresses
        read, whole = np.concatenate([question, self.pieces.answer, answer]), np.concatenate(chunks)
        apart = len(chunks) > 1 and method.chunk is None and self.closing is None
        if not alike or apart or not np.array_equal(read, whole[: len(read)]):
            return None
        return whole[len(read) :]

    def _answer(self, cache: MemoryCache, question: np.ndarray) -> tuple[np.ndarray, MemoryCache]:
        """int32 tokens of the answer, and the cache that has read the question and them."""
        cache = self._read(cache, np.concatenate([question, self.pieces.answer]), query=True)
        key, made = jax.random.fold_in(self.key, self.turns), np.zeros(0, np.int32)
        # All pieces of one size: each size is a program of its own.
        count = max(size for size in range(1, AT_A_TIME + 1) if self.max_tokens % size == 0)
        while len(made) < self.max_tokens:
            cache, tokens, lengths = generate(
                self.decoder,
                cache,
                jax.random.fold_in(key, len(made)),
                method=self.experiment.method,
                max_tokens=count,
                sampling=self.sampling,
                stop_tokens=self.stops,
                closing=self.closing,
                vocabulary=len(self.experiment.tokenizer),
            )
            made = np.concatenate([made, np.asarray(tokens)[0, : int(lengths[0])]])
            if int(lengths[0]) < count:
                break
        return made, cache

    def _text(self, tokens: np.ndarray) -> str:
        return self.experiment.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _require_room(self, tokens: int) -> None:
        """Refuses a conversation that no longer fits where all of it is compressed anew."""
        most = self.experiment.config.cache.raw_capacity
        if tokens > most:
            raise UserError(
                f"method {self.experiment.method.name!r} compresses the whole conversation anew each turn, by now up "
                f"to {tokens} tokens, which do not fit cache.raw_capacity={most}; raise it, or take a method that "
                "compresses turn by turn (method.online: true for gist)"
            )

    def _close(self, cache: MemoryCache) -> MemoryCache:
        # A method that cuts text itself has compressed what was full already.
        method = self.experiment.method
        return cache if method.chunk else _compress(self.experiment.model, cache, method=method)

    def _read(self, cache: MemoryCache, tokens: np.ndarray, *, query: bool = False) -> MemoryCache:
        size = -(-len(tokens) // MULTIPLE) * MULTIPLE
        room = raw_capacity(cache)
        if self.experiment.method.chunk or self.closing:
            room = size  # it is closed as it is read
        elif len(tokens) + (self.max_tokens + len(self.pieces.tails["assistant"])) * query > room:
            most = self.experiment.config.cache.raw_capacity
            raise UserError(
                f"a turn of {len(tokens)} tokens and an answer of up to {self.max_tokens} do not fit "
                f"cache.raw_capacity={most}; say it in several turns, or raise cache.raw_capacity"
            )
        chunk = rows.chunk([tokens], min(size, room), self.experiment.model_config.vocab_size)
        return _read(
            self.experiment.model, cache, chunk, method=self.experiment.method, query=query, closing=self.closing
        )

    def _turn_ends(self) -> tuple[int, ...]:
        """Tokens with which a turn ends: of a message, or, with dialogues as lines, those that hold a line break."""
        if self.experiment.config.data.option("chat_template"):
            return tuple(self.pieces.end[:1].tolist())
        if "\n" not in self.experiment.config.data.option("separator"):
            return ()
        texts = self.experiment.tokenizer.batch_decode([[i] for i in range(self.experiment.model_config.vocab_size)])
        return tuple(i for i, text in enumerate(texts) if "\n" in text)


_read = jax.jit(prefill, static_argnames=("method", "query", "closing"))
_compress = jax.jit(steps.compress, static_argnames="method")
