"""Prompts that are one text each, as benchmarks give them: what of them becomes memory, and what follows it.

A prompt is cut where it has borders of its own, between few-shot examples or paragraphs, or between the turns of a
conversation. All pieces but the last are closed into memory one by one; the last, which asks, is read as it stands, and
the continuation is scored or made behind it. Every system gets the same sessions, so that full context, memory and no
context differ in what they keep alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from jax_ccm.data.config import DataConfig
from jax_ccm.errors import UserError
from jax_ccm.evals.perplexity import System
from jax_ccm.evals.recurrent import score_recurrently
from jax_ccm.evals.scoring import score
from jax_ccm.evals.slots import context_slots
from jax_ccm.nn.positions import warn_beyond
from jax_ccm.rules.examples import Example, Segment, concat, cut
from jax_ccm.rules.types import Method

# What can answer: the memory, the memory of another request's context, and what `evaluate` puts beside it.
SYSTEMS = ("none", "full", "uncompressed", "memory", "wrong")
NOTHING = np.zeros(0, np.int32)
# Between paragraphs, and between few-shot examples in most benchmarks.
BLANK_LINE = "\n\n"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text as tokens.

    Attributes:
      text: as it is.
      tokens: ``int32 [n]``, at least one.
      begins: ``int [n]``, the character at which each token begins.
      special: how many of the first tokens the tokenizer put in by itself.
    """

    text: str
    tokens: np.ndarray
    begins: np.ndarray
    special: int = 0

    def last(self, count: int) -> Prompt:
        """The prompt without its oldest tokens, if it has more than ``count``."""
        gone = max(len(self.tokens) - count, 0)
        return Prompt(self.text, self.tokens[gone:], self.begins[gone:], max(self.special - gone, 0))


