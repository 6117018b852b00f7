"""How records become sessions: dialogue, online and few-shot; `documents` has plain text and the recall task.

A format tokenises all records once, drops those beyond the limits and counts them, and then draws examples. What it
keeps is read-only, and an example is put together anew at each draw.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from jax_ccm.data import exchanging
from jax_ccm.data.chat_template import ROLES
from jax_ccm.data.config import DialogueConfig, LimitedConfig, OnlineConfig, TurnsConfig
from jax_ccm.data.counts import Report
from jax_ccm.data.sources import Record, Records, Source, blank
from jax_ccm.data.template import Template
from jax_ccm.data.units import Unit
from jax_ccm.errors import UserError
from jax_ccm.rules.examples import Example, Segment, concat, with_prefix
from jax_ccm.rules.rows import Sizes, measure
from jax_ccm.rules.types import Method

# Why a record of contexts, query and target is left out.
BLANKS = "with one of their pieces empty"


def used(sources: Sequence[Source], format: str, report: Report, blanks: str) -> Iterator[tuple[str, Record]]:
    """Name and content of each record, all of whose texts say something; the others are counted as ``blanks``.

    What a converter left out is counted, too.
    """
    for source in sources:
        if isinstance(source, Records):
            # These records never reach the loop below.
            report.changed.update(source.changed)
            for reason, where in source.dropped:
                report.records += 1
                report.units += 1
                report.drop(reason, where)
        for index in range(len(source)):
            record = source[index]
            report.records += 1
            if blank(record, format):
                report.units += 1
                report.drop(blanks, source.where(index))
            else:
                yield source.where(index), record


class Format(Protocol):
    """What the training pipeline asks of a format. Loaded units stay as they are; draws copy.

    One whose units can be tokenised once and kept names their class as ``unit``.
    """

    def load(self, sources: Sequence[Source], evaluation: bool = False) -> tuple[list[Unit], Report]:
        """Tokenises all records, and drops those beyond the limits of training or of evaluation."""
        ...

    def draw(self, unit: Unit, rng: np.random.Generator) -> Example:
        """A training example."""
        ...

    def needs(self, unit: Unit, method: Method) -> Sizes:
        """The largest sizes that any draw of the unit needs."""
        ...


class Askable(Format, Protocol):
    """What an evaluation asks of a format besides.

    Attributes:
      tokenized: whether records are texts, so that a tokenizer is needed.
      has_choices: whether questions have several answers.
      template: the fixed texts of a session.
    """

    tokenized: bool
    has_choices: bool
    template: Template

    def chunks(self, unit: Unit) -> int:
        """The largest time step of a unit: context chunks before its tail."""
        ...

    def ask(self, unit: Unit, step: int, target: np.ndarray | None = None) -> Example:
        """The session behind ``step`` context chunks, its target, or this one, scored, but no end of sequence."""
        ...

    def answers(self, unit: Unit) -> tuple[Sequence[np.ndarray], int]:
        """Tokens of the answers that a question has, and which of them is right; where `has_choices`.

        Raises:
          UserError: for a record without.
        """
        ...

    def short_answers(self, unit: Unit) -> tuple[str, ...]:
        """Short forms of the target, for replies to be compared with, where the record gives some."""
        ...

    def age(self, unit: Unit) -> int | None:
        """How long ago what a question asks for was told, where its record says so."""
        ...

    def task(self, unit: Unit) -> str:
        """The task that a question belongs to, where its record names one, or ""."""
        ...

    def exchanged(self, unit: Unit) -> Unit | None:
        """The same session with what is asked for told otherwise, where that can be told (`data.exchanging`)."""
        ...


class NoChoices:
    """Questions with one answer."""

    tokenized = True
    has_choices = False

    def answers(self, unit: Unit) -> tuple[Sequence[np.ndarray], int]:
        raise UserError(f"{unit.id}: the record has no choices")

    def short_answers(self, unit: Unit) -> tuple[str, ...]:
        return ()

    def age(self, unit: Unit) -> int | None:
        return None

    def task(self, unit: Unit) -> str:
        return ""

    def exchanged(self, unit: Unit) -> Unit | None:
        return None


def segment(tokens: np.ndarray, scored: bool = False) -> Segment:
    """A segment that is scored everywhere or nowhere."""
    return Segment(tokens, np.full(len(tokens), scored))


def session(
    template: Template,
    turns: Sequence[np.ndarray],
    *,
    every: bool,
    score_end: bool = True,
    unit: int = 1,
    roles: Sequence[str] = ROLES,
    marked: frozenset[int] | None = None,
    start: np.ndarray | None = None,
    id: str = "",
) -> Example:
    """A dialogue as an example: ``unit`` turns a chunk, up to the tail ``query answer target end``.

    Args:
      template: the fixed pieces.
      turns: int32 tokens of the context turns, the query and the target. User and assistant take turns; the target is
        the assistant's.
      every: score all turns of ``roles`` but the first; if false only the target.
      score_end: whether the end-of-sequence token is scored (in training, not in evaluation).
      unit: turns of a chunk, counted back from the query; what is left over in front is a smaller one.
      roles: whose turns are scored; the target always is.
      marked: numbers of the turns that are scored, of those; None for all.
      start: int32 tokens of a system message, which is never compressed; None for the template's own beginning.
      id: names the record in messages.
    """
    *context, query, target = turns

    def role_of(number):
        # Counted back from the query, which is the user's.
        return ROLES[(len(context) - number) % 2]

    def named(number):
        return marked is None or number in marked

    def scored(number):
        return every and number > 0 and role_of(number) in roles and named(number)

    def written(numbers: Sequence[int]) -> Segment:
        """Turns that become memory together, the first with its head and the last with its tail."""
        first, last = role_of(numbers[0]), role_of(numbers[-1])
        said = [segment(context[number], scored(number)) for number in numbers]
        # Within an exchange as in the tail.
        texts = [said[0], *(with_prefix(template.answer, answer) for answer in said[1:])]
        return concat(segment(template.heads[first]), *texts, segment(template.tails[last], scored(numbers[-1])))

    tail = concat(
        segment(template.heads["user"]),
        segment(query, scored(len(context))),
        segment(template.answer),
        segment(target, True),
        segment(template.end, score_end),
    )
    # Where each chunk ends, counted back from the query and then turned around.
    ends = reversed(range(len(context), 0, -unit))
    chunks = [written(range(max(end - unit, 0), end)) for end in ends]
    begin = template.start if start is None else start
    return Example(begin, template.separator, (*chunks, tail), id, keeps_start=start is not None)


def despace(text: str) -> str:
    """Undoes the spacing of tokenised corpora: no space before punctuation and in contractions, one after a stop.

    Unlike the reference implementation, it leaves numbers ("3.5"), ellipses and quoted words alone.
    """
    # Curly apostrophes and ideographic full stops, which the reference replaces, too.
    text = text.replace("\u2019", "'").replace("\u3002", ".")
    text = re.sub(r"\s+([,.?!;])", r"\1", text)
    text = re.sub(r"(?<=\w)\s*'\s*(?=(?:s|t|m|d|re|ve|ll)\b)", "'", text)
    text = re.sub(r"\.(?=[A-Za-z])", ". ", text)
    return re.sub(r"\s+", " ", text).strip()


def turns_a_chunk(config: TurnsConfig) -> int:
    """How many turns or contexts are closed as one chunk of memory."""
    return 2 if config.unit_of_memory == "exchange" else 1


def chunks_of(config: TurnsConfig, turns: int) -> int:
    """Chunks of memory that so many turns or contexts make; the first may be of fewer than the others."""
    return -(-turns // turns_a_chunk(config))


def most_tokens(config: LimitedConfig, evaluation: bool) -> int:
    """The limit on a session's tokens."""
    return config.max_tokens_evaluation if evaluation else config.max_tokens


