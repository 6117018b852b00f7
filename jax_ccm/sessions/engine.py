"""What sessions read and say as tokens: how turns are laid out, which end an answer, and what there is room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.data.config import TurnsConfig
from jax_ccm.data.formats import turns_a_chunk
from jax_ccm.errors import UserError
from jax_ccm.evals.scoring import base_only
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.closing import Closing, policy
from jax_ccm.memory.generation import TOP, Sampling, for_decoding
from jax_ccm.methods import build
from jax_ccm.records.parsing import require_text
from jax_ccm.rules.rows import WITH_SINK
from jax_ccm.rules.types import Kind, MemoryCache
from jax_ccm.sessions.spoken import Spoken

NOTHING = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Answering:
    """How an answer is made.

    Attributes:
      max_tokens: most tokens of it.
      sampling: how they are drawn.
      seed: of the sampling.
      stop: texts that end it, and are left out of it.
      logprobs: how many of the most likely tokens are told at each place, with their log-probabilities and that of the
        token itself; None for none of it.

    Raises:
      UserError: for fewer than one token, an empty text that ends it, or more log-probabilities than there are.
    """

    max_tokens: int = 48
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self):
        if self.logprobs is not None and not 0 <= self.logprobs <= TOP:
            raise UserError(f"logprobs is {self.logprobs}; give a number from 0 to {TOP}, or None")
        if self.max_tokens < 1 or not all(self.stop):
            raise UserError(
                f"max_tokens is {self.max_tokens} and the stop texts are {list(self.stop)}; give 1 or more tokens, and "
                "no empty text"
            )

    def sure(self, text: str) -> str:
        """The part of an answer in the making that will stay as it is."""
        text = text.rstrip("\ufffd")  # half a character
        # An answer may go on to a stop text with any end of it that such a text begins with.
        return text[: len(text) - max((_begun(text, stop) for stop in self.stop), default=0)]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text another one begins with, the most there are, and not all of it."""
    end = text[max(len(text) - len(stop) + 1, 0) :]
    # From one place to the next where it could begin: a text from a client may be as long as its request.
    at = end.find(stop[0])
    while at >= 0 and not stop.startswith(end[at:]):
        at = end.find(stop[0], at + 1)
    return len(end) - at if at >= 0 else 0


