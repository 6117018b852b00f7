"""``python -m jax_ccm.plan CONFIG.yaml --topology v5e:4x4``: does it fit, how many sessions, without the hardware.

``python -m jax_ccm.plan kernels FILE.json [TARGET ...]`` compiles the kernels alone; ``python -m jax_ccm.plan overview
DIR`` makes one table of many plans.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import jax
import tyro

from jax_ccm.config import cli
from jax_ccm.config.loading import with_precision
from jax_ccm.config.schema import Config, save_config, to_mapping
from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.planning import ahead, chips, measure, report, sessions
from jax_ccm.planning.models import model_shape
from jax_ccm.planning.report import say
from jax_ccm.planning.settings import Kernels, Options, Overview
from jax_ccm.planning.training import micro_batches
from jax_ccm.records import output, paths

COMMAND = "jax_ccm.plan"


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
        options, config = cli.parse(Options, command=COMMAND)
        plan(config, options, command=output.command_line(COMMAND))


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
    # An option with no values at all is refused, too.
    if min((*options.chunks, options.chunk_tokens, *options.raw), default=0) < 1:
        raise UserError("--chunks, --chunk_tokens and --raw must be at least 1")
    if options.workdir is not None:
        paths.usable(options.workdir)
    chip = chips.find(options.topology)
    # "auto" means what it would mean there, not on this CPU.
    config = with_precision(config, "tpu" if chip.is_tpu else "gpu")
    devices = chips.devices(options.topology)
    name, shape = model_shape(config, options.shape)
    # Bytes are those of a compiler: another version of it may need others.
    packages = ("jax_ccm", "jax", "jaxlib", chip.compiler)
    made: dict[str, Any] = {
        "command": command,
        "note": "compiled, not run",
        "model": name,
        "method": config.method.name,
        "topology": options.topology,
        "devices": len(devices),
        "chip": dataclasses.asdict(chip),
        "versions": output.versions(packages),
        "config": to_mapping(config),
    }
    print(f"{name} for {options.topology}: {len(devices)} chips of {chip.hbm_bytes / 2**30:.0f} GiB; nothing is run")
    if {"training", "batch"} & set(options.parts):
        made["training"] = micro_batches(config, shape, devices, chip, find_largest="batch" in options.parts)
    if "sessions" in options.parts:
        mesh = sessions.serving_mesh(shape, devices)
        print(f"sessions: {sharding.describe(mesh)}")
        made["sessions"] = [
            {
                "setting": {"chunks": chunks, "chunk_tokens": options.chunk_tokens, "raw": raw},
                "mesh": dict(mesh.shape),
                "systems": {
                    system: sessions.most_sessions(
                        config, shape, method, sessions.Setting(chunks, options.chunk_tokens, raw), mesh, chip, say
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
        output.write_json(options.workdir / "plan.json", made)
        (options.workdir / "table.md").write_text(report.markdown(made), encoding="utf-8")
        report.plot(made, options.workdir / "plot.png")
    return made


if __name__ == "__main__":
    cli.run(main)