@dataclasses.dataclass(frozen=True)
class Cutting:
    """Where prompts are cut.

    Attributes:
      chunk: most tokens of a chunk; a longer piece is cut every so many tokens, the last one, too.
      delimiter: text behind which a chunk ends, "" for every ``chunk`` tokens alone; None for in front of each turn of
        the user's, where a prompt has several, else behind each blank line.
      head: text with which a turn of the user's begins; "" for a model without a chat template.
      tail: fewest tokens of a prompt that stay text.

    Raises:
      UserError: for a chunk or tail of less than one token.
    """

    chunk: int
    delimiter: str | None = None
    head: str = ""
    tail: int = 1

    def __post_init__(self):
        if self.chunk < 1 or self.tail < 1:
            raise UserError(f"chunk is {self.chunk} and tail is {self.tail}; both are tokens, at least 1")

    def borders(self, text: str) -> list[int]:
        """The characters of a text in front of which a chunk ends."""

        def places(part):
            return list(re.finditer(re.escape(part), text)) if part else []

        if self.delimiter is None and len(turns := places(self.head)) > 1:
            return [found.start() for found in turns[1:]]
        delimiter = BLANK_LINE if self.delimiter is None else self.delimiter
        return [found.end() for found in places(delimiter)]

    def start(self, prompt: Prompt) -> int:
        """How many tokens stand in front of all turns: what the tokenizer put in, and a system message."""
        at = prompt.text.find(self.head) if self.head else -1
        before = int(np.sum(prompt.begins < at)) if at > 0 else 0
        return min(max(before, prompt.special), len(prompt.tokens) - 1)

    def ends(self, prompt: Prompt) -> list[int]:
        """For each chunk the number of the first token behind it, in order.

        A token that holds the end of one piece and the begin of the next belongs to the first.
        """
        first, most = self.start(prompt), len(prompt.tokens) - self.tail
        # Borders within the start, or that leave too short a tail, do not count.
        own = {int(end) for end in np.searchsorted(prompt.begins, self.borders(prompt.text)) if first < end <= most}
        found, begin = [], first
        # Pieces between borders, each cut again where it is longer than a chunk.
        for end in (*sorted(own), len(prompt.tokens)):
            found += [at for at in range(begin + self.chunk, end, self.chunk) if at <= most]
            found += [end] if end in own else []
            begin = end
        return found

    def session(self, method: Method, prompt: Prompt, continuation: np.ndarray = NOTHING) -> Example:
        """The session of a prompt, whose continuation is scored.

        Args:
          method: what it is run with; where it can keep text (`Method.kept_kind`) a system message stays text.
          prompt: what stands before.
          continuation: ``int32 [c]``.
        """
        start, (*chunks, tail) = self.start(prompt), np.split(prompt.tokens, self.ends(prompt))
        chunks = [*chunks, tail]
        # What stands in front of all turns begins the session, and is no part of its first chunk.
        chunks[0] = chunks[0][start:]
        *context, tail = (Segment(tokens, np.zeros(len(tokens), bool)) for tokens in chunks)
        asked = concat(tail, Segment(continuation, np.ones(len(continuation), bool)))
        # More than what the tokenizer put in by itself: a system message.
        keeps = start > prompt.special and method.kept_kind is not None
        return Example(prompt.tokens[:start], NOTHING, (*context, asked), prompt.text[-60:], keeps_start=keeps)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the requests of a benchmark are answered."""

    chunk: int = 0
    """Most tokens of a chunk of memory; 0 for what the data of the config say: max_turn_tokens, or chunk for texts."""
    delimiter: str | None = None
    """Text behind which a chunk ends (a line break is written \\n); "" for none, so that a chunk ends every ``chunk``
    tokens alone. Without it, chunks end in front of each turn of the user's where a prompt has several, and else behind
    blank lines."""
    tail: int = 1
    """Fewest tokens of a prompt that are not compressed. What stands behind the last delimiter never is, up to
    ``chunk`` tokens of it."""
    max_length: int = 0
    """Most tokens that full context sees: of a longer prompt the oldest are left out, as usual in the harness. 0 for
    the positions that the base was trained for. Memory leaves nothing out."""
    max_gen_toks: int = 256
    """Most tokens of an answer where a task does not say it."""
    batch_size: int = 4
    """Requests that are answered side by side."""
    seed: int = 0
    """Of the sampling, in tasks that ask for it."""

    def __post_init__(self):
        for name in ("max_gen_toks", "batch_size", "tail"):
            self._least(name, 1)
        for name in ("chunk", "max_length", "seed"):
            self._least(name, 0)

    def _least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r}; give a whole number from {least} on")

    def cutting(self, data: DataConfig, method: Method, head: str = "") -> Cutting:
        """Where prompts are cut.

        Args:
          data: what the adapter was trained on.
          method: what prompts are run with; one that cuts text itself (`Method.chunk`) does so at its own length.
          head: text with which a turn of the user's begins; "" for none.
        """
        trained = method.chunk or getattr(data, "max_turn_tokens", None) or getattr(data, "chunk", None)
        delimiter = self.delimiter
        if delimiter is not None:
            delimiter = delimiter.replace("\\n", "\n").replace("\\t", "\t")
        if not (chunk := self.chunk or trained):
            raise UserError("the data of this config do not say how long a chunk is; give chunk, in tokens")
        return Cutting(chunk, delimiter, head, self.tail)


def with_contexts_of_others(examples: Sequence[Example]) -> list[Example]:
    """Each session behind the context of the next one that has another: the control for what memory itself adds.

    Args:
      examples: sessions; those that close nothing stay as they are.

    Raises:
      UserError: if there are not two different contexts.
    """
    # By their tokens: requests that share a context share the one that takes its place.
    contexts = {_context(example): example.segments[:-1] for example in examples if len(example.segments) > 1}
    if len(contexts) < 2:
        raise UserError(
            f"the system 'wrong' reads each question behind the context of another, but of these {len(examples)} "
            f"requests {len(contexts)} different contexts become memory; raise the limit, or cut otherwise (delimiter, "
            "chunk)"
        )
    names = list(contexts)
    # Each behind the next, the last behind the first: no context stays with its own question.
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    return [
        dataclasses.replace(example, segments=(*contexts[following[name]], example.segments[-1]))
        if (name := _context(example)) in following else example
        for example in examples
    ]  # fmt: skip


def _context(example: Example) -> tuple[bytes, ...]:
    return tuple(segment.tokens.tobytes() for segment in example.segments[:-1])


def likelihoods(system: System, examples: Sequence[Example], *, rows: int) -> list[tuple[float, bool]]:
    """Log-likelihood of the scored tokens of each session, and whether each of them is the most likely one.

    Args:
      system: what they are run with.
      examples: sessions of `Cutting.session`; a context that several share is read once where that pays.
      rows: rows of a batch.
    """
    found = score(system.model, system.method, examples, rows=rows, capacity=system.capacity)
    return [(-float(scores.nll.sum()), bool(scores.hit.all())) for scores in found]


def windows(tokens: np.ndarray, prefix: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A long text in windows of ``size`` tokens, each token scored once, the last window as full as the others.

    Args:
      tokens: ``int32 [n]``.
      prefix: id of the token in front of the first.
      size: tokens of a window.

    Yields:
      int32 tokens that are only read, at least one, and those that are scored.
    """
    for first in range(0, len(tokens), size):
        end = min(first + size, len(tokens))
        # The last token that is scored is never read, so that so many places hold one token more.
        before = tokens[max(end - size - 1, 0) : first]
        yield (before if first else np.array([prefix], np.int32)), tokens[first:end]


