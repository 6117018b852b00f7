"""``python -m jax_ccm.plan CONFIG.yaml --topology v5e:4x4``: does it fit, how many sessions, without the hardware.

``python -m jax_ccm.plan kernels FILE.json [TARGET ...]`` compiles the kernels alone; ``python -m jax_ccm.plan overview
DIR`` makes one table of many plans.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from jax_ccm.config import cli
from jax_ccm.config.loading import base_source, build_method, scratch_model
from jax_ccm.config.schema import Config, save_config, to_mapping
from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig
from jax_ccm.planning import ahead, chips, costs, measure, programs, report, sessions
from jax_ccm.records.paths import Folder
from jax_ccm.rules.rows import require_parallel
from jax_ccm.training.step import check_spread

COMMAND = "jax_ccm.plan"
SHAPES = Path(__file__).parent / "planning" / "shapes"


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
    """Chip and shape, such as v5e:4x4 or v5p:2x2x2; GPUs of one host, h100:8 or a100:8, or of several, h100:2x8."""
    workdir: Folder | None = None
    """Where the plan goes; nowhere without it."""
    shape: str = ""
    """A folder with config.json, if not that of model.source; Llama-2-7b-hf, Llama-3.1-8B and Qwen3-8B are known."""
    parts: tuple[Literal["training", "batch", "sessions"], ...] = ("training", "batch", "sessions")
    """What to plan: the training step, its largest micro-batch, and sessions."""
    chunks: tuple[int, ...] = (16,)
    """Lengths of the conversation, in chunks."""
    chunk_tokens: int = 50
    """Tokens of a chunk."""
    raw: tuple[int, ...] = (32,)
    """Raw tokens in flight: places of each session for text that is not compressed yet."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiles attention, a layer, decoding and a training step for TPUs or GPUs, on any machine, and records what each
    program needs: temporaries, seconds of compilation, and the kernels inside. Nothing is run. A table (.md) is written
    beside the file. Targets that are not named keep what stands there, if the same jax wrote it.
    """

    file: Annotated[Folder, tyro.conf.Positional]
    """The JSON file to write, such as results/kernels/tpu.json."""
    targets: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """v4, v5e, v5p, v6e, 7x, h100, a100; none for all TPUs."""


@dataclasses.dataclass(frozen=True)
class Overview:
    """Makes one table, overview.md, of all plans (*.json) of a folder: each the plan.json of a run, renamed."""

    folder: Annotated[Folder, tyro.conf.Positional]
    """The folder, such as results/plan."""


def main() -> None:
    # Nothing runs here; an accelerator of this machine must not be taken for it.
    jax.config.update("jax_platforms", "cpu")
    # A kept program can be read only where it could run.
    jax.config.update("jax_enable_compilation_cache", False)
    first, rest = sys.argv[1:2], sys.argv[2:]
    if first == ["kernels"]:
        asked = tyro.cli(Kernels, args=rest, prog=f"python -m {COMMAND} kernels")
        ahead.record(asked.file, asked.targets)
    elif first == ["overview"]:
        asked = tyro.cli(Overview, args=rest, prog=f"python -m {COMMAND} overview")
        print(f"wrote {report.write_overview(asked.folder)}")
    else:
        options, config, _ = cli.parse(Options, command=COMMAND)
        plan(config, options, command=shlex.join(["python", "-m", COMMAND, *sys.argv[1:]]))


def plan(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Makes the plan, prints it and optionally writes it.

    Args:
      config: the config.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``plan.json``.

    Raises:
      UserError: for an unknown topology or model, a mesh that does not fit, or a missing compiler.
    """
    start = time.perf_counter()
    if min((*options.chunks, options.chunk_tokens, *options.raw), default=0) < 1:
        raise UserError("--chunks, --chunk_tokens and --raw must be at least 1")
    if options.workdir is not None:
        try:
            options.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--workdir {options.workdir} cannot be used: {e}") from e
    chip = chips.find(options.topology)
    devices = chips.devices(options.topology)
    name, shape = model_shape(config, options.shape)
    packages = ("jax_ccm", "jax", "jaxlib", chip.compiler)
    made: dict[str, Any] = {
        "command": command,
        "note": "compiled, not run",
        "model": name,
        "method": config.method.name,
        "topology": options.topology,
        "devices": len(devices),
        "chip": dataclasses.asdict(chip),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "config": to_mapping(config),
    }
    print(f"{name} for {options.topology}: {len(devices)} chips of {chip.hbm_bytes / 2**30:.0f} GiB; nothing is run")
    if {"training", "batch"} & set(options.parts):
        made["training"] = training(config, shape, devices, chip, find_largest="batch" in options.parts)
    if "sessions" in options.parts:
        mesh = sessions.serving_mesh(shape, devices)
        print(f"sessions: {sharding.describe(mesh)}")
        made["sessions"] = [
            {
                "setting": {"chunks": chunks, "chunk_tokens": options.chunk_tokens, "raw": raw},
                "mesh": dict(mesh.shape),
                "systems": {
                    system: sessions.most_sessions(
                        config, shape, method, sessions.Setting(chunks, options.chunk_tokens, raw), mesh, chip, _say
                    )
                    for system, method in sessions.systems(config).items()
                },
            }
            for chunks in options.chunks
            for raw in options.raw
        ]
    made["host"] = {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": measure.host_bytes()}
    print(report.markdown(made))
    print(f"planned in {made['host']['seconds']:.0f} s with {made['host']['peak_bytes'] / 2**30:.1f} GiB of memory")
    if options.workdir is not None:
        save_config(config, options.workdir / "config.yaml")
        (options.workdir / "plan.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        (options.workdir / "table.md").write_text(report.markdown(made), encoding="utf-8")
        report.plot(made, options.workdir / "plot.png")
    return made


def model_shape(config: Config, given: str = "") -> tuple[str, ModelConfig]:
    """Name and sizes of the model: of ``given``, of a shipped shape of the same name, or of the config's source.

    Raises:
      UserError: if there is no such shape.
    """
    from jax_ccm.weights import read_config

    if not given and not config.model.source:
        try:
            return "from scratch", scratch_model(config.model.scratch, 0)
        except ValueError as e:
            raise UserError(f"model.scratch: {e}") from e
    source = given or base_source(config)
    known = SHAPES / source.rsplit("/", 1)[-1]
    return source, read_config(known if known.is_dir() else source, config.model.rope_length)


def training(
    config: Config, shape: ModelConfig, devices: Any, chip: chips.Chip, *, find_largest: bool
) -> dict[str, Any]:
    """The training step in the config's micro-batches, and in the largest that fit and make up the same global batch.

    Raises:
      UserError: for what `jax_ccm.train` refuses on such a mesh, too.
    """
    method = build_method(config)
    require_parallel(method)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices)
    sharding.check(mesh, shape)
    check_spread(config, mesh)
    shares, smallest = sharding.row_shares(mesh), config.data.batch_size
    batch = smallest * config.optimizer.accumulation
    print(f"training: {sharding.describe(mesh)}, global batch {batch}")

    def entry(rows: int, found: measure.Need) -> dict[str, Any]:
        count = batch // rows
        one = programs.abstract_batch(config, shape, method, rows)
        cost = costs.training_cost(config, shape, one, count, mesh.shape["tensor"])
        seconds = cost.times(chip, mesh.size, found) if found.fits else {}
        made = {"rows": rows, "accumulation": count, "tokens": config.data.tokens, "mesh": dict(mesh.shape)}
        return made | found.to_json() | {"flops": cost.flops, "seconds": seconds}

    def needs(rows: int) -> measure.Need:
        program = programs.training_step(config, shape, method, mesh, rows, max(batch // rows, 1))
        found = measure.need(program, chip)
        _say(f"training step of {rows} rows: {found.bytes / 2**30:.2f} GiB, {'fits' if found.fits else 'does not fit'}")
        return found

    first = needs(smallest)
    made = {"step": entry(smallest, first)}
    if find_largest and first.fits:
        known = {smallest: first}
        # Micro-batches that divide the global batch.
        sizes = [rows for rows in range(shares, batch + 1, shares) if batch % rows == 0 and rows > smallest]
        while sizes:
            middle = sizes[len(sizes) // 2]
            known[middle] = needs(middle)
            sizes = [n for n in sizes if (n > middle if known[middle].fits else n < middle)]
        most = max(rows for rows, found in known.items() if found.fits)
        made["largest_micro_batch"] = entry(most, known[most])
    return made


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
