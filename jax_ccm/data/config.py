"""What to train and evaluate on, and how a record becomes a session: a class for each format, of what it reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jax_ccm.errors import UserError, require_least, require_probability, unknown
from jax_ccm.rules.types import Method

Format = Literal["dialogue", "online", "fewshot", "text", "recall"]
Role = Literal["user", "assistant"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of an experiment; `format` decides which keys there are besides these.

    A source is a string; several are joined in order.

    * ``path/to/file.jsonl`` (``*`` allowed), one record a line;
    * ``path/to/file.txt``, or a folder of ``.txt`` files, one text a file;
    * ``tfds:NAME[/CONFIG]:SPLIT?data_dir=DIR``, a prepared data set of tensorflow-datasets;
    * ``openai:PATH``, ``sharegpt:PATH``: files in formats of others, of which ``python -m jax_ccm.prepare list`` names
      all, with their options;
    * ``python:PACKAGE.MODULE:FUNCTION?name=value``, a function of your own that returns `jax_ccm.data.sources.Records`;
    * ``generated:conversations?split=train&size=2000&seed=0``, ``generated:questions?…``, ``generated:recall?…``;
      of a user who tells and asks and an assistant who answers, ``generated:chats?…&turns=6-24&age=4`` and
      ``generated:chat_questions?…``, where ``age`` is how many exchanges ago the last answer was told, and
      ``arbitrary=0.5`` the share of values that are any word instead of one that fits, ``wordy=0.5`` that of the
      assistant's turns that go on about nothing, ``quoted=0.3`` that of the questions for an earlier turn
      word for word, ``reactions=0.5`` that of the turns that answer no question and are learned from, too,
      ``changes=0.2`` that of the exchanges in which the user corrects something, beside one in twelve,
      ``varied=0.5`` that of the facts of several hundred kinds beside the usual ones, ``wide=0.5`` that of the
      conversations that tell and ask for them in several times as many wordings;
    * ``generated:needle?…&turns=8-16&age=4``, and likewise ``key_value``, ``updates``, ``distractors``, ``multi_hop``
      and ``counting``: questions that only their own conversation answers.
    """

    train: tuple[str, ...] = ()
    """Sources to train on."""
    weights: tuple[float, ...] = ()
    """Share of the draws of each source of ``train``, in order, such as [3, 1]; a source is then gone through at its
    own pace, as often as its share asks for. () draws every record as often as any other."""
    tokenized: str | None = None
    """Folder with the sources of ``train`` as tokens, written by ``python -m jax_ccm.prepare build CONFIG``: runs then
    read no corpus and hold none in memory. For formats "dialogue", "online" and "text"."""
    validation: tuple[str, ...] = ()
    """Sources to evaluate on during training, and to choose settings on."""
    test: tuple[str, ...] = ()
    """Sources to report on."""
    format: Format = "dialogue"
    """What a record holds: "dialogue" ``{"turns", "scored"?, "system"?}``, "online"
    ``{"contexts", "query", "target", "choices"?, "answers"?, "task"?, "system"?}``,
    "fewshot" ``{"text", "label", "choices"?}`` (each source is one task), "text"
    ``{"text"}``, "recall" (generated)."""
    batch_size: int = 8
    """Rows of a batch, over all processes."""
    tokens: int = 512
    """T, tokens of a row; compression tokens count."""
    buckets: tuple[int, ...] = ()
    """Row lengths below ``tokens``. Rows of similar length are then batched together and padded to the smallest bucket
    that holds them (with a proportional share of ``scored``), one compilation for each; () always pads to T."""
    max_chunks: int = 16
    """Most context chunks of a row."""
    scored: int = 128
    """Q, most scored tokens of a row."""
    loss: Literal["last", "every", "all"] = "last"
    """"last" scores the final target after a sampled number of time steps (the papers' recipe); "every" uses the whole
    session and scores all of it that has memory before it: every turn, chunk or label but the first (of a dialogue that
    names turns in ``scored``, those); "all" (text) scores every token but the session's first, as a language model is
    trained."""
    join: float = 0.0
    """Probability with which each pair of neighbouring context chunks is joined into one, drawn anew each time."""
    uncompressed: float = 0.0
    """Share of examples whose whole context is joined into the tail, so that nothing is compressed."""
    shuffle_seed: int | None = None
    """Seed of order and draws; None takes the run's."""

    def __post_init__(self):
        # A string is a sequence of strings, too: each of its letters would be taken for a source.
        for name in ("train", "validation", "test", "demonstrations", "roles"):
            value, what = getattr(self, name, None), "roles" if name == "roles" else "sources"
            if isinstance(value, str):
                raise UserError(f"data.{name} is the string {value!r}; give a list of {what}, [{value!r}]")
        # `dataclasses.replace` of the format alone would leave the class of another one.
        if type(self) is not kind_of({"format": self.format}):
            raise UserError(
                f"data.format is {self.format!r}, whose options are the fields of {BY_FORMAT[self.format].__name__}; "
                f"this is a {type(self).__name__}"
            )
        if self.loss not in ("last", "every", "all"):
            raise unknown("data.loss", self.loss, ("last", "every", "all"))
        if self.loss == "all" and self.format != "text":
            raise UserError(f"data.loss='all' is for format 'text'; format {self.format!r} has 'last' and 'every'")
        if self.weights and len(self.weights) != len(self.train):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for the {len(self.train)} sources of data.train; give "
                "one for each, or none (on the command line --data.weights with nothing behind it)"
            )
        if any(not (weight > 0 and math.isfinite(weight)) for weight in self.weights):
            raise UserError(
                f"data.weights is {list(self.weights)}; each must be positive, leave out a source of weight 0"
            )
        require_least(self, "data.", batch_size=1, tokens=1, scored=1, max_chunks=0)
        if any(not 0 < bucket < self.tokens for bucket in self.buckets):
            raise UserError(
                f"data.buckets={list(self.buckets)} must all lie between 0 and data.tokens={self.tokens}, which is the "
                "last bucket"
            )
        require_probability(self, "data.", "join", "uncompressed")
        # grain takes seeds of 32 bits.
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 2**32:
            raise UserError(f"data.shuffle_seed is {self.shuffle_seed}; it must lie in 0..{2**32 - 1}")
        self._check_own()

    def _check_own(self) -> None:
        """Refuses values of a format's own options that cannot be."""

    @property
    def draws_spans(self) -> bool:
        """Whether spans are drawn from each text, and what is outside them is kept, instead of chunks."""
        return False

    @property
    def writes_messages(self) -> bool:
        """Whether turns are written as the tokenizer's chat template writes messages."""
        return False

    @property
    def cuts_longer(self) -> bool:
        """Whether evaluation at a time step takes longer records, too, cut to it."""
        return True

    @property
    def mixes_records(self) -> bool:
        """Whether an example is made of several records of its source, so that a few of them make others."""
        return False

    @property
    def shown(self) -> tuple[str, ...]:
        """In evaluation: the sources whose records stand before what is asked, one for each evaluated source."""
        return ()

    @property
    def decides_units(self) -> list[str]:
        """Names of the fields that decide how records become units, beside the sources."""
        return ["format", *own_options(type(self))]

    def require(self, method: Method) -> None:
        """Refuses data that could not be trained on with a method.

        Raises:
          UserError: for joining with one that has no chunks to join, or windows of text that it does not divide.
        """
        for name in ("join", "uncompressed"):
            if getattr(self, name) and (method.context != "chunks" or not method.remembers or method.chunk):
                why = "cuts text by itself" if method.chunk else "compresses no chunks"
                raise UserError(
                    f"data.{name}={getattr(self, name)} has no effect with method {method.name!r}, which {why}; "
                    "set it to 0"
                )

    def fixed_texts(self) -> dict[str, Any]:
        """The fixed texts of a session, as `jax_ccm.data.template.Template` takes them."""
        return {}