class Dialogue(NoChoices):
    """``{"turns", "scored"?, "system"?}``: every turn is a time step (CCM, section 4.1).

    With ``loss="last"`` a draw takes the first k turns, k uniform from ``min_turns`` to all (with a chat template as
    many as leave the last one to whoever has it), and scores the last of them; ``loss="every"`` takes all turns, and
    scores those that the record's ``scored`` names (numbers from 0), if it does; the last always.
    """

    unit = Unit

    def __init__(self, config: DialogueConfig, template: Template):
        self.config, self.template = config, template

    def load(self, sources: Sequence[Source], evaluation: bool = False) -> tuple[list[Unit], Report]:
        report, ids, dialogues, marked, systems = Report("dialogues"), [], [], [], []
        longest = None if evaluation else self.config.max_turns
        for where, record in used(sources, "dialogue", report, "with one of their turns empty"):
            turns = record["turns"]
            if self.config.clean:
                turns = [despace(turn) for turn in turns]
            named = _marked(record, where)
            # With messages a piece must end with an answer, whatever is closed together.
            cuts = _cuts(len(turns), longest, turns_a_chunk(self.config) if not self.config.chat_template else 2)
            for number, own in enumerate(cuts):
                ids.append(where + (f" piece {number}" if len(cuts) > 1 else ""))
                systems.append(record.get("system", ""))
                dialogues.append(turns[own.start : own.stop])
                marked.append(None if named is None else frozenset(i - own[0] for i in named if i in own))
        first = self.template.first([turns[0] if turns else "" for turns in dialogues])
        # All texts in one call to the tokenizer, which encodes a batch in parallel.
        later = iter(self.template.later([turn for turns in dialogues for turn in turns[1:]]))
        tokens = [(head, *(next(later) for _ in turns[1:])) for head, turns in zip(first, dialogues, strict=True)]
        least = self.config.min_turns
        starts = self.template.starts(systems, ids)
        return limited(self.config, ids, tokens, evaluation, report, least, "turns", marked, starts), report

    def draw(self, unit: Unit, rng: np.random.Generator) -> Example:
        every = self.config.loss == "every"
        count = len(unit.pieces)
        if not every:
            # Of messages the last is always the same side's.
            step = 2 if self.config.chat_template else 1
            # k is uniform in min_turns .. count (CCM's recipe); for messages in steps of two, down from count.
            most = (count - self.config.min_turns) // step
            count += step * (int(rng.integers(0, most + 1)) - most)
        return self._session(unit, count, every)

    def chunks(self, unit: Unit) -> int:
        return chunks_of(self.config, len(unit.pieces) - 2)

    def ask(self, unit: Unit, step: int, target: np.ndarray | None = None) -> Example:
        size = turns_a_chunk(self.config)
        turns = unit.pieces[: step * size + 2]
        return session(self.template, turns, every=False, score_end=False, unit=size, start=unit.start, id=unit.id)

    def _session(self, unit: Unit, count: int, every: bool) -> Example:
        size, roles = turns_a_chunk(self.config), self.config.roles or ROLES
        turns, marked = unit.pieces[:count], unit.marked
        return session(
            self.template, turns, every=every, unit=size, roles=roles, marked=marked, start=unit.start, id=unit.id
        )

    def needs(self, unit: Unit, method: Method) -> Sizes:
        every, least = self.config.loss == "every", self.config.min_turns
        whole = measure(method, self._session(unit, len(unit.pieces), every))
        if every:
            return whole
        # Any turn from the min_turns-th on may be the last of a draw.
        scored = max(len(turn) for turn in unit.pieces[least - 1 :]) + len(self.template.end)
        if method.context != "dropped":
            return Sizes(whole.tokens, whole.memory, scored)
        # Without context a draw is its own last two turns, and the longest may be in the middle of a dialogue.
        counts = range(least, len(unit.pieces) + 1)
        tokens = max(measure(method, self._session(unit, k, False)).tokens for k in counts)
        return Sizes(tokens, 0, scored)


