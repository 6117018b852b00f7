"""The sections of a config: what each of its keys means, and which values it cannot have."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jax_ccm.errors import UserError, require_least
from jax_ccm.methods import METHODS, builder_of
from jax_ccm.numerics import Precision
from jax_ccm.rules.types import Method

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """Sizes of a tiny Llama-like decoder that is trained from scratch (used where `model.source` is empty)."""

    layers: int = 2
    """Number of layers."""
    hidden: int = 64
    """Model dimension."""
    intermediate: int = 128
    """Inner dimension of the MLP."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key/value heads."""
    vocab_size: int = 0
    """Vocabulary; 0 takes that of the tokenizer or of the generated data."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self):
        if min(self.layers, self.hidden, self.intermediate, self.heads, self.kv_heads) < 1:
            raise UserError("model.scratch: layers, hidden, intermediate, heads and kv_heads must be at least 1")
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UserError(
                f"model.scratch: hidden={self.hidden} does not split into heads={self.heads} of an even size (RoPE "
                "rotates pairs)"
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.scratch: {self.heads} query heads cannot share {self.kv_heads} key/value heads; the first must "
                "be a multiple of the second"
            )


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The base model."""

    source: str = ""
    """Local folder, hub id "org/name", a .gguf file, or "package:NAME/FILE.gguf" inside an installed Python package;
    empty for a decoder from scratch."""
    revision: str = ""
    """Branch, tag or commit of a source on the hub; empty for its main branch. The same as "org/name@revision"."""
    tokenizer: str = ""
    """Where the tokenizer comes from ("org/name@revision" pins it, too); empty for the same place as the model."""
    precision: str = "auto"
    """Types of the base's weights, of the operands of products and of activations: "float32"; "bfloat16"; "mixed"
    (weights and products bfloat16, activations float32); "params=T,compute=T,output=T"; or "auto", what is fastest on
    the platform and processor. Adapters and sums are always float32."""
    rope_length: int | None = None
    """Positions that sessions will reach, for a model whose rotary frequencies depend on it (dynamic NTK, longrope):
    they are chosen once, since keys in a cache cannot follow. Left out: frequencies of the length before scaling. An
    adapter belongs to the frequencies that it was trained with."""
    scratch: ScratchConfig = ScratchConfig()
    """Sizes of the decoder from scratch."""

    def __post_init__(self):
        if self.precision != "auto":
            Precision.of(self.precision)  # refuses what is none


