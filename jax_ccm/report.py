"""``python -m jax_ccm.report DIR… --workdir DIR``: what commands left behind, on one page."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from jax_ccm.config import cli
from jax_ccm.records import output, paths
from jax_ccm.records.paths import Folder

COMMAND = "jax_ccm.report"


@dataclasses.dataclass(frozen=True)
class Options:
    """Puts what evaluate, train, compare and bench left behind on one page: quality by time step and against bytes,
    recall by age and length, replies, losses, speed; numbers with their intervals.

    Writes report.html, which needs nothing else to be looked at or printed, and its pictures as PNG into the working
    directory.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]DIR ...")]
    """Working directories of these commands, in any order, and what to call them."""
    workdir: Folder
    """Where the page and its pictures go."""
    title: str = "jax_ccm report"
    """Title of the page."""
    kvpress: str = ""
    """Also write the evaluations of kvpress:FILE (by task, with replies) in kvpress's layout, under kvpress/ in the
    working directory: how it calls the data, such as ruler:4096."""


def main() -> None:
    options = tyro.cli(Options, prog=f"python -m {COMMAND}")
    from jax_ccm.reports import folders, kvpress, page

    found = folders.find(options.runs)
    workdir = paths.usable(options.workdir)
    versions = ", ".join(f"{name} {version}" for name, version in output.versions(("jax_ccm", "matplotlib")).items())
    made = page.make(found, workdir, title=options.title, command=output.command_line(COMMAND), versions=versions)
    (workdir / "report.html").write_text(made, encoding="utf-8")
    counts = ", ".join(f"{count} of {kind}" for kind, count in page.described(found).items())
    if options.kvpress:
        for folder in kvpress.export(found, options.kvpress, workdir / "kvpress"):
            print(f"kvpress: {folder}")
    print(f"{counts}: page in {workdir / 'report.html'}, pictures beside it")


if __name__ == "__main__":
    cli.run(main)
