"""``python -m jax_ccm.chat CONFIG.yaml --adapter PATH``: talks with a model that keeps a compressed memory."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, load_experiment
from jax_ccm.data.formats import turns_a_chunk
from jax_ccm.data.pieces import Pieces, sentence_ends
from jax_ccm.distributed import processes, sharding
from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.cache import check, init_cache, raw_capacity
from jax_ccm.memory.closing import Closing, policy, prefill
from jax_ccm.memory.generation import Sampling, for_decoding, generate
from jax_ccm.records import paths
from jax_ccm.records.parsing import require_text
from jax_ccm.records.paths import Folder
from jax_ccm.rules import rows
from jax_ccm.rules.types import Kind, MemoryCache

# Chunks are padded to whole multiples, so that turns of any length share few compilations.
MULTIPLE = 32
# Tokens that are made at a time: an interrupt waits for so many.
AT_A_TIME = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """Talks with a model that keeps a compressed memory of the conversation.

    After each turn what was said, question and answer, becomes memory, and its text is dropped: as two chunks, or with
    data.unit_of_memory: exchange as one. An empty line or Ctrl-D ends the conversation; Ctrl-C stops an answer. Give
    --say to put the turns on the command line instead.

    A turn that cannot be answered (too long, or no room in memory) is refused: the memory stays as it was and the
    conversation goes on. Unless it is held at a terminal, the command then exits with 2 in the end, else with 0.
    """

    adapter: Folder
    """Folder of a trained adapter, or ORG/NAME[@REVISION] on the hub."""
    say: tuple[str, ...] = ()
    """What to say, one argument a turn; none for a conversation at the keyboard."""
    compare: bool = False
    """Also answer each turn without memory: by the same model, shown this turn alone."""
    max_tokens: int = 48
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """With a temperature: only the most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Of the sampling."""
    span: int = 0
    """Compress question and answer while they are read and made, in spans of this many tokens (Sentinel tokens are
    trained on 2 to 25); 0 for turn by turn."""
    sentences: bool = False
    """With a span: end one with each sentence, too."""
    workdir: Folder | None = None
    """Where to write the conversation, as chat.json, turn by turn; not written if left out."""


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
        self.stops = sorted({*experiment.ends, *self._line_ends()})

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
        elif method.context == "dropped" or self.closing is not None:
            after = self._close(after)
        elif self._stands(question, tokens, chunks):
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
        return np.concatenate([self.pieces.start if begins else self.pieces.separator, tokens])

    def chunks(self, question: np.ndarray, answer: np.ndarray) -> list[np.ndarray]:
        """What becomes memory of an exchange, each int32 array as a chunk: as training lays it out.

        Args:
          question: int32 tokens, opened.
          answer: int32 tokens, not opened; none if the model had nothing to say, which is no turn.
        """
        if not len(answer):
            return [question]
        if turns_a_chunk(self.experiment.config.data) == 1:
            return [question, np.concatenate([self.pieces.separator, answer])]
        return [np.concatenate([question, self.pieces.answer, answer])]

    def memory_bytes(self) -> tuple[int, int, int]:
        """Live slots (memory, and text that stays); their bytes; and what full context would hold by now."""
        slots = int(np.asarray(self.cache.slots.live).sum())
        sizes = self.experiment.model_config
        each, mixed = sizes.kv_bytes_per_slot(self.cache.k.dtype.itemsize), sizes.kv_bytes_per_slot(4)
        ours = slots * each + self.experiment.method.mixed_slots * mixed
        return slots, ours, self.state.tokens * each

    def _stands(self, question: np.ndarray, answer: np.ndarray, chunks: list[np.ndarray]) -> bool:
        """Whether the text as it was read for the answer can be closed; if not, it is read once more, as context."""
        method = self.experiment.method
        alike = method.sees_memory_in_context and Kind.QUERY in method.compresses
        read = np.concatenate([question, self.pieces.answer, answer])
        return alike and (len(chunks) == 1 or method.chunk is not None) and np.array_equal(read, np.concatenate(chunks))

    def _answer(self, cache: MemoryCache, question: np.ndarray) -> tuple[np.ndarray, MemoryCache]:
        """int32 tokens of the answer, and the cache that has read the question and them."""
        cache = self._read(cache, np.concatenate([question, self.pieces.answer]), query=True)
        key, made = jax.random.fold_in(self.key, self.turns), np.zeros(0, np.int32)
        while len(made) < self.max_tokens:
            count = min(AT_A_TIME, self.max_tokens - len(made))
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
        elif len(tokens) + self.max_tokens * query > room:
            most = self.experiment.config.cache.raw_capacity
            raise UserError(
                f"a turn of {len(tokens)} tokens and an answer of up to {self.max_tokens} do not fit "
                f"cache.raw_capacity={most}; say it in several turns, or raise cache.raw_capacity"
            )
        chunk = rows.chunk([tokens], min(size, room), self.experiment.model_config.vocab_size)
        return _read(
            self.experiment.model, cache, chunk, method=self.experiment.method, query=query, closing=self.closing
        )

    def _line_ends(self) -> tuple[int, ...]:
        """Tokens that hold a line break: with dialogues as lines, the next speaker's turn begins there."""
        if "\n" not in self.experiment.config.data.option("separator"):
            return ()
        texts = self.experiment.tokenizer.batch_decode([[i] for i in range(self.experiment.model_config.vocab_size)])
        return tuple(i for i, text in enumerate(texts) if "\n" in text)


