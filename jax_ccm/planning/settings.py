"""What is planned, in each of the three forms of the command."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from jax_ccm.records.paths import Folder


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles the training step and the steps of serving for TPUs or GPUs, on any machine; reports what they need.

    No weights are read: shapes are enough. Reported are memory of each chip by kind, collectives and their bytes, work
    by formula and the time that peak rates allow, the largest micro-batch, and the largest number of live sessions for
    full context and the config's method side by side (of CCM's own, both concat and merge). Nothing is run. Writes
    plan.json, table.md, plot.png and config.yaml into the working directory. Any key of the config can be overridden,
    as in `--mesh.fsdp 16`.

    Two other forms, each with a --help of its own: `plan kernels FILE.json [TARGET ...]` compiles the kernels alone for
    TPUs and GPUs; `plan overview DIR` makes one table of the plans in a folder.
    """

    topology: str
    """Chip and shape, such as v5e:4x4 or v5p:2x2x2; GPUs of one host, h100:8, a100:8, rtx4090:1 or l4:1, or of several,
    h100:2x8."""
    workdir: Folder | None = None
    """Where the plan goes; nowhere without it."""
    shape: str = ""
    """A folder with config.json, if not that of model.source; Llama-2-7b-hf, Llama-3.1-8B, Qwen3-8B and
    Qwen2.5-0.5B, 1.5B, 3B and 7B-Instruct are known."""
    parts: tuple[Literal["training", "batch", "sessions"], ...] = ("training", "batch", "sessions")
    """What to plan: the training step, its largest micro-batch, and sessions."""
    chunks: tuple[int, ...] = (16,)
    """Lengths of the conversation, in chunks."""
    chunk_tokens: int = 50
    """Tokens of a chunk."""
    raw: tuple[int, ...] = (32,)
    """Raw tokens in flight: slots of each session for text that is not compressed yet."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiles attention, a layer, decoding and a training step for TPUs or GPUs, on any machine, and records what each
    program needs: temporaries, seconds of compilation, and the kernels inside. Nothing is run. A table (.md) is written
    beside the file. Targets that are not named keep what stands there, if the same jax wrote it.
    """

    file: Annotated[Folder, tyro.conf.Positional]
    """The JSON file to write, such as results/kernels/tpu.json."""
    targets: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """v4, v5e, v5p, v6e, 7x, h100, a100, rtx4090, l4; none for all TPUs."""


@dataclasses.dataclass(frozen=True)
class Overview:
    """Makes one table, overview.md, of all plans (*.json) of a folder: each the plan.json of a run, renamed."""

    folder: Annotated[Folder, tyro.conf.Positional]
    """The folder, such as results/plan."""
