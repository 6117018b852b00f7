"""Formats without turns: plain text and the recall task. And the table of all formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from jax_ccm.data import recall, spans
from jax_ccm.data.config import DataConfig, TextConfig
from jax_ccm.data.counts import Report
from jax_ccm.data.fewshot import FewShot
from jax_ccm.data.formats import Askable, Dialogue, NoChoices, Online, segment, used
from jax_ccm.data.sources import Source
from jax_ccm.data.template import Template
from jax_ccm.data.units import Unit
from jax_ccm.rules.examples import Example, concat
from jax_ccm.rules.rows import Sizes, bound, measure
from jax_ccm.rules.types import Method


@dataclasses.dataclass(frozen=True)
class TextUnit(Unit):
    """A window of a text.

    Attributes:
      begins: bool ``[c]``, tokens with which a word begins.
    """

    begins: np.ndarray

    def stored(self) -> dict[str, np.ndarray]:
        return super().stored() | {"begins": self.begins.astype(np.int32)}

    @classmethod
    def restored(cls, id: str, arrays: Mapping[str, np.ndarray]) -> Self:
        made = Unit.restored(id, arrays)
        return cls(id, made.pieces, arrays["begins"].astype(bool))


class Text(NoChoices):
    """``{"text"}``: a text is cut into windows of ``max_chunks + 1`` chunks of ``chunk`` tokens; the last is the tail.

    What remains at the end of a text is a shorter window, used if it has at least two chunks. With ``ratio`` a window
    is not cut into chunks: spans of it, or single tokens, are drawn anew each time, and the rest is kept (Sentinel).
    """

    unit = TextUnit

    def __init__(self, config: TextConfig, template: Template):
        self.config, self.template = config, template
        self._words = config.unit == "words"
        self._sampler = None
        if config.ratio is not None and config.hide != "tokens":
            longest = spans.Sampler.longest if config.span is None else config.span
            self._sampler = spans.Sampler(config.ratio, longest, config.sampler == "released")

    def load(self, sources: Sequence[Source], evaluation: bool = False) -> tuple[list[Unit], Report]:
        report, units = Report("windows"), []
        chunk, chunks = self.config.chunk, self.config.max_chunks + 1
        for where, record in used(sources, "text", report, "without text"):
            tokens, begins = self._tokens(record["text"])
            if not len(tokens):
                report.units += 1
                report.drop("without text", where)
            # Windows do not overlap; each is a session of its own.
            for first in range(0, len(tokens), chunk * chunks):
                window = tokens[first : first + chunk * chunks]
                report.units += 1
                if len(window) <= chunk:
                    report.drop("with fewer than 2 chunks")
                    continue
                own = begins[first : first + len(window)]
                # Without the last token, which no span may hold: something must follow each.
                if self._sampler is not None and not self._sampler.reaches(own[:-1], self._words):
                    report.drop(f"too short for spans that free {self.config.ratio} of them")
                    continue
                cut = [window[place : place + chunk] for place in range(0, len(window), chunk)]
                units.append(TextUnit(f"{where} from token {first}", tuple(cut), own))
        report.kept = len(units)
        return units, report

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a text, and those with which a word begins (all of them where words do not matter)."""
        if self._words:
            return self.template.words(text)
        (tokens,) = self.template.plain([text])
        return tokens, np.ones(len(tokens), bool)

    def draw(self, unit: Unit, rng: np.random.Generator) -> Example:
        return self.build(unit, self.config.loss, rng)

    def build(self, unit: Unit, loss: str, rng: np.random.Generator | None = None) -> Example:
        """The window as an example; "all" scores all chunks, "every" all but the first, "last" the tail."""
        first = {"all": 0, "every": 1, "last": len(unit.pieces) - 1}[loss]
        segments = tuple(segment(piece, number >= first) for number, piece in enumerate(unit.pieces))
        if self.config.ratio is not None and rng is not None:
            whole = concat(*segments)
            if self._sampler is not None:
                assert isinstance(unit, TextUnit)
                found = self._sampler.draw(unit.begins[:-1], self._words, rng)
                segments = spans.split(whole.tokens, whole.scored, found)
            else:
                segments = spans.scattered(whole.tokens, whole.scored, self.config.ratio, rng)
        # Chunks of a text stand behind each other with nothing between.
        return Example(self.template.start, self.template.separator[:0], segments, unit.id)

    def chunks(self, unit: Unit) -> int:
        return len(unit.pieces) - 1

    def ask(self, unit: Unit, step: int, target: np.ndarray | None = None) -> Example:
        """The tail is the same at all steps, and the ``step`` chunks before it are its context."""
        return self.build(Unit(unit.id, unit.pieces[-step - 1 :]), "last")

    def needs(self, unit: Unit, method: Method) -> Sizes:
        # Any draw: all have the same text and the same scored tokens.
        example = self.build(unit, self.config.loss, np.random.default_rng(0))
        sizes = measure(method, example)
        if self._sampler is None:
            return sizes
        # A draw may have more spans than this one.
        assert isinstance(unit, TextUnit)
        more = self._sampler.most(unit.begins[:-1], self._words) - (len(example.segments) - 1)
        if method.ratio is not None:
            spans = len(example.segments) - 1 + more
            return bound(method, sum(len(s.tokens) for s in example.segments), spans, sizes.scored)
        return Sizes(
            sizes.tokens + more * len(method.closes), sizes.memory + more * method.slots_per_chunk, sizes.scored
        )


@dataclasses.dataclass(frozen=True)
class RecallUnit(Unit):
    """A recall record, with the ids of its tokens as its one piece."""

    record: dict[str, Any]


class RecallTask(NoChoices):
    """The generated recall task of `jax_ccm.data.recall`; needs no tokenizer."""

    tokenized = False

    def __init__(self, config: DataConfig, template: Template | None = None):
        self.config = config

    def load(self, sources: Sequence[Source], evaluation: bool = False) -> tuple[list[Unit], Report]:
        units: list[Unit] = []
        for source in sources:
            for index in range(len(source)):
                record = source[index]
                # Its ids are a piece for the digest and the check of the vocabulary; draws take the record.
                units.append(
                    RecallUnit(source.where(index), (np.array(record["facts"], np.int32).reshape(-1),), record)
                )
        return units, Report("sequences", len(units), len(units), len(units))

    def draw(self, unit: Unit, rng: np.random.Generator) -> Example:
        assert isinstance(unit, RecallUnit)
        return recall.example(unit.record, unit.id)

    def chunks(self, unit: Unit) -> int:
        assert isinstance(unit, RecallUnit)
        return len(unit.record["facts"])

    def ask(self, unit: Unit, step: int, target: np.ndarray | None = None) -> Example:
        assert isinstance(unit, RecallUnit)
        return recall.example(unit.record, unit.id, step)

    def needs(self, unit: Unit, method: Method) -> Sizes:
        assert isinstance(unit, RecallUnit)
        return measure(method, recall.example(unit.record))


FORMATS: dict[str, Any] = {
    "dialogue": Dialogue,
    "online": Online,
    "fewshot": FewShot,
    "text": Text,
    "recall": RecallTask,
}


def build(config: DataConfig, tokenizer: Any) -> Askable:
    """The format of a config.

    Args:
      config: the data of the experiment.
      tokenizer: a fast tokenizer of transformers; the recall task needs none and ignores it.
    """
    kind = FORMATS[config.format]
    return kind(config, Template.of(config, tokenizer) if kind.tokenized else None)
