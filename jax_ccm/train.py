"""``python -m jax_ccm.train CONFIG.yaml --workdir DIR``: trains, and goes on where it stopped."""

from __future__ import annotations

import dataclasses

from jax_ccm.config import cli
from jax_ccm.errors import UserError
from jax_ccm.records.paths import Folder


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a compressed context memory (or a plain LoRA, or a small model from scratch).

    Writes config.yaml, metrics.jsonl, summary.json, tensorboard/, checkpoints/ and the adapters (adapter/ and
    adapter_best/, each with its config and model card) into the working directory. Started again with the same
    directory it resumes from the newest checkpoint; SIGTERM or Ctrl-C saves one and exits. Any key of the config can be
    overridden, as in `--optimizer.learning_rate 3e-4`.
    """

    workdir: Folder
    """Where all output goes, and where a stopped run is found again."""
    accept_changes: bool = False
    """Resume even if base, adapters, tokenizer or data are not what the run began with; recorded in its checkpoints."""


def main() -> None:
    options, config = cli.parse(Options, command="jax_ccm.train")
    workdir = options.workdir
    # Only training writes checkpoints; evaluations and checks write results.json.
    if (workdir / "results.json").exists() and not (workdir / "checkpoints").exists():
        raise UserError(
            f"--workdir {workdir} holds the results of another command, whose files would be overwritten; give "
            f"another, such as {workdir / 'training'}"
        )
    from jax_ccm.distributed import processes
    from jax_ccm.training.run import Run

    # Before anything asks JAX for devices: from then on it would know those of this process alone.
    processes.initialize(config.train.heartbeat)
    Run(config, workdir, accept_changes=options.accept_changes).train()


if __name__ == "__main__":
    cli.run(main, several=True)
