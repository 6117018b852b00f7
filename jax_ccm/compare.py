"""``python -m jax_ccm.compare NAME=DIR … --workdir DIR``: evaluations side by side, quality against bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jax_ccm.config import cli
from jax_ccm.errors import UserError
from jax_ccm.records import output, paths
from jax_ccm.records.paths import Folder

COMMAND = "jax_ccm.compare"


@dataclasses.dataclass(frozen=True)
class Options:
    """Puts evaluations of the same questions side by side: a table and a plot of quality against bytes.

    Writes comparison.json, table.md and plot.png into the working directory.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME=DIR ...")]
    """A working directory of jax_ccm.evaluate, and what to call it; a name given again is another size of the same."""
    workdir: Folder
    """Where all output goes."""


def main() -> None:
    options = tyro.cli(Options, prog=f"python -m {COMMAND}")
    compare(options.runs, options.workdir, command=output.command_line(COMMAND))


def compare(runs: Sequence[str], workdir: Path, *, command: str = "") -> None:
    """Puts evaluations of the same questions side by side: a table and a plot of quality against bytes.

    Writes comparison.json, table.md and plot.png into the working directory.

    Args:
      runs: ``NAME=DIR`` for each evaluation.
      workdir: where all output goes.
      command: the command line, for the record.

    Raises:
      UserError: for a run without a name, or evaluations that do not go together.
    """
    from jax_ccm.evals import comparison

    named: dict[str, list[dict]] = {}
    for run in runs:
        name, equals, folder = run.partition("=")
        if not (name and equals and folder):
            raise UserError(f"{run!r} is not NAME=DIR; name each evaluation, as in concat=runs/concat_quality")
        named.setdefault(name, []).append(comparison.load(folder))
    if not named:
        raise UserError("there is nothing to compare; give NAME=DIR for each evaluation")
    # Before the folder is made: what cannot be compared leaves nothing behind.
    result = comparison.side_by_side(named, command)
    workdir = paths.usable(workdir)
    output.write_json(workdir / "comparison.json", result)
    table = comparison.markdown(result)
    (workdir / "table.md").write_text(table, encoding="utf-8")
    comparison.plot(result, workdir / "plot.png")
    print(table)
    print(f"numbers in {workdir / 'comparison.json'}, table in table.md, picture in plot.png")


if __name__ == "__main__":
    cli.run(main)
