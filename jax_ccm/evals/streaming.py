"""Perplexity over text without end, with so many live slots and no more (CCM, section 4.3 and figure 8).

A session reads token after token. Once its live slots (sink, memory and raw text together) are more than a window, the
oldest raw text is closed: the memory compresses it, StreamingLLM (Xiao et al. 2023) and a plain window drop it, just so
much of it that all hold as many slots at every moment. Perplexity at a length is that of all tokens up to it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.data.questions import Evaluation
from jax_ccm.errors import UserError
from jax_ccm.evals import texts
from jax_ccm.evals.perplexity import Measured, Stage, System
from jax_ccm.evals.recurrent import filled, losses_and_hits
from jax_ccm.evals.scoring import Scores, Store, once
from jax_ccm.evals.statistics import Estimate, Resamples, estimate
from jax_ccm.memory.cache import check, init_cache
from jax_ccm.memory.steps import compress, read
from jax_ccm.methods.baselines import RAW
from jax_ccm.nn import Transformer
from jax_ccm.nn.positions import warn_beyond
from jax_ccm.rules.examples import Example, concat
from jax_ccm.rules.types import Chunk, Method
from jax_ccm.rules.visibility import is_in

# Tokens of a stream that are drawn together.
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Budget:
    """The slots of a stream.

    Attributes:
      window: live slots beyond which the oldest text is closed.
      closes: text tokens that the memory then takes.
      capacity: most memory slots; the oldest are forgotten.
      memory: the method whose sizes all systems keep to.
    """

    window: int
    closes: int
    capacity: int
    memory: Method

    def __post_init__(self):
        method = self.memory
        if not method.remembers or method.recent or method.keeps_text:
            why = "keeps closed text" if method.recent or method.keeps_text else "makes no memory of closed text"
            raise UserError(
                f"eval.by 'stream' closes the oldest text of a session, and method {method.name!r} {why}; take one "
                "whose memory stands for the text, such as ccm_concat, ccm_merge or evict, with recent 0"
            )
        if method.chunk is not None and self.closes != method.chunk:
            raise UserError(
                f"data.chunk is {self.closes}, but method {method.name!r} takes {method.chunk} tokens at a time; set "
                "data.chunk to that"
            )
        if (left := method.memory_slots(1, self.closes)) >= self.closes:
            raise UserError(
                f"the first {self.closes} tokens that are closed (data.chunk) leave {left} slots of memory, so that "
                "nothing becomes free; raise data.chunk, or lower the method's slots"
            )
        # More chunks than any capacity holds: the memory when it is full.
        held = method.sink + min(method.memory_slots(1 << 20, self.closes), self.capacity)
        if self.window < held + self.closes:
            raise UserError(
                f"eval.window is {self.window}, but {held} slots of sink and memory and {self.closes} tokens to close "
                "(data.chunk) do not fit into it; raise eval.window, or lower cache.memory_capacity or data.chunk"
            )

    def sizes(self) -> Iterator[int]:
        """Live slots behind each time that text is closed."""
        chunks = before = 0
        while True:
            # Until it is full each closing leaves more memory, and less becomes free.
            chunks += 1
            held = min(self.memory.memory_slots(chunks, self.closes), self.capacity)
            yield self.window + 1 - self.closes + held - before
            before = held


def stages(evaluation: Evaluation, lengths: Sequence[int], most: int = 0) -> list[Stage]:
    """The texts, for each length that the longest reach: the same ones at every length.

    Args:
      evaluation: of plain text; its windows are the streams (``data.chunk`` times ``data.max_chunks`` + 1 tokens).
      lengths: text tokens.
      most: texts, taken at equal distances from all; 0 for all.

    Raises:
      UserError: if none is as long as the smallest length.
    """
    found = evaluation.texts(marked=False)
    longest = max(map(_length, found), default=0)
    reached = [length for length in sorted(lengths) if length <= longest]
    if not reached:
        raise UserError(
            f"the longest stream has {longest:,} tokens, fewer than the smallest of eval.steps, {min(lengths):,}; "
            "raise data.max_chunks or give longer texts"
        )
    # Only those that reach the largest length, so that all lengths are measured on the same texts.
    questions = texts.questions([example for example in found if _length(example) >= reached[-1]], most)
    return [Stage(length, questions, None) for length in reached]


def measure(
    system: System,
    questions: Sequence[Stage],
    budget: Budget,
    *,
    rows: int,
    store: Store | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Scores all texts with one system.

    Args:
      system: the memory, or a baseline that drops text.
      questions: of `stages`.
      budget: slots.
      rows: rows of a batch.
      store: where scores are kept, or None.
      log: takes a line on the work done.

    Returns:
      For each length the scores of the text up to it; slots are the most that a session ever holds.
    """
    examples = [question.examples[0] for question in questions[-1].right]
    # Steps of streams are lengths.
    lengths = cast(list[int], [stage.step for stage in questions])
    length, log = lengths[-1], log or (lambda line: None)

    def compute() -> dict[str, np.ndarray]:
        start = time.perf_counter()
        warn_beyond(system.model.config, system.method, tokens=length, slots=budget.window + 1, forgets=True)
        nll, hit = (np.zeros((len(examples), length), dtype) for dtype in (np.float64, bool))
        for first in range(0, len(examples), rows):
            some = examples[first : first + rows]
            for row, scores in enumerate(score_streams(system.model, system.method, some, budget, length, rows)):
                nll[first + row], hit[first + row] = scores.nll, scores.hit
        seconds = time.perf_counter() - start
        log(f"{system.name}: {len(examples):,} streams of {length:,} tokens, {seconds:.0f} s")
        return {"nll": nll, "hit": hit}

    found = once(
        store, system.identity, system.method, examples, ("nll", "hit"), compute, what=f"{length} {budget}", log=log,
        about=f"{system.name}: {len(examples):,} streams, scored",
    )  # fmt: skip
    nll, hit = found["nll"], found["hit"]
    return [
        Measured(
            [(Scores(nll[row, _unscored(example) : end], hit[row, _unscored(example) : end]),)
             for row, example in enumerate(examples)],
            None,
            # One more than the window: text is closed once that is exceeded.
            np.full(len(examples), float(min(budget.window + 1, end))),
            {},
            system.method.mixed_slots * system.model.config.kv_bytes_per_slot(4),
        )
        for end in lengths
    ]  # fmt: skip


