"""``python -m jax_ccm.chat CONFIG.yaml --adapter PATH``: talks with a model that keeps a compressed memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ccm import cli, layout, memory, processes, sharding, steps
from jax_ccm.closing import Closing, policy, prefill
from jax_ccm.data.pieces import Pieces, sentence_ends
from jax_ccm.errors import UserError
from jax_ccm.experiment import Experiment, load_experiment
from jax_ccm.generate import Sampling, for_decoding, generate
from jax_ccm.types import Kind, MemoryCache

# Chunks are padded to whole multiples, so that turns of any length share few compilations.
MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """Talks with a model that keeps a compressed memory of the conversation.

    After each turn what was said, question and answer, becomes memory, and its text is dropped. An empty line or Ctrl-D
    ends the conversation. Give --say to put the turns on the command line instead.
    """

    adapter: Path
    """A trained adapter."""
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
    workdir: Path | None = None
    """Where to write the conversation, as chat.json; not written if left out."""


class Conversation:
    """One session: turns in, answers out, the past in a memory of constant size.

    Attributes:
      cache: the session's state.
      turns: user turns so far.
      said: int32, all tokens so far; kept only for methods that compress all of them anew each turn.
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
        self.turns = 0
        self.cache = self.empty()
        self.decoder = for_decoding(experiment.model, self.cache)
        self.said = np.zeros(0, np.int32)

    def empty(self) -> MemoryCache:
        """A cache of the sizes that the config gives."""
        config = self.experiment.config.cache
        return memory.init_cache(
            self.experiment.model,
            self.experiment.method,
            1,
            memory_capacity=config.memory_capacity,
            raw_capacity=config.raw_capacity,
            overflow=config.overflow,
        )

    def say(self, text: str) -> str:
        """Answers a turn from the memory, then compresses the turn and its answer into it."""
        prompt = self.prompt(text, first=self.turns == 0)
        before = self.cache
        method = self.experiment.method
        if method.context == "joined":
            self._require_room(len(self.said) + len(prompt) + self.max_tokens)
        reply, after, tokens = self._answer(before, prompt)
        if method.context == "joined":
            # All that was said is one chunk.
            self.said = np.concatenate([self.said, prompt, tokens])
            after = self._read(self.empty(), self.said, query=False)
        elif self.closing is None and (not method.sees_memory_in_context or Kind.QUERY not in method.compresses):
            # Chunks of these methods are compressed without a view of the memory, or only if they were read as context;
            # the answer was made otherwise.
            after = self._read(before, np.concatenate([prompt, tokens]), query=False)
        # A method that cuts text itself has compressed what was full already.
        self.cache = after if method.chunk else _compress(self.experiment.model, after, method=method)
        memory.check(self.cache)
        self.turns += 1
        return reply

    def say_without_memory(self, text: str) -> str:
        """What the same model answers to this turn alone."""
        return self._answer(self.empty(), self.prompt(text, first=True))[0]

    def prompt(self, text: str, *, first: bool) -> np.ndarray:
        """int32 tokens of a user turn and of what opens the answer."""
        if not text.strip():
            raise UserError("a turn is empty; say something")
        opening, encode = (
            (self.pieces.start, self.pieces.first) if first else (self.pieces.separator, self.pieces.later)
        )
        return np.concatenate([opening, encode([text])[0], self.pieces.answer])

    def memory_bytes(self) -> tuple[int, int, int]:
        """Live slots (memory, and text that stays); their bytes; and what full context would hold by now."""
        slots = int(np.asarray(self.cache.slots.live).sum())
        each = self.experiment.model_config.kv_bytes_per_slot(self.cache.k.dtype.itemsize)
        return slots, slots * each, int(self.cache.tokens[0]) * each

    def _answer(self, cache: MemoryCache, prompt: np.ndarray) -> tuple[str, MemoryCache, np.ndarray]:
        cache = self._read(cache, prompt, query=True)
        self.key, key = jax.random.split(self.key)
        tokenizer: Any = self.experiment.tokenizer
        stops = [*self.pieces.end.tolist(), *self._line_ends()]
        cache, tokens, lengths = generate(
            self.decoder,
            cache,
            key,
            method=self.experiment.method,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop_tokens=stops,
            closing=self.closing,
            vocabulary=len(tokenizer),
        )
        tokens = np.asarray(tokens)[0, : int(lengths[0])]
        return tokenizer.decode(tokens, skip_special_tokens=True).strip(), cache, tokens

    def _require_room(self, tokens: int) -> None:
        """Refuses a conversation that no longer fits where all of it is compressed anew."""
        most = self.experiment.config.cache.raw_capacity
        if tokens > most:
            raise UserError(
                f"method {self.experiment.method.name!r} compresses the whole conversation anew each turn, by now up "
                f"to {tokens} tokens, which do not fit cache.raw_capacity={most}; raise it, or take a method that "
                "compresses turn by turn (method.online: true for gist)"
            )

    def _read(self, cache: MemoryCache, tokens: np.ndarray, *, query: bool) -> MemoryCache:
        size = -(-len(tokens) // MULTIPLE) * MULTIPLE
        room = memory.raw_capacity(cache)
        if self.experiment.method.chunk or self.closing:
            room = size  # it is closed as it is read
        elif len(tokens) + self.max_tokens * query > room:
            most = self.experiment.config.cache.raw_capacity
            raise UserError(
                f"a turn of {len(tokens)} tokens and an answer of up to {self.max_tokens} do not fit "
                f"cache.raw_capacity={most}; say it in several turns, or raise cache.raw_capacity"
            )
        chunk = layout.chunk([tokens], min(size, room), self.experiment.model_config.vocab_size)
        return _read(
            self.experiment.model, cache, chunk, method=self.experiment.method, query=query, closing=self.closing
        )

    @functools.cache  # noqa: B019  one conversation a process
    def _line_ends(self) -> tuple[int, ...]:
        """Tokens that hold a line break: with dialogues as lines, the next speaker's turn begins there."""
        if "\n" not in self.experiment.config.data.option("separator"):
            return ()
        texts = self.experiment.tokenizer.batch_decode([[i] for i in range(self.experiment.model_config.vocab_size)])
        return tuple(i for i, text in enumerate(texts) if "\n" in text)


_read = jax.jit(prefill, static_argnames=("method", "query", "closing"))
_compress = jax.jit(steps.compress, static_argnames="method")


def main() -> None:
    options, config, _ = cli.parse(Options, command="jax_ccm.chat")
    processes.refuse_several(devices=True)
    experiment = load_experiment(config, adapter=options.adapter)
    with sharding.use(experiment.mesh):
        _talk(experiment, options)


def _talk(experiment: Experiment, options: Options) -> None:
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
    print(f"{experiment.method.name} on {experiment.base_name}; an empty line ends the conversation")
    record = []
    turns = iter(options.say) if options.say else iter(lambda: _input(), "")
    for text in turns:
        if options.say:
            print(f"you      {text}")
        began = time.perf_counter()
        entry = {"you": text}
        if options.compare:
            entry["without_memory"] = session.say_without_memory(text)
            print(f"without  {entry['without_memory']}")
        entry["memory"] = session.say(text)
        print(f"{'memory ' if options.compare else 'model  '}  {entry['memory']}")
        slots, ours, full = session.memory_bytes()
        entry |= {"slots": slots, "memory_bytes": ours, "full_context_bytes": full}
        seconds = time.perf_counter() - began
        print(f"         [{slots} slots, {ours / 2**20:.2f} MiB; full context {full / 2**20:.2f} MiB; {seconds:.1f} s]")
        record.append(entry)
    if options.workdir is not None:
        options.workdir.mkdir(parents=True, exist_ok=True)
        (options.workdir / "chat.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _input() -> str:
    try:
        return input("you      ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    cli.run(main)
