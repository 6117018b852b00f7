"""What to train and evaluate on, and how a record becomes a session."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jax_ccm.errors import UserError, unknown

# Fields that only some formats read, with the value each takes when it is left at None.
_TEXT_PIECES = {"bos": True, "eos": True, "max_turn_tokens": 128, "max_tokens": 400, "max_tokens_evaluation": 600}
_TURNS = {
    **_TEXT_PIECES, "opening": "", "separator": "\nA:", "truncate": True, "unit_of_memory": "turn",
    "chat_template": False, "roles": ("user", "assistant"),
}  # fmt: skip
# What a chat template decides by itself.
_OF_TEMPLATE = ("bos", "eos", "opening", "separator", "answer")
FORMAT_OPTIONS: dict[str, dict[str, Any]] = {
    "dialogue": {**_TURNS, "clean": False, "min_turns": 3, "max_turns": None},
    "online": {**_TURNS, "answer": None},
    "fewshot": {
        **_TEXT_PIECES, "opening": "Input:", "separator": " Input:", "answer": " Output:", "shots": 16,
        "max_turn_tokens": 256, "max_tokens": 1024, "max_tokens_evaluation": 1024, "demonstrations": (),
    },
    "text": {
        "bos": True, "chunk": 24, "ratio": None, "hide": "spans", "span": 25, "unit": "tokens", "sampler": "exact",
    },
    "recall": {},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of an experiment.

    A source is a string; several are joined in order.

    * ``path/to/file.jsonl`` (``*`` allowed), one record a line;
    * ``path/to/file.txt``, or a folder of ``.txt`` files, one text a file;
    * ``tfds:NAME[/CONFIG]:SPLIT?data_dir=DIR``, a prepared data set of tensorflow-datasets;
    * ``python:PACKAGE.MODULE:FUNCTION?name=value``, a function of your own that returns `jax_ccm.data.sources.Records`;
    * ``generated:conversations?split=train&size=2000&seed=0``, ``generated:questions?…``, ``generated:recall?…``;
      of a user who tells and asks and an assistant who answers, ``generated:chats?…&turns=6-24&age=4`` and
      ``generated:chat_questions?…``, where ``age`` is how many exchanges ago the last answer was told, and
      ``arbitrary=0.5`` the share of values that are any word instead of one that fits, ``wordy=0.5`` that of the
      assistant's turns that go on about nothing.

    Fields that only some formats read are None unless set; one that the chosen format does not read is an error.

    Attributes:
      train: sources to train on.
      weights: share of the draws of each source of ``train``, in order, such as [3, 1]; a source is then gone through
        at its own pace, as often as its share asks for. () draws every record as often as any other.
      validation: sources to evaluate on during training, and to choose settings on.
      test: sources to report on.
      format: what a record holds: "dialogue" ``{"turns", "scored"?}``, "online"
        ``{"contexts", "query", "target", "choices"?}``, "fewshot" ``{"text", "label"}`` (each source is one task),
        "text" ``{"text"}``, "recall" (generated).
      batch_size: rows of a batch, over all processes.
      tokens: T, places of a row; compression tokens count.
      buckets: row lengths below ``tokens``. Rows of similar length are then batched together and padded to the smallest
        bucket that holds them (with a proportional share of ``scored``), one compilation for each; () always pads to T.
      max_chunks: most context chunks of a row.
      scored: Q, most scored tokens of a row.
      loss: "last" scores the final target after a sampled number of time steps (the papers' recipe); "every" uses the
        whole session and scores all of it that has memory before it: every turn, chunk or label but the first (of a
        dialogue that names turns in ``scored``, those); "all"
        (text) scores every token but the session's first, as a language model is trained.
      join: probability with which each pair of neighbouring context chunks is joined into one, drawn anew each time.
      uncompressed: share of examples whose whole context is joined into the tail, so that nothing is compressed.
      shuffle_seed: seed of order and draws; None takes the run's.
      bos: start each session with the tokenizer's beginning-of-sequence token (default true).
      eos: append the end-of-sequence token to each target; never counted in evaluation (default true).
      opening: text before the first segment (default none; fewshot ``"Input:"``).
      separator: text that opens every segment but the first (default ``"\\nA:"``; fewshot ``" Input:"``).
      answer: online and fewshot: text between query and target (default as ``separator``; fewshot ``" Output:"``).
      max_turn_tokens: records with a longer turn, context or few-shot example are dropped and counted (default 128;
        fewshot 256).
      max_tokens: records with more are dropped and counted (default 400). Fewshot: demonstrations are added up to the
        first that would exceed it (default 1024).
      max_tokens_evaluation: the same in evaluation (default 600; fewshot 1024).
      unit_of_memory: dialogue and online: what is closed as one chunk of memory, in training, evaluation and
        conversations alike: every "turn" (or context) by itself (default), or an "exchange", a turn and the answer to
        it, counted back from the last; a first turn without a partner stands alone. ``max_chunks`` and time steps count
        these chunks.
      chat_template: dialogue and online: turns are messages of a user and an assistant by turns, the last one the
        assistant's, written as the tokenizer's chat template writes them, without the system message that some put in
        by themselves. It decides how sessions begin and turns end, so ``bos``, ``eos``, ``opening``, ``separator`` and
        ``answer`` must be left out. False writes lines of text (default).
      roles: with ``chat_template``: whose turns the loss "every" scores (default both).
      truncate: evaluation at time step t takes every record with at least t chunks and truncates it (true, default);
        false takes those with exactly t.
      clean: dialogue: undo the spacing of tokenised corpora such as DailyDialog (default false).
      min_turns: dialogue: shorter ones are dropped and counted; also the fewest turns of a draw (default and least 3).
      max_turns: dialogue: longer ones are cut into pieces of at most this many turns (default no limit).
      shots: fewshot: demonstrations drawn for a training example (default 16).
      demonstrations: fewshot evaluation: the sources of the demonstrations, one for each evaluated source, in order.
      chunk: text: tokens of a chunk (default 24).
      ratio: text: share of a window's places that compression frees, in (0, 1): instead of chunks, spans are drawn anew
        each time, and what is outside them is kept (Sentinel). None for chunks.
      hide: text with ratio: "spans" of 2 to ``span`` tokens (default), or single "tokens" (the scattered baseline).
      span: text with ratio: most tokens, or words, of a span (default 25).
      unit: text with ratio: spans are of "tokens" (default), or of whole "words" as in the paper.
      sampler: text with ratio: "exact" frees just the share asked for (default; with words as nearly as they allow);
        "released" is the paper's code, which frees about half when asked for 0.9.
    """

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    format: Literal["dialogue", "online", "fewshot", "text", "recall"] = "dialogue"
    batch_size: int = 8
    tokens: int = 512
    buckets: tuple[int, ...] = ()
    max_chunks: int = 16
    scored: int = 128
    loss: Literal["last", "every", "all"] = "last"
    join: float = 0.0
    uncompressed: float = 0.0
    shuffle_seed: int | None = None
    bos: bool | None = None
    eos: bool | None = None
    opening: str | None = None
    separator: str | None = None
    answer: str | None = None
    max_turn_tokens: int | None = None
    max_tokens: int | None = None
    max_tokens_evaluation: int | None = None
    unit_of_memory: Literal["turn", "exchange"] | None = None
    chat_template: bool | None = None
    roles: tuple[Literal["user", "assistant"], ...] | None = None
    truncate: bool | None = None
    clean: bool | None = None
    min_turns: int | None = None
    max_turns: int | None = None
    shots: int | None = None
    demonstrations: tuple[str, ...] | None = None
    chunk: int | None = None
    ratio: float | None = None
    hide: Literal["spans", "tokens"] | None = None
    span: int | None = None
    unit: Literal["tokens", "words"] | None = None
    sampler: Literal["exact", "released"] | None = None

    def __post_init__(self):
        for name in ("train", "validation", "test", "demonstrations", "roles"):
            value, what = getattr(self, name), "roles" if name == "roles" else "sources"
            if isinstance(value, str):
                raise UserError(f"data.{name} is the string {value!r}; give a list of {what}, [{value!r}]")
        if self.format not in FORMAT_OPTIONS:
            raise unknown("data.format", self.format, FORMAT_OPTIONS)
        if self.loss not in ("last", "every", "all"):
            raise unknown("data.loss", self.loss, ("last", "every", "all"))
        if self.loss == "all" and self.format != "text":
            raise UserError(f"data.loss='all' is for format 'text'; format {self.format!r} has 'last' and 'every'")
        read = FORMAT_OPTIONS[self.format]
        for name in sorted(set().union(*FORMAT_OPTIONS.values())):
            if name not in read and getattr(self, name) is not None:
                raise UserError(
                    f"data.{name} is set, but format {self.format!r} does not read it (it reads "
                    f"{', '.join(sorted(read)) or 'no options of its own'}); remove it or change data.format"
                )
        self._check_template()
        if self.weights and len(self.weights) != len(self.train):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for the {len(self.train)} sources of data.train; give "
                "one for each"
            )
        if any(not (weight > 0 and math.isfinite(weight)) for weight in self.weights):
            raise UserError(
                f"data.weights is {list(self.weights)}; each must be positive, leave out a source of weight 0"
            )
        for name in ("batch_size", "tokens", "scored"):
            self._at_least(name, 1)
        self._at_least("max_chunks", 0)
        if any(not 0 < bucket < self.tokens for bucket in self.buckets):
            raise UserError(
                f"data.buckets={list(self.buckets)} must all lie between 0 and data.tokens={self.tokens}, which is the "
                "last bucket"
            )
        for name, least in {
            "max_turn_tokens": 1,
            "max_tokens": 1,
            "max_tokens_evaluation": 1,
            "shots": 1,
            "chunk": 1,
        }.items():
            if name in read:
                self._at_least(name, least)
        for name in ("join", "uncompressed"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"data.{name} is {getattr(self, name)}; it is a probability, from 0 to 1")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 2**32:
            raise UserError(f"data.shuffle_seed is {self.shuffle_seed}; it must lie in 0..{2**32 - 1}")
        if self.format == "recall" and self.loss == "every":
            raise UserError(
                "data.loss='every' has nothing to add for format 'recall', whose tail asks for every fact; use 'last'"
            )
        if self.format == "dialogue":
            self._at_least("min_turns", 3)
            if self.max_turns is not None and self.max_turns < self.option("min_turns"):
                raise UserError(
                    f"data.max_turns={self.max_turns} is less than data.min_turns={self.option('min_turns')}: "
                    "no dialogue could pass"
                )
        if self.unit_of_memory not in (None, "turn", "exchange"):
            raise unknown("data.unit_of_memory", self.unit_of_memory, ("turn", "exchange"))
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(f"data.ratio is {self.ratio}; it must lie in (0, 1): the share of places that spans free")
        for name in ("hide", "span", "unit", "sampler"):
            if getattr(self, name) is None:
                continue
            if self.ratio is None:
                raise UserError(f"data.{name} has no effect without data.ratio; set it, or remove data.{name}")
            if self.hide == "tokens" and name != "hide":
                raise UserError(f"data.{name} has no effect with data.hide='tokens', which hides single tokens")
        for name, allowed in {
            "hide": ("spans", "tokens"), "unit": ("tokens", "words"), "sampler": ("exact", "released"),
        }.items():  # fmt: skip
            if self.format == "text" and self.option(name) not in allowed:
                raise unknown(f"data.{name}", self.option(name), allowed)
        if self.format == "text":
            self._at_least("span", 2)
        if self.format == "text" and (self.max_chunks + 1) * self.option("chunk") > self.tokens:
            raise UserError(
                f"data.max_chunks={self.max_chunks} chunks of data.chunk={self.option('chunk')} tokens and a "
                f"tail do not fit into data.tokens={self.tokens}; raise tokens or lower one of the others"
            )

    def _check_template(self):
        if self.chat_template:
            for name in _OF_TEMPLATE:
                if getattr(self, name) is not None:
                    raise UserError(f"data.{name} is set, but data.chat_template decides it; remove one of the two")
        elif self.roles is not None:
            raise UserError("data.roles has no effect without data.chat_template: true; set that, or remove data.roles")
        for role in self.roles or ("user",):
            if role not in ("user", "assistant"):
                raise unknown("data.roles", role, ("user", "assistant"))
        if self.roles is not None and not self.roles:
            raise UserError("data.roles is empty: nothing would be scored; leave it out for both")
        if self.roles is not None and self.loss != "every":
            raise UserError(f"data.roles has no effect with data.loss={self.loss!r}, which scores the last turn alone")

    def _at_least(self, name: str, least: int):
        value = self.option(name)
        if value < least:
            raise UserError(f"data.{name} is {value}; it must be at least {least}")

    def option(self, name: str) -> Any:
        """The value of a field, or the default that the format gives it."""
        value = getattr(self, name)
        if value is not None:
            return value
        value = FORMAT_OPTIONS[self.format].get(name)
        return self.option("separator") if name == "answer" and value is None else value
