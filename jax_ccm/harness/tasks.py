"""Tasks of the harness with several systems, side by side."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from jax_ccm.config.loading import Experiment
from jax_ccm.errors import UserError
from jax_ccm.evals.prompts import Settings
from jax_ccm.harness.model import HarnessModel
from jax_ccm.records import output

# What a table of results calls the systems.
NAMES = {"wrong": "wrong memory"}


def open_tasks(names: Sequence[str], folder: Path | None = None) -> TaskManager:
    """The tasks that the harness knows.

    Args:
      names: of those that will be asked for.
      folder: definitions besides its own.

    Raises:
      UserError: for a name that is not there, or a folder that is not.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"include_path is {folder}, which is no folder; name one with task definitions (YAML)")
    known = TaskManager(include_path=None if folder is None else str(folder))
    require(known, names)
    return known


def require(known: TaskManager, names: Sequence[str]) -> None:
    """Raises `UserError` for a task, group or tag that the harness does not know."""
    for name in names:
        if name not in known.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, known.all_tasks, n=3))
            raise UserError(
                f"there is no task {name!r}{f' (there is {near})' if near else ''}; `lm_eval ls tasks` lists all, and "
                "include_path names a folder with definitions of your own"
            )


def measure(
    experiment: Experiment, systems: Sequence[str], settings: Settings, tasks: Sequence[str], **options: Any
) -> dict[str, dict[str, Any]]:
    """What the harness says of each system, on the same documents behind the same few-shot examples.

    Args:
      experiment: model, adapter, method and tokenizer.
      systems: of `jax_ccm.evals.prompts.SYSTEMS`.
      settings: how requests are answered.
      tasks: names.
      **options: of `lm_eval.simple_evaluate`.

    Returns:
      Its results, by system.
    """
    found = {}
    for name in systems:
        model = HarnessModel(experiment, name, settings)
        print(f"{name}: {model.system.description}", flush=True)
        found[name] = simple_evaluate(model=model, tasks=list(tasks), batch_size=settings.batch_size, **options)
    return found


def samples(results: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Takes the answers to single documents out of results, one JSON value for each."""
    for system, of_system in results.items():
        # Taken out: they are written line by line, and would be the largest part of results.json.
        for task, lines in (of_system.pop("samples", None) or {}).items():
            yield from ({"system": system, "task": task, **line} for line in lines)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table, a row for each metric of each task, and lines on what was held of the contexts."""
    rows = []
    first = next(iter(results.values()))["results"]
    for task, metrics in first.items():
        for key in metrics:
            # The harness writes "METRIC,FILTER", and "METRIC_stderr,FILTER" beside it.
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            named = metric if filtered == "none" else f"{metric} ({filtered})"
            cells = [_cell(of_system["results"][task], metric, filtered) for of_system in results.values()]
            rows.append([task, named, *cells])
    header = ["task", "metric", *(NAMES.get(name, name) for name in results)]
    return output.table(header, rows, left=2) + "\n" + "".join(_held(results))


def _cell(metrics: Mapping[str, Any], metric: str, filtered: str) -> str:
    value, error = metrics[f"{metric},{filtered}"], metrics.get(f"{metric}_stderr,{filtered}")
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")


def _held(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """For each system, what it keeps of the contexts that it has read."""
    for name, of_system in results.items():
        about = of_system["config"]
        tokens, slots, count = about["context_tokens"], about["context_slots"], about["requests"]
        if not count:
            continue
        line = (
            f"{NAMES.get(name, name)}: of {tokens / count:,.1f} tokens of context {slots / count:,.1f} slots are held"
        )
        bytes_held = slots / count * about["bytes_per_slot"]
        cut = f"; {about['truncated']:,} prompts lost their oldest tokens" if about["truncated"] else ""
        yield f"\n{line}, {bytes_held / 1024:,.1f} KiB{cut}\n"