def compared(rows: Sequence[dict[str, Any]], measured: Mapping[str, Sequence[Measured]]) -> Sequence[dict[str, Any]]:
    """The rows, each with how much the memory's loss is above or below that of the baselines, on the same tokens.

    Few streams are many dependent tokens, so that whole blocks of `BLOCK` tokens are drawn, as a block bootstrap does
    (Künsch 1989).

    Args:
      rows: of `perplexity.summarise`, one for each length; the cell of the memory gets ``minus``: for each baseline an
        `Estimate` in nats a token.
      measured: of each system.
    """
    others = {name: steps for name, steps in measured.items() if name != "memory"}
    if own := measured.get("memory"):
        for row, mine, *theirs in zip(rows, own, *others.values(), strict=True):
            row["systems"]["memory"]["minus"] = {
                name: _difference(mine, other) for name, other in zip(others, theirs, strict=True)
            }
    return rows


def _difference(own: Measured, other: Measured) -> Estimate:
    """The mean of what one loses more than the other on the same token."""
    totals, counts = [], []
    for (mine,), (theirs,) in zip(own.right, other.right, strict=True):
        for first in range(0, len(mine.nll), BLOCK):
            piece = (mine.nll - theirs.nll)[first : first + BLOCK]
            totals.append(piece.sum())
            counts.append(len(piece))
    draws = Resamples(range(len(totals)))
    return estimate(draws.mean(np.array(totals), np.array(counts, np.float64)))


def score_streams(
    model: Transformer, method: Method, examples: Sequence[Example], budget: Budget, length: int, rows: int
) -> list[Scores]:
    """Reads texts side by side, each a session of its own, and scores every token.

    What is read between two closings is read at once: it equals token by token (`steps.stream_step`), in a fraction of
    the steps.

    Args:
      model: the decoder with its adapter.
      method: what it runs; one without memory drops text instead.
      examples: texts of at least ``length`` tokens.
      budget: slots.
      length: text tokens of each that are scored.
      rows: rows of the batch; idle ones repeat the first.

    Returns:
      For each text ``float64 [length]`` and ``bool [length]``; 0 for a first token that nothing stands before.
    """
    whole = [np.concatenate([example.start, concat(*example.segments).tokens]) for example in examples]
    begin = len(examples[0].start)
    # [B, begin + length]
    text = np.stack([row[: begin + length] for row in filled(whole, rows)])
    cache = init_cache(
        model, method, rows, memory_capacity=max(budget.capacity, 1), raw_capacity=_raw(budget), overflow="evict"
    )
    sizes, done, live = budget.sizes(), 0, 0
    losses, hits = [np.zeros((rows, 1))], [np.zeros((rows, 1), bool)]
    # The last token is only a target.
    while done < text.shape[1] - 1:
        # Read up to one slot more than the window: that is when text is closed.
        size = budget.window + 1 - live
        piece, behind = text[:, done : done + size], text[:, done + 1 : done + 1 + size]
        valid = np.arange(size) < behind.shape[1]

        def pad(x, size=size):
            return np.pad(x, ((0, 0), (0, size - x.shape[1])))

        chunk = Chunk(pad(piece), np.broadcast_to(valid, (rows, size)))
        cache, loss, hit = _read(model, cache, chunk, pad(behind), method=method)
        losses.append(np.asarray(loss, np.float64)[:, valid])
        hits.append(np.asarray(hit)[:, valid])
        done += size
        if done < text.shape[1] - 1:
            live = next(sizes)
            # Baselines drop as much as takes them to the memory's size, so that all hold as many slots at every moment.
            closes = budget.closes if method.remembers else budget.window + 1 - live
            cache = _close(model, cache, closes, method=method)
    check(cache)
    # Of the tokens of the text alone; what stands before the first is scored 0 where it is not there.
    losses, hits = (np.concatenate(found, axis=1)[:, -length:] for found in (losses, hits))
    return [Scores(*pair) for pair in zip(losses, hits, strict=True)][: len(examples)]


@functools.partial(jax.jit, static_argnames="method", donate_argnums=1)
def _read(model, cache, chunk, targets, *, method):
    cache, logits = read(model, cache, chunk, method=method)  # [B, C, V]
    return cache, *losses_and_hits(logits, targets)


@functools.partial(jax.jit, static_argnames="method", donate_argnums=1)
def _close(model, cache, closes, *, method):
    # The oldest raw text in the order of slots. How many is traced: one program for all systems and moments.
    raw = is_in(cache.slots.kind, RAW) & cache.slots.live
    return compress(model, cache, raw & (jnp.cumsum(raw, axis=1) <= closes), method=method)


def _raw(budget: Budget) -> int:
    """Room for raw text: the window, in whole chunks where the method takes such."""
    unit = budget.memory.chunk or 1
    return -(-(budget.window + 1) // unit) * unit


def _length(example: Example) -> int:
    return sum(len(segment.tokens) for segment in example.segments)


def _unscored(example: Example) -> int:
    """First tokens of a text that nothing stands before."""
    return 0 if len(example.start) else 1