@dataclasses.dataclass(frozen=True)
class LimitedConfig(DataConfig):
    """What formats have that drop records for their length."""

    max_turn_tokens: int = 128
    """Records with a longer turn, context or few-shot example are dropped and counted."""
    max_tokens: int = 400
    """Records with more are dropped and counted."""
    max_tokens_evaluation: int = 600
    """The same in evaluation."""

    def _check_own(self) -> None:
        require_least(self, "data.", max_turn_tokens=1, max_tokens=1, max_tokens_evaluation=1)


@dataclasses.dataclass(frozen=True)
class TurnsConfig(LimitedConfig):
    """What formats have in which two speak by turns."""

    bos: bool | None = None
    """Start each session with the tokenizer's beginning-of-sequence token (default true)."""
    eos: bool | None = None
    """Append the end-of-sequence token to each target; never counted in evaluation (default true)."""
    opening: str | None = None
    """Text before the first segment (default none)."""
    separator: str | None = None
    """Text that opens every segment but the first (default ``"\\nA:"``)."""
    unit_of_memory: Literal["turn", "exchange"] = "turn"
    """What is closed as one chunk of memory, in training, evaluation and conversations alike: every "turn" (or context)
    by itself, or an "exchange", a turn and the answer to it, counted back from the last; a first turn without a partner
    stands alone. ``max_chunks`` and time steps count these chunks."""
    chat_template: bool = False
    """Turns are messages of a user and an assistant by turns, the last one the assistant's, written as the tokenizer's
    chat template writes them, without the system message that some put in by themselves. It decides how sessions begin
    and turns end, so ``bos``, ``eos``, ``opening``, ``separator`` and ``answer`` must be left out. False writes lines
    of text."""
    roles: tuple[Role, ...] | None = None
    """With ``chat_template``: whose turns the loss "every" scores (default both)."""
    truncate: bool = True
    """Evaluation at time step t takes every record with at least t chunks and truncates it; false takes those with
    exactly t."""

    def _check_own(self) -> None:
        super()._check_own()
        if self.unit_of_memory not in ("turn", "exchange"):
            raise unknown("data.unit_of_memory", self.unit_of_memory, ("turn", "exchange"))
        if self.chat_template:
            for name in ("bos", "eos", "opening", "separator", "answer"):
                if getattr(self, name, None) is not None:
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

    @property
    def writes_messages(self) -> bool:
        return self.chat_template

    @property
    def cuts_longer(self) -> bool:
        return self.truncate

    def fixed_texts(self) -> dict[str, Any]:
        separator = "\nA:" if self.separator is None else self.separator
        return {
            "bos": self.bos is not False, "eos": self.eos is not False, "opening": self.opening or "",
            "separator": separator, "answer": separator,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DialogueConfig(TurnsConfig):
    """Dialogues, in which every turn is a time step."""

    clean: bool = False
    """Undo the spacing of tokenised corpora such as DailyDialog."""
    min_turns: int = 3
    """Shorter ones are dropped and counted; also the fewest turns of a draw (at least 3)."""
    max_turns: int | None = None
    """Longer ones are cut into pieces of at most this many turns (default no limit)."""

    def _check_own(self) -> None:
        super()._check_own()
        require_least(self, "data.", min_turns=3)
        if self.max_turns is not None and self.max_turns < self.min_turns:
            raise UserError(
                f"data.max_turns={self.max_turns} is less than data.min_turns={self.min_turns}: no dialogue could pass"
            )
        # Turns that stay together are cut together.
        unit = 2 if self.chat_template or self.unit_of_memory == "exchange" else 1
        if self.max_turns is not None and (piece := self.max_turns // unit * unit) < self.min_turns:
            raise UserError(
                f"data.max_turns={self.max_turns} cuts longer dialogues into pieces of {piece} turns, since exchanges "
                f"stay whole, and data.min_turns={self.min_turns} drops those; set data.max_turns to at least "
                f"{-(-self.min_turns // unit) * unit}"
            )


@dataclasses.dataclass(frozen=True)
class OnlineConfig(TurnsConfig):
    """Questions behind contexts that come one by one."""

    format: Format = "online"
    answer: str | None = None
    """Text between query and target (default as ``separator``)."""

    def fixed_texts(self) -> dict[str, Any]:
        made = super().fixed_texts()
        return made if self.answer is None else made | {"answer": self.answer}


@dataclasses.dataclass(frozen=True)
class FewShotConfig(LimitedConfig):
    """Few-shot tasks, whose examples are the contexts."""

    format: Format = "fewshot"
    max_turn_tokens: int = 256
    max_tokens: int = 1024
    """Demonstrations are added up to the first that would exceed it."""
    max_tokens_evaluation: int = 1024
    bos: bool = True
    """Start each session with the tokenizer's beginning-of-sequence token."""
    eos: bool = True
    """Append the end-of-sequence token to each target; never counted in evaluation."""
    opening: str = "Input:"
    """Text before the first segment."""
    separator: str = " Input:"
    """Text that opens every segment but the first."""
    answer: str = " Output:"
    """Text between query and target."""
    shots: int = 16
    """Demonstrations drawn for a training example."""
    symbols: float = 0.0
    """Share of the examples of training and its validation whose labels are any words, told by demonstrations alone."""
    demonstrations: tuple[str, ...] = ()
    """In evaluation: the sources of the demonstrations, one for each evaluated source, in order."""

    def _check_own(self) -> None:
        super()._check_own()
        require_least(self, "data.", shots=1)
        require_probability(self, "data.", "symbols")

    @property
    def mixes_records(self) -> bool:
        return True

    @property
    def shown(self) -> tuple[str, ...]:
        return self.demonstrations

    def fixed_texts(self) -> dict[str, Any]:
        return {
            "bos": self.bos, "eos": self.eos, "opening": self.opening, "separator": self.separator,
            "answer": self.answer,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    """Plain text, cut into chunks, or with spans that are drawn."""

    format: Format = "text"
    bos: bool = True
    """Start each session with the tokenizer's beginning-of-sequence token."""
    chunk: int = 24
    """Tokens of a chunk."""
    ratio: float | None = None
    """Share of a window's tokens that compression frees, in (0, 1): instead of chunks, spans are drawn anew each time,
    and what is outside them is kept (Sentinel). None for chunks."""
    hide: Literal["spans", "tokens"] | None = None
    """With ``ratio``: "spans" of 2 to ``span`` tokens (default), or single "tokens" (the scattered baseline)."""
    span: int | None = None
    """With ``ratio``: most tokens, or words, of a span (default 25)."""
    unit: Literal["tokens", "words"] | None = None
    """With ``ratio``: spans are of "tokens" (default), or of whole "words" as in the paper."""
    sampler: Literal["exact", "released"] | None = None
    """With ``ratio``: "exact" frees just the share asked for (default; with words as nearly as they allow); "released"
    is the paper's code, which frees about half when asked for 0.9."""

    def _check_own(self) -> None:
        require_least(self, "data.", chunk=1)
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(f"data.ratio is {self.ratio}; it must lie in (0, 1): the share of tokens that spans free")
        for name, allowed in {
            "hide": ("spans", "tokens"), "span": None, "unit": ("tokens", "words"), "sampler": ("exact", "released"),
        }.items():  # fmt: skip
            given = getattr(self, name)
            if given is None:
                continue
            if self.ratio is None:
                raise UserError(f"data.{name} has no effect without data.ratio; set it, or remove data.{name}")
            if self.hide == "tokens" and name != "hide":
                raise UserError(f"data.{name} has no effect with data.hide='tokens', which hides single tokens")
            if allowed is None:
                require_least(self, "data.", **{name: 2})
            elif given not in allowed:
                raise unknown(f"data.{name}", given, allowed)
        if (self.max_chunks + 1) * self.chunk > self.tokens:
            raise UserError(
                f"data.max_chunks={self.max_chunks} chunks of data.chunk={self.chunk} tokens and a "
                f"tail do not fit into data.tokens={self.tokens}; raise tokens or lower one of the others"
            )

    @property
    def draws_spans(self) -> bool:
        return self.ratio is not None

    @property
    def decides_units(self) -> list[str]:
        # The length of a window.
        return [*super().decides_units, "max_chunks"]

    def require(self, method: Method) -> None:
        super().require(method)
        window = self.chunk * (self.max_chunks + 1)
        if method.chunk is not None and window % method.chunk:
            raise UserError(
                f"windows of data.chunk={self.chunk} x (data.max_chunks={self.max_chunks} + 1) = {window} tokens are "
                f"no multiple of the {method.chunk} tokens that method {method.name!r} takes at a time; the rest of "
                "each would never be compressed"
            )

    def fixed_texts(self) -> dict[str, Any]:
        return {"bos": self.bos}


@dataclasses.dataclass(frozen=True)
class RecallConfig(DataConfig):
    """The generated recall task, which is made of tokens and needs no tokenizer."""

    format: Format = "recall"

    def _check_own(self) -> None:
        if self.loss == "every":
            raise UserError(
                "data.loss='every' has nothing to add for format 'recall', whose tail asks for every fact; use 'last'"
            )


BY_FORMAT: dict[str, type[DataConfig]] = {
    "dialogue": DialogueConfig,
    "online": OnlineConfig,
    "fewshot": FewShotConfig,
    "text": TextConfig,
    "recall": RecallConfig,
}


def own_options(kind: type[DataConfig]) -> list[str]:
    """Names of the fields that a format has besides those of all."""
    common = {field.name for field in dataclasses.fields(DataConfig)}
    return [field.name for field in dataclasses.fields(kind) if field.name not in common]


def kind_of(given: Mapping[str, Any]) -> type[DataConfig]:
    """The class whose fields the given values are, by the format that they name.

    Raises:
      UserError: for an unknown format, or an option that another format has.
    """
    name = given.get("format", DataConfig.format)
    if not isinstance(name, str) or name not in BY_FORMAT:
        raise unknown("data.format", str(name), BY_FORMAT)
    read = own_options(BY_FORMAT[name])
    others = {option for kind in BY_FORMAT.values() for option in own_options(kind)}
    for option in given:
        if option in others and option not in read:
            raise UserError(
                f"data.{option} is set, but format {name!r} does not read it (it reads "
                f"{', '.join(sorted(read)) or 'no options of its own'}); remove it (on the command line: "
                f"--data.{option} None) or change data.format"
            )
    return BY_FORMAT[name]
