"""``python -m jax_ccm.devices.check PART [--out DIR]``: what the device at hand does, one part at a time."""

from __future__ import annotations

import sys

import tyro

from jax_ccm.config import cli
from jax_ccm.devices import attention, conversation, numbers, record, report, throughput, training
from jax_ccm.devices.settings import SIZES, Options
from jax_ccm.errors import UserError
from jax_ccm.records import output

COMMAND = "jax_ccm.devices.check"
PARTS = {
    "numbers": numbers.rows, "attention": attention.rows, "training": training.rows, "turns": conversation.rows,
    "throughput": throughput.rows,
}  # fmt: skip


def main() -> int:
    options = tyro.cli(
        Options, prog=f"python -m {COMMAND}", description=Options.__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    return check(options, command=output.command_line(COMMAND))


def check(options: Options, *, command: str = "") -> int:
    """Runs a part, writes its file and prints its table; or writes the tables of all parts.

    Args:
      options: of the command.
      command: the command line, for the record.

    Returns:
      0, or 1 if a row failed, did not pass, or was not begun in time.

    Raises:
      UserError: for a folder that cannot be used, or a report of nothing.
    """
    import jax

    if options.limit <= 0:
        raise UserError(f"--limit is {options.limit:g}; it must be more than 0 seconds")
    folder = record.folder_of(options.out)
    if options.part == "report":
        found = report.found_in(folder)
        if not found:
            raise UserError(f"{folder} holds none of {', '.join(f'{part}.json' for part in PARTS)}; run a part first")
        (folder / "report.md").write_text(report.markdown(found), encoding="utf-8")
        print(f"wrote {folder / 'report.md'}")
        return 0
    size = options.size if options.size != "auto" else "tiny" if jax.default_backend() == "cpu" else "full"
    path = folder / f"{options.part}.json"
    rows = PARTS[options.part](SIZES[size])
    found = record.fill(path, options.part, size, rows, limit=options.limit, command=command)
    print(report.markdown({options.part: found}))
    print(f"{options.part}: {found['status']}; {path}", file=sys.stdout)
    return 0 if found["status"] == "finished" else 1


if __name__ == "__main__":
    cli.run(main)
