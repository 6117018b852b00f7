"""``python -m jax_ccm.rollout ADAPTER --workdir DIR``: holds recorded conversations anew, in a closed loop."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, open_experiment
from jax_ccm.config.schema import Config, save_config
from jax_ccm.errors import UserError, require_least
from jax_ccm.records import output, paths
from jax_ccm.records.paths import Folder
from jax_ccm.rules.describe import describe_method, label

COMMAND = "jax_ccm.rollout"


@dataclasses.dataclass(frozen=True)
class Options:
    """Holds the conversations of online records anew, with the model's own answers in place of the recorded ones.

    Writes the records, with the contexts as they went, to records.jsonl in the working directory: given to evaluate as
    --data.test they show what is known where a memory was written from its own answers, mistakes included (a closed
    loop). How many answers were made, said nothing (the recorded ones stay) or were cut off is in summary.json.
    """

    workdir: Folder
    """Where all output goes."""
    adapter: Folder | None = None
    """Folder or name of the trained adapter, or ORG/NAME[@REVISION] on the hub; without one, that of the config."""
    full: bool = False
    """Let the base answer, with all that was said as text, instead of the memory."""
    max_tokens: int = 32
    """Most tokens of an answer."""
    rows: int = 8
    """How many conversations are held side by side."""
    split: Literal["test", "validation"] = "test"
    """Which sources of the config's data to hold."""


def main() -> None:
    options, config = cli.parse(Options, command=COMMAND)
    require_least(options, "--", max_tokens=1, rows=1)
    rollout(config, options, command=output.command_line(COMMAND))


def rollout(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Holds the conversations and writes their records.

    Args:
      config: the config.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``summary.json``.

    Raises:
      UserError: for data of another format, a missing adapter, or a turn that cannot be answered.
    """
    from jax_ccm.data.counts import NothingLeft, Report
    from jax_ccm.data.formats import BLANKS, used
    from jax_ccm.data.sources import open_sources

    if config.data.format != "online":
        raise UserError(
            f"conversations are held of records of format 'online', whose contexts are turns by turns, and data.format "
            f"is {config.data.format!r}; set --data.format online"
        )
    if not (named := getattr(config.data, options.split)):
        raise UserError(f"data.{options.split} is empty; name at least one source of records to hold")
    # As evaluate reads them; before the model is loaded.
    report = Report("records")
    records = [record for _, record in used(open_sources(named, "online"), "online", report, BLANKS)]
    report.kept = len(records)
    print(f"{options.split} data: {report}")
    if not records:
        raise NothingLeft(options.split, report)
    workdir = paths.usable_beside_training(options.workdir)
    with open_experiment(config, adapter=options.adapter) as experiment:
        summary = _hold(experiment, options, records, command)
    save_config(config, workdir / "config.yaml")
    return summary


def _hold(experiment: Experiment, options: Options, records: list[dict[str, Any]], command: str) -> dict[str, Any]:
    from jax_ccm.sessions.conversations import Conversations
    from jax_ccm.sessions.rollout import roll_out_records, with_full_context

    start = time.perf_counter()
    if options.full:
        experiment = with_full_context(experiment, records, options.max_tokens)
    talk = Conversations(experiment, rows=options.rows)
    made, went = roll_out_records(talk, records, max_tokens=options.max_tokens, log=print)
    summary = {
        "schema": output.SCHEMA,
        "command": command,
        "answered by": label(describe_method(experiment.method)),
        "records": len(made),
        "conversations": len(went.conversations),
        "replies": went.replies,
        "empty": went.empty,
        "cut": went.cut,
        "seconds": round(time.perf_counter() - start, 1),
    }
    output.write_lines(options.workdir / "records.jsonl", made)
    output.write_json(options.workdir / "summary.json", summary)
    print(
        f"{went.replies} replies in {len(went.conversations)} conversations, {went.empty} of them empty and {went.cut} "
        f"cut off; {len(made)} records in {options.workdir / 'records.jsonl'}"
    )
    return summary


if __name__ == "__main__":
    cli.run(main)
