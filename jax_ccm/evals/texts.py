"""Whole texts: perplexity of the same tokens whatever is compressed, slots that stay, and what can be repeated."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_ccm.data.questions import Choice, Evaluation
from jax_ccm.evals import perplexity
from jax_ccm.evals.perplexity import Measured, Stage, System
from jax_ccm.evals.recurrent import repeat_recurrently
from jax_ccm.evals.scoring import Store, once, score
from jax_ccm.evals.slots import held_slots
from jax_ccm.evals.statistics import Resamples, estimate, tree_to_json
from jax_ccm.rules.examples import Example
from jax_ccm.rules.rows import arrange, closed
from jax_ccm.rules.types import Method


def windows(evaluation: Evaluation, method: Method, most: int = 0) -> list[Stage]:
    """The windows of text as the questions of one stage, that of whole texts.

    Args:
      evaluation: the data.
      method: what will read them: spans are drawn for methods that keep just what is outside of them.
      most: windows, taken at equal distances from all; 0 for all.
    """
    return [Stage(None, questions(evaluation.texts(marked=method.heeds_marks), most), None)]


def questions(found: Sequence[Example], most: int = 0) -> list[Choice]:
    """Windows of text as questions, so many of them at equal distances; 0 for all."""

    # Windows of one text are not independent of each other: they share its id, by which the bootstrap draws.
    def shared(example):
        return example.id.rsplit(" from token ", 1)[0]

    named = [dataclasses.replace(example, id=shared(example)) for example in perplexity.spread(found, most)]
    return [Choice((example,), 0) for example in named]


def measure(system: System, evaluation: Evaluation, most: int = 0, **options: Any) -> list[Measured]:
    """`perplexity.measure` of every token, and what memory repeats; slots are those held when a text is read.

    Args:
      system: what is measured.
      evaluation: the data.
      most: as for `windows`.
      **options: as for `perplexity.measure`.
    """
    asked = windows(evaluation, system.method, most)
    measured = perplexity.measure(system, asked, carried=held_slots, **options)
    if system.name != "memory" or system.method.repeat is None:
        return measured
    return [dataclasses.replace(measured[0], repeated=repetition(system, asked, **options))]


def repetition(
    system: System,
    asked: Sequence[Stage],
    *,
    rows: int,
    store: Store | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What memory can still say word for word of closed chunks, just after each is closed.

    Each token is guessed by itself (LoMA's repetition zone), or with `Method.repeat_by` "text" generated behind what
    was said before it, right or wrong.

    Args:
      system: one whose method has a `Method.repeat`.
      asked: of `windows`.
      rows: rows of a batch.
      store: where scores are kept, or None.
      log: takes a line on the work done.

    Returns:
      JSON values: ``token``, the share of tokens that are right, ``exact``, the share of chunks that are right from
      end to end (with bootstrap errors over texts), ``chunks`` and ``tokens`` that were asked for.
    """
    examples = [question.examples[0] for stage in asked for question in stage.right]
    said = _generated if system.method.repeat_by == "text" else _guessed
    right, exact, tokens, chunks = (np.zeros(len(examples)) for _ in range(4))
    for i, hits in enumerate(said(system, examples, rows, store, log)):
        right[i], exact[i] = sum(hit.sum() for hit in hits), sum(bool(hit.all()) for hit in hits)
        tokens[i], chunks[i] = sum(map(len, hits)), len(hits)
    resamples = Resamples([example.id for example in examples])
    return tree_to_json(
        {
            "token": estimate(resamples.mean(right, tokens)),
            "exact": estimate(resamples.mean(exact, chunks)),
            "chunks": int(chunks.sum()),
            "tokens": int(tokens.sum()),
        }
    )


def _guessed(system: System, examples: Sequence[Example], rows: int, store, log) -> list[list[np.ndarray]]:
    """Which tokens of each closed chunk of each text are guessed right, all at once."""
    made = score(
        system.model, system.method, examples, rows=rows, repeats=True, store=store, identity=system.identity, log=log,
        name=f"{system.name}, repetition",
    )  # fmt: skip
    found = []
    for example, scores in zip(examples, made, strict=True):
        sizes = [len(segment.tokens) for segment in closed(system.method, arrange(system.method, example))]
        # Scores of the repetition stand behind those of the text.
        hits = scores.hit[len(scores.hit) - sum(sizes) :]
        found.append(np.split(hits, np.cumsum(sizes)[:-1]) if sizes else [])
    return found


def _generated(system: System, examples: Sequence[Example], rows: int, store, log) -> list[list[np.ndarray]]:
    """Which tokens of each closed chunk of each text come out right, generated one after the other."""
    log = log or (lambda line: None)
    texts = [[s.tokens for s in closed(system.method, arrange(system.method, example))] for example in examples]
    what = f"{system.name}, repetition: {len(examples):,} texts"

    def compute() -> dict[str, np.ndarray]:
        start = time.perf_counter()
        chunks = [
            chunk for row in repeat_recurrently(system.model, system.method, examples, rows=rows) for chunk in row
        ]
        said = np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
        log(f"{what}, generated chunk by chunk, {time.perf_counter() - start:.0f} s")
        return {"tokens": said}

    said = once(
        store, system.identity, system.method, examples, ("tokens",), compute, what="repetition, generated", log=log,
        about=f"{what}, generated",
    )["tokens"]  # fmt: skip
    found, begin = [], 0
    for row in texts:
        # Borders of the closed chunks in what is said of all texts, one behind the other.
        ends = begin + np.cumsum([0, *map(len, row)])
        found.append([said[a:b] == text for a, b, text in zip(ends, ends[1:], row, strict=False)])
        begin = int(ends[-1])
    return found