class Engine:
    """How turns become tokens and chunks of memory, the same for all sessions.

    Methods differ in what an answer may see and in what can be closed as it was read; `Engine.behind` says what that
    means for an exchange, and `jax_ccm.sessions.turns` does it.

    Attributes:
      experiment: model, adapter, method and tokenizer.
      rows: B, sessions of a cache.
      template: what turns are put together with.
      closing: where text is compressed while it is read and made; None for turn by turn.
      nobody: a cache of one empty session.
      decoder: the form of the model that reads and makes tokens.
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
        self.nobody = self.empty(1)
        # With the cache of all rows: its size decides whether unstacked layers pay.
        self.decoder = for_decoding(experiment.model, self.empty())
        self.stops = experiment.reply_ends

    def empty(self, rows: int | None = None) -> MemoryCache:
        """A cache of the sizes that the config gives, of so many rows; None for all."""
        config = self.experiment.config.cache
        return init_cache(
            self.experiment.model,
            self.experiment.method,
            self.rows if rows is None else rows,
            memory_capacity=config.memory_capacity,
            raw_capacity=config.raw_capacity,
            overflow=config.overflow,
        )

    def question(self, text: str, *, first: bool) -> np.ndarray:
        """int32 tokens of a user turn, with those that open it.

        Raises:
          UserError: if there is nothing to read in it, or no text.
        """
        # What is "dropped" between turns leaves nothing before the question: each turn begins a text.
        begins = first or self.experiment.method.context == "dropped"
        tokens = self.encode(text, first=first, what="the turn")
        opening = self.template.start if begins else self.template.separator
        return np.concatenate([opening, self.template.heads["user"], tokens])

    def instruction(self, text: str) -> np.ndarray:
        """int32 tokens of a system message, with which a session begins and which stays as it is.

        Raises:
          UserError: for an empty one, or a model or method that has none.
        """
        method = self.experiment.method
        require_text(text, "the system message")
        if not text.strip():
            raise UserError("the system message is empty; leave it out")
        if method.kept_kind is None or method.context != "chunks":
            raise UserError(
                f"method {method.name!r} keeps no text as it is, and so no system message{WITH_SINK}; or say it in the "
                "first turn"
            )
        (tokens,) = self.template.starts([text], ["this conversation"])
        assert tokens is not None
        return tokens

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
        # A chunk is read whole before it is closed, so that it has to fit the slots for raw text with all around it.
        room = self.experiment.config.cache.raw_capacity - around
        size = max(min(self.data.max_turn_tokens, room), 1)
        chunks = []
        for at in range(0, len(tokens), size):
            opening = template.start if first and not at else template.separator
            chunks.append(
                np.concatenate([opening, template.heads["user"], tokens[at : at + size], template.tails["user"]])
            )
        return chunks

    def behind(self, question: np.ndarray, answer: np.ndarray, chunks: Sequence[np.ndarray]) -> np.ndarray | None:
        """int32, what is still to be read of an exchange before what was read for the answer can be closed.

        None if it cannot, and the exchange has to be read once more, as context.
        """
        method = self.experiment.method
        read, whole = np.concatenate([question, self.template.answer, answer]), np.concatenate(chunks)
        # Where question and answer are closed one after the other, training shows the answer's chunk no text of the
        # question; the answer that was made saw it.
        apart = len(chunks) > 1 and method.chunk is None and self.closing is None
        if method.tells_queries_apart or apart or not np.array_equal(read, whole[: len(read)]):
            return None
        return whole[len(read) :]

    def spoken(self, answer: np.ndarray = NOTHING) -> Spoken:
        """The text of an answer, which is to be told of the tokens that come behind these int32 ones."""
        made = Spoken(self.experiment.tokenizer)
        made.go_on(answer)
        return made

    def require_room(self, tokens: int) -> None:
        """Refuses a conversation that no longer fits where all of it is compressed anew."""
        most = self.experiment.config.cache.raw_capacity
        if tokens > most:
            raise UserError(
                f"method {self.experiment.method.name!r} compresses the whole conversation anew each turn, by now up "
                f"to {tokens} tokens, which do not fit cache.raw_capacity={most}; raise it, or take a method that "
                "compresses turn by turn (method.online: true for gist)"
            )

    def held(self, one: MemoryCache) -> int:
        """Tokens that a session (`take_row`) still holds as text: a system message, closed chunks and an open one."""
        method, kind = self.experiment.method, np.asarray(one.slots.kind)
        # What the method keeps as its own sink is no text that a caller has put there.
        kept = max(int((kind == Kind.SINK).sum()) - method.sink, 0)
        if not method.recent:
            return kept
        return kept + int(np.isin(kind, (Kind.PAD, Kind.MEMORY, Kind.SINK), invert=True).sum())

    def require_fit(self, tokens: int, room: int, held: int = 0) -> None:
        """Refuses a text that is too long to be read at once.

        Args:
          tokens: of the text.
          room: tokens of an answer that there must be room for, too; 0 for none.
          held: tokens that stay beside it.

        Raises:
          UserError: with what it may be.
        """
        # Where nothing is answered, the tokens that end an answer need no room either.
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
        # `raw_capacity` counts no sink: that has a slot of its own, which the first tokens take.
        return config.raw_capacity + int(method.sink) - tokens - self._tail

    @property
    def _tail(self) -> int:
        return len(self.template.tails["assistant"])


def on_all_text(experiment: Experiment, tokens: int) -> Experiment:
    """The base alone, which reads all that was said as text, and room for at least so many tokens of it."""
    # A multiple of 256, so that sessions of like length mostly fit the same cache and compile nothing.
    cache = dataclasses.replace(experiment.config.cache, raw_capacity=max(-(-tokens // 256), 1) * 256)
    config = dataclasses.replace(experiment.config, cache=cache)
    return dataclasses.replace(experiment, method=base_only(build("full")), config=config)