def _cuts(turns: int, longest: int | None, unit: int) -> list[range]:
    """The numbers of the turns of each piece of a dialogue, of up to ``longest``; ``unit`` turns stay together.

    They are counted back from the last turn, so that a piece ends with a turn of whoever ends the dialogue.
    """
    if longest is None or turns <= longest:
        return [range(turns)]
    units = -(-turns // unit)
    count = -(-units // max(longest // unit, 1))
    # Pieces of nearly equal length; a first unit without all of its turns begins before turn 0.
    bounds = np.linspace(0, units, count + 1).astype(int) * unit - (units * unit - turns)
    return [range(max(first, 0), last) for first, last in itertools.pairwise(bounds.tolist())]


def _marked(record: Record, where: str) -> frozenset[int] | None:
    """The turns that a record names for the loss, or None if it names none.

    Raises:
      UserError: for anything but numbers of its turns, the first of which is never scored.
    """
    found = record.get("scored")
    if found is None:
        return None
    most = len(record["turns"]) - 1
    if not isinstance(found, list) or not all(type(i) is int and 0 < i <= most for i in found):
        raise UserError(
            f"{where}: field 'scored' lists numbers of turns, from 1 to {most}; it is {reprlib.repr(found)}"
        )
    return frozenset(found)


class Online:
    """``{"contexts", "query", "target", "system"?}``: contexts are time steps; the whole record is always used."""

    tokenized, unit = True, Unit

    def __init__(self, config: OnlineConfig, template: Template):
        self.config, self.template = config, template
        self._records: dict[str, Record] = {}

    @property
    def has_choices(self) -> bool:
        return any("choices" in record for record in self._records.values())

    def load(self, sources: Sequence[Source], evaluation: bool = False) -> tuple[list[Unit], Report]:
        report, ids, records = Report("records"), [], []
        for where, record in used(sources, "online", report, BLANKS):
            ids.append(where)
            records.append(record)
            if evaluation:
                self._records[where] = record
        inputs = [[*record["contexts"], record["query"]] for record in records]
        first = self.template.first([texts[0] for texts in inputs])
        later = iter(self.template.later([text for texts in inputs for text in texts[1:]]))
        targets = self.template.target([record["target"] for record in records])
        tokens = [
            (head, *(next(later) for _ in texts[1:]), target)
            for head, texts, target in zip(first, inputs, targets, strict=True)
        ]
        starts = self.template.starts([record.get("system", "") for record in records], ids)
        return limited(self.config, ids, tokens, evaluation, report, 2, "pieces", starts=starts), report

    def draw(self, unit: Unit, rng: np.random.Generator) -> Example:
        every, size, roles = self.config.loss == "every", turns_a_chunk(self.config), self.config.roles or ROLES
        return session(self.template, unit.pieces, every=every, unit=size, roles=roles, start=unit.start, id=unit.id)

    def needs(self, unit: Unit, method: Method) -> Sizes:
        return measure(method, self.draw(unit, np.random.default_rng(0)))

    def chunks(self, unit: Unit) -> int:
        return chunks_of(self.config, len(unit.pieces) - 2)

    def ask(self, unit: Unit, step: int, target: np.ndarray | None = None) -> Example:
        *contexts, query, own = unit.pieces
        size = turns_a_chunk(self.config)
        turns = (*contexts[: step * size], query, own if target is None else target)
        return session(self.template, turns, every=False, score_end=False, unit=size, start=unit.start, id=unit.id)

    def answers(self, unit: Unit) -> tuple[Sequence[np.ndarray], int]:
        record = self._records[unit.id]
        if "choices" not in record:
            raise UserError(f"{unit.id}: the record has no choices; accuracy by likelihood needs them in every record")
        return self.template.target(record["choices"]), record["choices"].index(record["target"])

    def short_answers(self, unit: Unit) -> tuple[str, ...]:
        return tuple(self._records[unit.id].get("answers", ()))

    def age(self, unit: Unit) -> int | None:
        age = self._records[unit.id].get("age")
        if age is not None and (type(age) is not int or age < 1):
            raise UserError(f"{unit.id}: field 'age' must be a whole number, at least 1; it is {age!r}")
        return age

    def task(self, unit: Unit) -> str:
        return self._records[unit.id].get("task", "")

    def exchanged(self, unit: Unit) -> Unit | None:
        if (told := exchanging.exchanged(self._records[unit.id])) is None:
            return None
        head, later = self.template.first(told[:1]), self.template.later(told[1:])
        return dataclasses.replace(unit, pieces=(*head, *later, *unit.pieces[-2:]))


def limited(
    config: LimitedConfig,
    ids: Sequence[str],
    tokens: Sequence[tuple[np.ndarray, ...]],
    evaluation: bool,
    report: Report,
    least: int,
    noun: str,
    marked: Sequence[frozenset[int] | None] | None = None,
    starts: Sequence[np.ndarray | None] | None = None,
) -> list[Unit]:
    """The sessions within the limits, as units; the others are counted in the report."""
    units: list[Unit] = []
    longest, most = config.max_turn_tokens, most_tokens(config, evaluation)
    report.units += len(tokens)
    nothing = [None] * len(ids)
    for id, pieces, named, start in zip(ids, tokens, marked or nothing, starts or nothing, strict=True):
        if not all(map(len, pieces)) and len(pieces) >= least:
            # White space, or what the tokenizer leaves out.
            report.drop(f"with one of their {noun} empty", id)
        elif len(pieces) < least:
            report.drop(f"with fewer than {least} {noun}")
        elif max(map(len, pieces)) > longest:
            report.drop(f"with one of their {noun} longer than {longest} tokens")
        elif sum(map(len, pieces)) + (0 if start is None else len(start)) > most:
            report.drop(f"of more than {most} tokens")
        else:
            units.append(Unit(id, pieces, marked=named, start=start))
    report.kept = len(units)
    return units