_read = jax.jit(prefill, static_argnames=("method", "query", "closing"))
_compress = jax.jit(steps.compress, static_argnames="method")


def main() -> int:
    options, config, _ = cli.parse(Options, command="jax_ccm.chat")
    processes.refuse_several(devices=True)
    experiment = load_experiment(config, adapter=options.adapter)
    with sharding.use(experiment.mesh):
        return _talk(experiment, options)


def _talk(experiment: Experiment, options: Options) -> int:
    sampling = Sampling(options.temperature, top_p=options.top_p)
    closing = None
    if options.span:
        ends = sentence_ends(experiment.tokenizer) if options.sentences and experiment.tokenizer else ()
        closing = Closing(options.span, ends, shortest=min(2, options.span))
    elif options.sentences:
        raise UserError("--sentences needs --span, the most tokens of a span")
    session = Conversation(
        experiment, max_tokens=options.max_tokens, sampling=sampling, seed=options.seed, closing=closing
    )
    record = Record(options.workdir)
    print(f"{experiment.method.name} on {experiment.base_name}; an empty line ends the conversation")
    for text in options.say or _lines():
        if options.say:
            print(f"you      {text}")
        entry: dict[str, Any] = {"you": text}
        try:
            _exchange(session, entry, compare=options.compare)
        except UserError as error:
            entry["refused"] = str(error)
            print(f"refused  {error}; the memory is as it was")
        except KeyboardInterrupt:
            if options.say:
                raise
            entry["refused"] = "interrupted"
            print("\nstopped  the memory is as it was before this turn")
        record.add(entry)
    held = not options.say and sys.stdin.isatty()
    return 2 if record.refused and not held else 0


def _exchange(session: Conversation, entry: dict[str, Any], *, compare: bool) -> None:
    """Has a turn answered; the answers go to the terminal and into its entry of the record."""
    began, text = time.perf_counter(), entry["you"]
    if compare:
        entry["without_memory"] = session.say_without_memory(text)
        print(f"without  {entry['without_memory']}")
    entry["memory"] = session.say(text)
    print(f"{'memory ' if compare else 'model  '}  {entry['memory']}")
    slots, ours, full = session.memory_bytes()
    entry |= {"slots": slots, "memory_bytes": ours, "full_context_bytes": full}
    seconds = time.perf_counter() - began
    print(f"         [{slots} slots, {ours / 2**20:.2f} MiB; full context {full / 2**20:.2f} MiB; {seconds:.1f} s]")


class Record:
    """The conversation as ``chat.json``, whole after each turn."""

    def __init__(self, folder: Path | None):
        """Begins a record; None keeps none.

        Raises:
          UserError: if the folder cannot be written to.
        """
        self._path = None if folder is None else folder / "chat.json"
        self._entries: list[dict[str, Any]] = []
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise UserError(f"--workdir {folder}: {error.strerror}; give a folder that can be written to") from None

    @property
    def refused(self) -> bool:
        """Whether a turn was not answered."""
        return any("refused" in entry for entry in self._entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Adds a turn."""
        self._entries.append(entry)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        text = json.dumps(self._entries, indent=2, ensure_ascii=False) + "\n"
        # Half a character becomes \udcXX, which JSON reads back as what it was.
        paths.write(self._path, text.encode("utf-8", "backslashreplace"))


def _lines() -> Iterator[str]:
    """Turns from the keyboard or a pipe, up to an empty line or the end."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="surrogateescape")  # what is no UTF-8 is a turn that is refused, not the end
    while True:
        try:
            line = input("you      ").removeprefix("\ufeff").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n         (an empty line or Ctrl-D ends the conversation)")
            continue
        if not line:
            return
        yield line


if __name__ == "__main__":
    cli.run(main)
