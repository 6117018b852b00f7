"""``python -m jax_ccm.inspect FILE [FILE]``: what a memory file holds, or in what two differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from jax_ccm.config import cli
from jax_ccm.records.paths import Folder


@dataclasses.dataclass(frozen=True)
class Options:
    """Shows what a memory file (.ccm) holds and belongs to, after its digest and all that it says were checked.

    With a second file, says in what they differ. No model is loaded. A memory file is personal data: it holds what was
    said, in a form that a model reads.
    """

    file: Annotated[Folder, tyro.conf.Positional]
    """A memory file."""
    other: Annotated[Folder | None, tyro.conf.Positional] = None
    """Another one, to compare with."""


def main(argv: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, prog="python -m jax_ccm.inspect", use_underscores=True)
    # Imported here, so that --help is there at once.
    from jax_ccm.memory.files import read
    from jax_ccm.memory.portraits import difference, portrait

    held = read(options.file)
    print(*portrait(held), sep="\n")
    if options.other is None:
        return
    other = read(options.other)
    print(*portrait(other), sep="\n")
    found = list(difference(held, other))
    print("they differ:" if found else "they hold the same memory")
    print(*(f"  {line}" for line in found), sep="\n", end="\n" * bool(found))


if __name__ == "__main__":
    cli.run(main)