@dataclasses.dataclass(frozen=True)
class NamedMethod:
    """The compression method. Only what is given is passed on, so a method's own defaults hold for the rest."""

    name: str = "ccm_concat"
    """A key of `jax_ccm.methods.METHODS`, or "package.module:function" for one of your own."""

    def options(self) -> dict[str, Any]:
        """What was given besides the name, for `jax_ccm.methods.build`."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}
        return {name: value for name, value in given.items() if value is not None}


def _with_options(builders: Mapping[str, Callable[..., Method]], base: type) -> type:
    """`NamedMethod` with a field for every option of some methods, so that a new method needs no line here."""
    found: dict[str, Any] = {}
    for method, builder in builders.items():
        hints = typing.get_type_hints(builder)
        for name in inspect.signature(builder).parameters:
            if name not in hints:
                raise UserError(f"option {name!r} of method {method!r} has no type; annotate it, as in {name}: int = 2")
            # Methods may share an option, as one field of one type.
            if found.setdefault(name, hints[name]) != hints[name]:
                raise TypeError(f"option {name!r} of method {method!r} is {hints[name]}, but {found[name]} in another")
    # "  name: what it means, in one or more lines" of the builders' docstrings.
    text = "\n".join(inspect.getdoc(builder) or "" for builder in builders.values())
    helps: dict[str, str] = {}
    for entry in re.finditer(r"^  (\w+): (.*(?:\n    .*)*)", text, re.MULTILINE):
        helps.setdefault(entry[1], " ".join(entry[2].split()))
    lines = ['name: a key of `jax_ccm.methods.METHODS`, or "package.module:function" for one of your own.']
    for name in found:
        of = ", ".join(key for key, builder in builders.items() if name in inspect.signature(builder).parameters)
        lines.append(f"{name}: {helps.get(name, '').rstrip('.')} (for {of}).")
    # None stands for what was not given: the method's own default then holds.
    fields = [(name, kind | None, dataclasses.field(default=None)) for name, kind in found.items()]
    made = dataclasses.make_dataclass("MethodConfig", fields, bases=(base,), frozen=True)
    made.__doc__ = "\n".join([NamedMethod.__doc__ or "", "", "Attributes:", *(f"  {line}" for line in lines)])
    made.__module__ = __name__
    return made


if typing.TYPE_CHECKING:
    # A class that is made at run time is none to a type checker.
    MethodConfig = NamedMethod
else:
    MethodConfig = _with_options(METHODS, NamedMethod)


# Made once for each name: two configs are equal only if their classes are the same.
@functools.cache
def own_method(name: str) -> type:
    """`MethodConfig` with the options of a method of the user's own, too."""
    return _with_options({name: builder_of(name)}, MethodConfig)


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """The adapter: its sizes, and what it starts from."""

    rank: int = 8
    """LoRA rank; 0 trains the compression embeddings alone."""
    alpha: float = 16.0
    """The LoRA branch is scaled by alpha / rank."""
    dropout: float = 0.05
    """On the input of the LoRA branch, in training only."""
    targets: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Projections with a LoRA: of attention, and of the MLP (gate_proj, up_proj, down_proj)."""
    load: str = ""
    """An adapter of the same sizes to start from, a folder, a name or "org/name@revision" on the hub; empty for a fresh
    one. `targets` may name more projections than it has: those start fresh."""
    accept_other_method: bool = False
    """Start from `load` even if it was trained for another method, which is said: for a memory of another kind, such as
    CCM-merge from CCM-concat, or with more compression tokens: then the last that it has stands for each further one,
    too. Of more than the method has, the first are taken."""
    merge: str = ""
    """A plain LoRA of an earlier stage that is merged into the base weights first (the paper's two stages)."""
    accept_quantised_base: bool = False
    """Take an adapter that was trained on another quantisation of the same base, such as a GGUF file of it; how far the
    weights are apart is said. A base that was merely trained further is not told from that."""

    def __post_init__(self):
        require_least(self, "adapter.", rank=0)
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout is {self.dropout}; it must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 3e-4
    """At its highest."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to zero along a half cosine, or constant."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled; not applied to norm scales and biases."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 for no clipping."""
    accumulation: int = 1
    """Micro-batches of `data.batch_size` rows for one step; their mean losses are averaged."""

    def __post_init__(self):
        require_least(self, "optimizer.", accumulation=1, clip_norm=0, weight_decay=0)
        # Not ``learning_rate <= 0``: NaN is refused, too.
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"optimizer.warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run."""

    steps: int = 1000
    """Optimizer steps."""
    seed: int = 42
    """Of fresh weights, data order and dropout."""
    trainable: Literal["adapter", "all"] = "adapter"
    """Train the adapter on a frozen base, or everything (a model from scratch)."""
    remat: Literal["none", "dots", "all"] = "none"
    """What the backward pass recomputes of each layer instead of keeping it: nothing; all but the products with weights
    (less memory, hardly slower); or everything (least memory, about a third slower)."""
    attention: Literal["auto", "xla", "pallas"] = "auto"
    """In steps and validation: plain matrix products ("xla"), the kernel ("pallas"; on a CPU only interpreted, which is
    slow), or what suits the device: the kernel on a TPU, products elsewhere."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 100
    """Steps between evaluations on validation data; 0 for none. The last step is evaluated, too."""
    eval_examples: int = 64
    """Validation examples; the same ones every time."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step and an interrupt are saved, too."""
    keep: int = 2
    """Newest checkpoints that are kept. The best adapter is kept beside them."""
    grace: float = 30.0
    """Seconds from SIGTERM to the kill that follows it, in which the step in hand is finished and saved; 0 for no
    limit. A step that takes longer is given up: the checkpoint before stays."""
    heartbeat: int = 60
    """With several processes: seconds of silence after which one counts as dead, and the others stop."""
    wandb: str = ""
    """Weights & Biases project to log to as well; empty for none."""

    def __post_init__(self):
        require_least(
            self, "train.", steps=1, log_every=1, eval_every=0, eval_examples=1, checkpoint_every=1, keep=1, grace=0,
            heartbeat=1, seed=0,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Quality by time step, or of whole texts."""

    by: Literal["step", "age", "task", "text", "continuation", "stream"] = "step"
    """Score a target behind so many chunks of context ("step"); questions by how long ago what they ask for was told
    ("age"; online records with a field of that name); every question behind its whole context, by the "task" that its
    record names; every token of a plain "text"; texts that are continued from a compressed beginning
    ("continuation"); or every token of a "stream" of text that is read with a fixed number of slots, beside a window
    and StreamingLLM with as many."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 12)
    """By step: time steps (closed chunks before the target) to report. By age: the ages. By stream: lengths in text
    tokens, up to data.chunk times data.max_chunks + 1."""
    window: int = 160
    """By stream: live slots (sink, memory and raw text) beyond which the oldest data.chunk tokens are closed; memory
    beyond cache.memory_capacity is forgotten."""
    batch_size: int = 4
    """Rows of a batch."""
    max_examples: int = 0
    """Examples for each time step, or windows of text; 0 for all."""
    reply_tokens: int = 0
    """Most tokens of a reply that each system makes to each question, to be compared with the answer; 0 for none. By
    continuation: tokens of each, and how many at the end of a window are what really comes."""
    samples: int = 4
    """By continuation: how many are drawn for each prompt."""
    top_p: float = 0.9
    """By continuation: the share of the likeliest tokens that are drawn from (nucleus)."""
    seed: int = 0
    """By continuation: of the drawing."""
    judge: str = ""
    """By continuation: the model whose perplexity says how fluent they are (as `model.source`); empty: the evaluated
    base, which then judges itself."""
    embedder: str = ""
    """By continuation: a model of sentence-transformers for their similarity to what really comes; empty: none."""
    control: Literal["another", "exchanged"] = "another"
    """What stands beside the right context of a question: that of "another" one; or, where the data have choices, the
    own one with what is asked for "exchanged" for the words of another choice, wherever they were told."""
    attention: int = 0
    """Questions (by step: of the last step) whose attention to sink, slots and text is measured, layer by layer; 0 for
    none."""
    methods: tuple[str, ...] = ()
    """What stands side by side: "none" and "full" context, "memory" (the config's method), and "uncompressed" (full
    context, the adapter on all text). Empty: by step or age none, full, memory; by text full, uncompressed, memory."""

    def __post_init__(self):
        require_least(self, "eval.", batch_size=1, window=1, max_examples=0, reply_tokens=0, attention=0, samples=1)
        if not 0 < self.top_p <= 1:
            raise UserError(f"eval.top_p is {self.top_p}; it must lie in (0, 1]")
        if self.by == "continuation" and not self.reply_tokens:
            raise UserError("eval.by is 'continuation', and eval.reply_tokens 0; say how many tokens, such as 64")
        if self.control == "exchanged" and self.by in ("text", "continuation", "stream"):
            raise UserError(
                f"eval.control is 'exchanged', and eval.by {self.by!r} asks no questions; set eval.control: another"
            )
        if self.attention and self.by in ("text", "continuation", "stream"):
            raise UserError(
                f"eval.attention={self.attention} is for questions, and eval.by is {self.by!r}; set it to 0"
            )
        # What takes every record as a whole has no steps.
        steps, whole = self.steps, self.by in ("task", "text", "continuation")
        if not whole and (not steps or min(steps) < 1 or len(set(steps)) < len(steps)):
            raise UserError(f"eval.steps is {list(steps)}; give different numbers from 1, such as [1, 2, 4]")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The recurrent cache."""

    memory_capacity: int = 64
    """Most memory slots of a session; 0 where the method writes none."""
    raw_capacity: int = 512
    """Most raw text tokens of a session."""
    overflow: Literal["error", "evict"] = "error"
    """When memory is full: refuse, or drop the oldest, in conversations and in evaluations alike. Sessions that drop
    it stay within the positions of the base for ever: the gap that it leaves behind the sink is closed in time."""

    def __post_init__(self):
        require_least(self, "cache.", memory_capacity=0, raw_capacity=1)

    @property
    def newest(self) -> int | None:
        """How many memory slots of a session there may be, older ones being forgotten; None where that is refused."""
        return self.memory_capacity if self.overflow == "evict" else None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes share the work; the product of the sizes is their number, and -1 is the rest."""

    data: int = -1
    """Copies of the model; rows of a batch and sessions are spread over them."""
    fsdp: int = 1
    """Pieces of the weights, gathered layer by layer; rows are spread over these, too."""
    tensor: int = 1
    """Devices that share each layer: heads, MLP units and vocabulary."""
    context: int = 1
    """Devices that share the tokens of a row in training, for rows that do not fit one."""
