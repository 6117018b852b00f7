"""The parts of the check of a device, and how large each is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import tyro

from jax_ccm.nn import ModelConfig
from jax_ccm.planning.ahead import SMOLLM2_135M
from jax_ccm.planning.kernel_costs import Heads
from jax_ccm.records.paths import Folder

Part = Literal["numbers", "attention", "training", "turns", "throughput", "report"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Runs one part of the check of the device at hand, and writes its JSON file, with each row as it is found.

    numbers: attention of every method, forward and gradients, in float32 and bfloat16, against its definition in
    float64: the device's own kernel, compiled (on a CPU both kernels, interpreted), and plain products. attention:
    times of our kernel, of plain products, and of jax.nn.dot_product_attention by cuDNN, which takes no rule and is
    causal. training: tokens/s and the share of the peak. turns: what bench measures of a conversation. throughput: the
    papers' samples/s at the largest batch that fits, found by doubling. report: the tables of all parts, report.md.
    Weights are arbitrary, nothing is read from the network, and all numbers are those of one device.

    Out of memory, and what the device has not, are results. Exits 1 where a row failed, is beyond its tolerance, or was
    not begun in time. Each part wants a process of its own: launch/device_check.sh runs all of them.
    """

    part: Annotated[Part, tyro.conf.Positional]
    """Which part, or the tables of those that are there."""
    out: Folder | None = None
    """Where PART.json goes; without it results/PLATFORM/DEVICE of the current folder."""
    size: Literal["auto", "tiny", "full"] = "auto"
    """How large; auto is full on an accelerator and tiny on a CPU."""
    limit: float = 600.0
    """Seconds after which no further row is begun."""


LLAMA_1B = ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, rope_theta=5e5, tie_embeddings=True)
LLAMA_2_7B = ModelConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128, max_position=4096)
TINY = ModelConfig("llama", 256, 64, 128, 2, 2, 1, 32)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the parts are.

    Attributes:
      chunks: tokens of the chunks of each row whose numbers are compared; the last of a row is its tail.
      methods: that are compared, of `numbers.METHODS`; () for all.
      heads: of the attention that is timed.
      lengths: T of the attention that is timed, in the order in which they matter.
      rounds: how often everything is measured.
      least: seconds that a measurement shall last at least; short calls are repeated.
      trained: decoders that are trained, by name.
      rows, tokens: of a training step; rows are halved until they fit.
      base: decoder of the conversation, with its name.
      turns: closed turns before the one that is measured.
      spoken: tokens of a question, and of an answer.
      read: tokens that are read, or compressed, at once.
      demonstrated: decoder of the papers' throughput, with its name.
      demonstrations: how many chunks.
      demonstration: tokens of each, and of a question.
      slots: n, compression tokens of each.
      most: rows of the largest batch that is tried; None for no bound but memory.
    """

    chunks: tuple[tuple[int, ...], ...] = ((61, 47, 50, 33, 90), (20, 55), (7, 120, 16, 14, 29, 20))
    methods: tuple[str, ...] = ()
    heads: Heads = Heads()
    lengths: tuple[int, ...] = (512, 4096, 32768, 2048, 16384, 1024, 8192)
    rounds: int = 5
    least: float = 0.02
    trained: Mapping[str, ModelConfig] = dataclasses.field(
        default_factory=lambda: {"SmolLM2-135M": SMOLLM2_135M, "Llama-3.2-1B": LLAMA_1B}
    )
    rows: int = 16
    tokens: int = 1024
    base: tuple[str, ModelConfig] = ("SmolLM2-135M", SMOLLM2_135M)
    turns: tuple[int, ...] = (1000, 10)
    spoken: int = 16
    read: int = 512
    demonstrated: tuple[str, ModelConfig] = ("Llama-2-7B", LLAMA_2_7B)
    demonstrations: int = 16
    demonstration: int = 50
    slots: int = 8
    most: int | None = None


SIZES = {
    "full": Size(),
    # A few seconds a part on two cores.
    "tiny": Size(
        chunks=((9, 7, 5), (3, 8)),
        methods=("ccm_concat",),
        heads=Heads(2, 1, 64),
        lengths=(64,),
        rounds=2,
        least=0.0,
        trained={"tiny": TINY},
        rows=2,
        tokens=64,
        base=("tiny", TINY),
        turns=(2,),
        spoken=2,
        read=8,
        demonstrated=("tiny", TINY),
        demonstrations=3,
        demonstration=5,
        slots=2,
        most=4,
    ),
}
