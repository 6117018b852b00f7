"""Few-shot tasks: demonstrations are the context of a query, and the labels of a task its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_ccm.data.chats import words
from jax_ccm.data.config import FewShotConfig
from jax_ccm.data.counts import Report
from jax_ccm.data.formats import segment, used
from jax_ccm.data.sources import Source
from jax_ccm.data.template import Template
from jax_ccm.data.units import Unit
from jax_ccm.errors import UserError
from jax_ccm.rules.examples import Example, concat
from jax_ccm.rules.rows import Sizes, bound, measure
from jax_ccm.rules.types import Method


@dataclasses.dataclass(frozen=True)
class Shot(Unit):
    """An example of a few-shot task, ``(text, label)``.

    Attributes:
      place: its number in the task.
      label: the label as text.
      options: the texts and tokens of its own options; of none, the labels of the task are.
    """

    place: int
    label: str
    options: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class FewShot:
    """``{"text", "label", "choices"?}``, each source a task: demonstrations are the context.

    Format and budget are MetaICL's (Min et al. 2022), as Kim et al. 2024 have them. The answers of an evaluation are
    the labels of the task, or the choices of the record.

    ``Input: text Output: label`` for each of up to ``shots`` demonstrations, then ``Input: text Output:``.
    Demonstrations are other examples of the task, drawn without repetition; they are added up to the first that would
    exceed ``max_tokens``, none is skipped. Compression tokens do not count towards the limit.

    In a share ``symbols`` of the training examples each label is another word, drawn anew, so that nothing but the
    demonstrations tells what to answer (symbol tuning, Wei et al. 2023, arXiv 2305.08298).
    """

    tokenized = True
    has_choices = True

    def __init__(self, config: FewShotConfig, template: Template):
        self.config, self.template = config, template
        self._tasks: dict[str, list[Shot]] = {}
        self._longest_label: dict[str, int] = {}
        # What labels are exchanged for: words, as targets.
        self._symbols = template.target(words("train")) if config.symbols else []
        # Of an evaluation: the demonstrations of each task, and the tokens of its labels in their order.
        self._shown: dict[str, list[Shot]] = {}
        self._labels: dict[str, dict[str, np.ndarray]] = {}
        self._names: dict[str, str] = {}

    def load(
        self, sources: Sequence[Source], evaluation: bool = False, demonstrations: Sequence[Source] = ()
    ) -> tuple[list[Unit], Report]:
        """As of every format; in evaluation the demonstrations of each source, a task, are those of another source."""
        report = Report("examples")
        if evaluation:
            return self._load_tasks(sources, demonstrations, report), report
        shots, units = self.config.shots, []
        for source in sources:
            task = self.read(source, report)
            if len(task) <= shots:
                raise UserError(
                    f"task {source.name!r} has {len(task)} usable examples; {shots} demonstrations and a query need "
                    f"{shots + 1}. Lower data.shots or leave the task out"
                )
            self._tasks[source.name] = task
            said = [unit.pieces[1] for unit in task]
            self._longest_label[source.name] = max(map(len, [*said, *self._symbols]))
            units += task
        return units, report

    def _load_tasks(self, sources: Sequence[Source], demonstrations: Sequence[Source], report: Report) -> list[Unit]:
        if len(demonstrations) != len(sources):
            raise UserError(
                f"few-shot evaluation has {len(sources)} tasks but {len(demonstrations)} sources of demonstrations; "
                "give data.demonstrations one source for each task, in the same order"
            )
        units: list[Unit] = []
        for source, shown in zip(sources, demonstrations, strict=True):
            task, self._shown[source.name] = self.read(source, report), self.read(shown, Report("demonstrations"))
            known = {shot.label: shot.pieces[1] for shot in (*self._shown[source.name], *task)}
            self._labels[source.name] = dict(sorted(known.items()))
            units += task
        # A task is named by its file, without folder and ending unless two then have one name.
        stems = {name: Path(name).stem if Path(name).is_file() else name for name in self._shown}
        self._names = stems if len(set(stems.values())) == len(stems) else {name: name for name in stems}
        return units

    def read(self, source: Source, report: Report) -> list[Shot]:
        """The examples of a task within the limits."""
        found = list(used([source], "fewshot", report, "without text or label"))
        texts = self.template.later([record["text"] for _, record in found])
        # Each label is encoded once.
        known = {label: None for _, record in found for label in (record["label"], *record.get("choices", ()))}
        labels = dict(zip(known, self.template.target(list(known)), strict=True))
        longest = self.config.max_turn_tokens
        # As the reference counts: with the prefixes of text and label.
        around = len(self.template.separator) + len(self.template.answer)
        units = []
        for (where, record), text in zip(found, texts, strict=True):
            label = labels[record["label"]]
            if not len(text) or not len(label):
                report.drop("without text or label", where)
            elif len(text) + len(label) + around > longest:
                report.drop(f"of more than {longest} tokens")
            else:
                options = {option: labels[option] for option in record.get("choices", ())}
                units.append(Shot(where, (text, label), len(units), record["label"], options, task=source.name))
        report.units, report.kept = report.units + len(found), report.kept + len(units)
        return units

    def chunks(self, unit: Unit) -> int:
        return len(self._shown[unit.task])

    def ask(self, unit: Unit, step: int, target: np.ndarray | None = None) -> Example:
        target, most = unit.pieces[1] if target is None else target, self.config.max_tokens_evaluation
        return self.build(unit, self._shown[unit.task][:step], target, most, every=False, score_end=False)

    def answers(self, unit: Unit) -> tuple[Sequence[np.ndarray], int]:
        assert isinstance(unit, Shot)
        labels = unit.options or self._labels[unit.task]
        return list(labels.values()), list(labels).index(unit.label)

    def short_answers(self, unit: Unit) -> tuple[str, ...]:
        return ()

    def age(self, unit: Unit) -> int | None:
        return None

    def task(self, unit: Unit) -> str:
        return self._names[unit.task]

    def exchanged(self, unit: Unit) -> Unit | None:
        return None

    def draw(self, unit: Unit, rng: np.random.Generator) -> Example:
        assert isinstance(unit, Shot)
        task = self._tasks[unit.task]
        # An offset of 1..n-1 behind the query, modulo n, never hits the query itself.
        offsets = 1 + rng.permutation(len(task) - 1)[: self.config.shots]
        shots = [unit, *(task[(unit.place + offset) % len(task)] for offset in offsets)]
        if self.config.symbols and rng.random() < self.config.symbols:
            shots = self._renamed(shots, rng)
        return self.build(shots[0], shots[1:], shots[0].pieces[1], self.config.max_tokens, self.config.loss == "every")

    def _renamed(self, shots: Sequence[Shot], rng: np.random.Generator) -> list[Shot]:
        """The examples with a word for each of their labels."""
        labels = sorted({shot.label for shot in shots})
        drawn = rng.choice(len(self._symbols), len(labels), replace=False)
        symbols = {label: self._symbols[number] for label, number in zip(labels, drawn, strict=True)}
        return [dataclasses.replace(shot, pieces=(shot.pieces[0], symbols[shot.label])) for shot in shots]

    def build(
        self,
        unit: Unit,
        demonstrations: Sequence[Unit],
        target: np.ndarray,
        most: int,
        every: bool,
        score_end: bool = True,
    ) -> Example:
        """An example with the demonstrations that fit into ``most`` tokens beside the query and its own label."""
        template = self.template
        own = concat(
            segment(unit.pieces[0]), segment(template.answer), segment(target, True), segment(template.end, score_end)
        )
        # With the query's own label in the place of the option that is scored: every option gets the same
        # demonstrations.
        room = (
            most - len(template.start) - len(template.separator) - len(own.tokens) + len(target) - len(unit.pieces[1])
        )
        shown = []
        for number, (text, label) in enumerate(unit.pieces for unit in demonstrations):
            shot = concat(segment(text), segment(template.answer), segment(label, every and number > 0))
            room -= len(shot.tokens) + (len(template.separator) if number else 0)
            if room < 0:
                break
            shown.append(shot)
        return Example(template.start, template.separator, (*shown, own), unit.id)

    def needs(self, unit: Unit, method: Method) -> Sizes:
        assert isinstance(unit, Shot)
        shots = {"chunks": self.config.shots, "joined": 1, "dropped": 0}[method.context]
        # The query's label may be exchanged for the longest word.
        target = max([unit.pieces[1], *self._symbols], key=len)
        alone = measure(method, self.build(unit, (), target, 0, every=False))
        if not shots:
            return alone
        scored = alone.scored
        if self.config.loss == "every":
            # The label of the first demonstration is not scored: there is no memory before it.
            scored += (self.config.shots - 1) * self._longest_label[unit.task]
        # Demonstrations fill the budget, whichever are drawn; a long query may exceed it by itself.
        tokens = max(alone.tokens, self.config.max_tokens)
        return bound(method, tokens, shots, scored)
