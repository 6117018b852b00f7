"""Evaluation sessions at a time step, and the same with the memory of another session.

Time step t means t context chunks: for a dialogue its first t turns, then turn t + 1 as query and turn t + 2 as target
(with ``data.unit_of_memory: exchange`` two turns a chunk; the first may be one turn, where no more is left).
(The reference implementation's last bucket, t = 12, really holds 13: it truncates to 15 turns. Here it is 12.) Only the
target is scored, without the end-of-sequence token that follows it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_ccm.data import documents
from jax_ccm.data.config import DataConfig
from jax_ccm.data.counts import NothingLeft
from jax_ccm.data.documents import Text
from jax_ccm.data.sources import Record, Records, Source, open_sources
from jax_ccm.data.units import Unit
from jax_ccm.errors import UserError
from jax_ccm.rules.examples import Example


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with several possible answers, to be decided by their likelihood.

    Attributes:
      examples: the same session with each of the answers as target.
      answer: which of them is right.
      task: the few-shot task, or "" for others; accuracies are averaged over tasks.
      answers: short forms of the right one, with which a generated reply is compared besides; () for none.
    """

    examples: tuple[Example, ...]
    answer: int
    task: str = ""
    answers: tuple[str, ...] = ()


class Evaluation:
    """Tokenised evaluation data.

    Attributes:
      report: how many records are used, how many were dropped and why.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Any, sources: Sequence[Source], demonstrations: Sequence[Source] = ()
    ):
        """Tokenises the records.

        Args:
          config: the data config.
          tokenizer: a fast tokenizer of transformers; None for the recall task.
          sources: the data; for few-shot tasks each source is a task.
          demonstrations: the few-shot demonstrations of each source: the first k are used, always the same.

        Raises:
          UserError: if all records are dropped, or a few-shot task has no demonstrations.
        """
        self.config = config
        self.format = documents.build(config, tokenizer)
        shown = {"demonstrations": demonstrations} if demonstrations else {}
        self.units, self.report = self.format.load(sources, evaluation=True, **shown)
        if not self.units:
            raise NothingLeft("evaluation", self.report)

    @classmethod
    def open(cls, config: DataConfig, tokenizer: Any, split: str = "test") -> Evaluation:
        """The evaluation of a config's ``"validation"`` or ``"test"`` sources."""
        sources = open_sources({"validation": config.validation, "test": config.test}[split], config.format)
        return cls(config, tokenizer, sources, open_sources(config.shown, config.format) if config.shown else ())

    @property
    def has_choices(self) -> bool:
        """Whether its questions have several answers: few-shot tasks, and online records with ``choices``."""
        return self.format.has_choices

    @property
    def answer(self) -> np.ndarray:
        """int32 tokens between query and target, for formats with choices."""
        assert self.has_choices
        return self.format.template.answer

    def examples(self, step: int) -> list[Example]:
        """The sessions at a time step: every record that is long enough, cut to ``step`` chunks.

        With ``truncate: false`` in the config: records of exactly that length. For plain text the tail is the same at
        all steps, and the ``step`` chunks before it are its context.

        Args:
          step: t, at least 1.

        Returns:
          Examples with ``step`` context chunks, the target scored; possibly none.
        """
        return [question.examples[0] for question in self.questions(step)]

    def questions(self, step: int) -> list[Choice]:
        """`examples` as questions with one answer each."""
        self._check(step)
        return [self._question(unit, step) for unit in self._long_enough(step)]

    def texts(self, *, marked: bool = True) -> list[Example]:
        """Every window of plain text, all of its tokens scored but the first.

        Args:
          marked: with ``data.ratio``, draw spans, from the window's place; False for chunks as without it.

        Raises:
          UserError: for another format.
        """
        if not isinstance(self.format, Text):
            raise UserError(f"whole texts are scored with data.format 'text', not {self.config.format!r}")

        def draws(number):
            # From the number of the window: every evaluation scores the same spans.
            return np.random.default_rng(number) if marked else None

        return [self.format.build(unit, "all", draws(number)) for number, unit in enumerate(self.units)]

    def choices(self, step: int) -> list[Choice]:
        """The questions at a time step, for formats that have choices: online (with ``choices``) and fewshot.

        Raises:
          UserError: for another format, or an online record without choices.
        """
        self._check(step)
        if not self.has_choices:
            raise UserError(
                f"format {self.config.format!r} has no choices to be accurate about; use 'online' with choices in the "
                "records, or 'fewshot'"
            )
        return [self._choice(unit, step) for unit in self._long_enough(step)]

    def choices_by_age(self, age: int) -> list[Choice]:
        """The questions whose records say that what they ask for was told so long ago, behind their whole contexts.

        Args:
          age: the field ``age`` of an online record: exchanges (or whatever the data count) since it was told.

        Raises:
          UserError: for another format, records without ages or choices.
        """
        self._check(age)
        ages = [self.format.age(unit) for unit in self.units]
        if not any(ages):
            raise UserError(
                "eval.by 'age' needs records of format 'online' that say how long ago the answer was told, "
                '{"contexts", "query", "target", "choices", "age": 4}, as generated:chat_questions?age=1,4,8 makes them'
            )
        asked = [unit for unit, own in zip(self.units, ages, strict=True) if own == age]
        return [self._choice(unit, self.format.chunks(unit)) for unit in asked]

    def by_task(self, *, choices: bool = False) -> dict[str, list[Choice]]:
        """All questions behind their whole contexts, by the task that their records name.

        Args:
          choices: whether the questions have several answers.

        Returns:
          The questions of each task, in the order in which tasks first occur; those of no task are of the task
          "questions".
        """
        self._check(1)
        found: dict[str, list[Choice]] = {}
        for unit in self.units:
            step = self.format.chunks(unit)
            made = self._choice(unit, step) if choices else self._question(unit, step)
            found.setdefault(self.format.task(unit) or "questions", []).append(made)
        return found

    def exchanged(self, choice: Choice) -> Choice | None:
        """The question behind its own context with what it asks for told otherwise: a control (`data.exchanging`).

        Args:
          choice: of `choices`, `choices_by_age` or `by_task`.

        Returns:
          The question with the same answers; None where its context does not tell the answer word for word.
        """
        first = choice.examples[0]
        if (otherwise := self.format.exchanged(self._by_id[first.id])) is None:
            return None
        made = self._choice(otherwise, len(first.segments) - 1)
        return dataclasses.replace(choice, examples=made.examples)

    @functools.cached_property
    def _by_id(self) -> dict[str, Unit]:
        return {unit.id: unit for unit in self.units}

    def _check(self, step: int) -> None:
        if step < 1:
            raise UserError(f"time step {step}: evaluation starts at 1, the first chunk")
        if self.config.draws_spans:
            raise UserError(
                "data.ratio draws spans, which leaves no time steps to evaluate at; score whole texts (eval.by: text), "
                "or evaluate without data.ratio"
            )

    def _long_enough(self, step: int) -> list[Unit]:
        longer = self.config.cuts_longer
        lengths = ((unit, self.format.chunks(unit)) for unit in self.units)
        return [unit for unit, length in lengths if length == step or (length > step and longer)]

    def _question(self, unit: Unit, step: int) -> Choice:
        return Choice((self.format.ask(unit, step),), 0, answers=self.format.short_answers(unit))

    def _choice(self, unit: Unit, step: int) -> Choice:
        targets, right = self.format.answers(unit)
        examples = tuple(self.format.ask(unit, step, target) for target in targets)
        return Choice(examples, right, unit.task, self.format.short_answers(unit))