def rolling(
    system: System, texts: Sequence[np.ndarray], prefix: int, *, chunk: int, rows: int, window: int = 0
) -> list[float]:
    """Log-likelihoods of whole texts of any length.

    A memory reads a text once from end to end and closes each chunk behind it.

    Args:
      system: what they are run with.
      texts: int32 tokens of each.
      prefix: id of the token in front of each.
      chunk: tokens of a chunk.
      rows: rows of a batch.
      window: how far text is seen by a system that compresses nothing: a text is scored in `windows` of so many places,
        as is usual; 0 reads it from end to end.

    Returns:
      The sum over all tokens of each text, 0.0 for an empty one.

    Raises:
      UserError: for a method that compresses all text anew.
    """
    method, examples, owners = system.method, [], []
    if method.context == "joined":
        raise UserError(
            f"method {method.name!r} compresses all text anew each time, so no text streams through it; take one that "
            "compresses chunk by chunk (method.online: true for gist), or the systems full and none"
        )
    for number, tokens in enumerate(texts):
        pieces = windows(tokens, prefix, window) if window else [(np.array([prefix], np.int32), tokens)]
        for before, scored in pieces if len(tokens) else ():
            text = Segment(scored.astype(np.int32), np.ones(len(scored), bool))
            # What drops all context sees a window as a whole.
            parts = (text,) if method.context == "dropped" else cut(text, chunk)
            examples.append(Example(before.astype(np.int32), NOTHING, parts))
            owners.append(number)
    totals = [0.0] * len(texts)
    if not examples:
        return totals
    # Positions that run on may go beyond those that the base was trained for; indices in a cache do not.
    if method.rope == "running":
        lengths = [len(x.start) + sum(len(segment.tokens) for segment in x.segments) for x in examples]
        warn_beyond(system.model.config, method, tokens=max(lengths), forgets=system.capacity is not None)
    # Never in parallel: the logits of a whole text at once may be larger than the model.
    scores = score_recurrently(system.model, method, examples, rows=rows, capacity=system.capacity)
    for number, (losses, _) in zip(owners, scores, strict=True):
        totals[number] -= float(losses.sum())
    return totals


def carried(system: System, examples: Sequence[Example]) -> tuple[int, int]:
    """Tokens of the contexts of sessions, and the key/value slots that are held of them when their tails are read."""
    tokens = sum(len(x.start) + sum(len(segment.tokens) for segment in x.segments[:-1]) for x in examples)
    return tokens, sum(context_slots(system.method, example, system.capacity) for example in examples)
