"""``python -m jax_ccm.lm_eval CONFIG --tasks TASK … --workdir DIR``: the lm-evaluation-harness on memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_ccm.config import cli
from jax_ccm.config.loading import open_experiment
from jax_ccm.config.schema import Config, save_config, to_mapping
from jax_ccm.errors import UserError, unknown
from jax_ccm.evals.prompts import SYSTEMS, Settings
from jax_ccm.evals.report import PACKAGES
from jax_ccm.records import output, paths
from jax_ccm.records.paths import Folder

COMMAND = "jax_ccm.lm_eval"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Runs tasks of the lm-evaluation-harness (the extra ``lm-eval``) with several systems side by side.

    Of each prompt, what stands before the last few-shot example, paragraph or turn becomes memory; the rest is read as
    it stands. Writes results.json, table.md, samples.jsonl and config.yaml into the working directory.
    """

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, as the harness knows them."""
    workdir: Folder
    """Where all output goes."""
    adapter: Folder | None = None
    """Folder or name of the trained adapter, or ORG/NAME[@REVISION] on the hub; without one, that of the config."""
    systems: tuple[str, ...] = ("none", "full", "memory")
    """What answers: "none" (no context), "full" context, both with the adapter off; "uncompressed", full context with
    the adapter on all of it; "memory"; and "wrong", memory of another request's context."""
    include_path: Folder | None = None
    """A folder of task definitions of your own (YAML), beside those of the harness."""
    num_fewshot: int | None = None
    """Examples in front of each question; without it, as each task says."""
    limit: int | None = None
    """Only so many documents of each task."""
    apply_chat_template: bool = False
    """Write prompts as messages, as the tokenizer's chat template does."""
    fewshot_as_multiturn: bool = False
    """With ``apply_chat_template``: each example is a turn and its answer, and becomes memory by itself."""


def main() -> None:
    options, config = cli.parse(Options, command=COMMAND)
    run(config, options, command=output.command_line(COMMAND))


def run(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the tasks and writes what comes out.

    Args:
      config: the config.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``results.json``.

    Raises:
      UserError: for options that cannot be, a task that is not there, or where the harness is not installed.
    """
    if not options.tasks:
        raise UserError("--tasks names no task; give one or more, as in --tasks hellaswag arc_easy")
    for name in options.systems:
        if name not in SYSTEMS:
            raise unknown("system", name, SYSTEMS)
    if not options.systems or len(set(options.systems)) < len(options.systems):
        raise UserError(f"--systems is {list(options.systems)}; name one or more of {', '.join(SYSTEMS)}, each once")
    if options.fewshot_as_multiturn and not options.apply_chat_template:
        raise UserError("--fewshot_as_multiturn writes messages; give --apply_chat_template, too")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}; give 1 or more documents")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num_fewshot is {options.num_fewshot}; give 0 or more examples")
    # Imported here: it refuses to be where the harness is not installed.
    from jax_ccm.harness import tasks

    workdir = paths.usable(options.workdir)
    known = tasks.open_tasks(options.tasks, options.include_path)
    # The options extend the settings; a system is given the settings alone.
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    with open_experiment(config, adapter=options.adapter) as experiment:
        results = tasks.measure(
            experiment, options.systems, settings, options.tasks,
            task_manager=known, num_fewshot=options.num_fewshot, limit=options.limit,
            apply_chat_template=options.apply_chat_template, fewshot_as_multiturn=options.fewshot_as_multiturn,
        )  # fmt: skip
    # First: `samples` takes single answers out of the results, which are written below without them.
    output.write_lines(workdir / "samples.jsonl", tasks.samples(results))
    found = {"schema": output.SCHEMA, "command": command, "config": to_mapping(config), "systems": results}
    found |= output.environment((*PACKAGES, "lm_eval"))
    output.write_json(workdir / "results.json", found)
    save_config(config, workdir / "config.yaml")
    table = tasks.table(results)
    (workdir / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nnumbers in {workdir / 'results.json'}, single answers in samples.jsonl")
    return found


if __name__ == "__main__":
    cli.run(main)