def evaluation_examples(
    records: Sequence[Record], config: DataConfig, tokenizer: Any, step: int, demonstrations: Sequence[Record] = ()
) -> list[Example]:
    """`Evaluation.examples` of records in memory."""
    shown = [Records("demonstrations", demonstrations)] if demonstrations else []
    return Evaluation(config, tokenizer, [Records("records", records)], shown).examples(step)


def wrong_memory(examples: Sequence[Example]) -> list[Example]:
    """Each session's tail after the context of another session: the control for what memory really remembers.

    A deterministic permutation without fixed points, which never pairs sessions with equal contexts (few-shot examples
    of one task share theirs). Examples of one time step give wrong contexts of that time step.

    Args:
      examples: the sessions.

    Returns:
      As many examples, in order, with the same tails and ids.

    Raises:
      UserError: if there are fewer than two, or more than half share one context.
    """
    partner = _partners([_context_key(example) for example in examples])
    return [_swap(example, examples[other]) for example, other in zip(examples, partner, strict=True)]


def wrong_memory_choices(choices: Sequence[Choice]) -> list[Choice]:
    """`wrong_memory` for questions: all answers of a question get the same wrong context."""
    partner = _partners([_context_key(choice.examples[0]) for choice in choices])
    return [
        dataclasses.replace(
            choice, examples=tuple(_swap(example, choices[other].examples[0]) for example in choice.examples)
        )
        for choice, other in zip(choices, partner, strict=True)
    ]


def _swap(example: Example, other: Example) -> Example:
    # The beginning stays the session's own: a system message is no memory.
    return dataclasses.replace(example, segments=(*other.segments[:-1], example.segments[-1]))


def _context_key(example: Example) -> str:
    """A digest of the context: equal for equal contexts, in no order that means anything."""
    digest = hashlib.sha256()
    for segment in example.segments[:-1]:
        # With the length in front: where a segment ends makes a difference, too.
        digest.update(len(segment.tokens).to_bytes(4, "big") + segment.tokens.astype(">i4").tobytes())
    return digest.hexdigest()


def _partners(keys: Sequence[str]) -> np.ndarray:
    """For each key the index of one that differs, as a permutation.

    Sorted by key, equal ones stand together; moving on by half of the list leaves every group no larger than that.
    """
    count = len(keys)
    if count < 2:
        raise UserError(f"the wrong-memory control needs at least 2 sessions of a time step, there are {count}")
    most = max(Counter(keys).values())
    if most > count // 2:
        raise UserError(
            f"the wrong-memory control cannot pair {count} sessions of which {most} share one context; evaluate more "
            "records (or more few-shot tasks) together"
        )
    order = np.array(sorted(range(count), key=lambda index: (keys[index], index)))
    partner = np.empty(count, int)
    partner[order] = np.roll(order, -(count // 2))
    return partner
