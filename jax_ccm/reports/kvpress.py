"""Evaluations in the layout of kvpress's results, so that its tables and its board can hold them beside its own.

A result of kvpress is a folder ``DATASET__DATA_DIR__MODEL__PRESS__RATIO`` with ``predictions.csv`` (the columns of the
data but the context, and ``predicted_answer``), ``metrics.json`` and ``config.yaml``. Its compression ratio is the
share of the keys and values of the context that is *not* kept; here it is the mean of what was measured.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.data.converters.rows import rows
from jax_ccm.errors import UserError
from jax_ccm.records import output, paths
from jax_ccm.reports.folders import Found

SOURCE = "kvpress:"
# How kvpress calls full context.
FULL = "no_press"


def export(found: Sequence[Found], dataset: str, folder: Path) -> list[Path]:
    """Writes a folder for each system of each evaluation that answered questions behind its whole contexts.

    Args:
      found: what `jax_ccm.reports.folders.find` gave.
      dataset: how kvpress calls the data, ``NAME`` or ``NAME:DATA_DIR``, such as ``ruler:4096``.
      folder: where they go.

    Returns:
      The folders written.

    Raises:
      UserError: if there is no such evaluation, its data are not there any more, or another one has the same name.
    """
    name, _, data_dir = dataset.partition(":")
    evaluations = [one for one in found if one.kind == "evaluation" and one.replies and _sources(one.content)]
    evaluations = [one for one in evaluations if one.content["config"]["eval"]["by"] == "task"]
    if not name or not evaluations:
        raise UserError(
            f"--kvpress {dataset!r}: there is nothing to export; it takes evaluations of kvpress:FILE with --eval.by "
            "task and --eval.reply_tokens, and the name of the data, such as ruler:4096"
        )
    written = []
    for one in evaluations:
        asked = _rows(one.content)
        for system in one.content["systems"]:
            # No context is no way to keep one.
            if system != "none" and any(line["system"] == system for line in one.replies):
                written.append(_write(one, system, (name, data_dir), asked, folder))
    return written


def _sources(content: Mapping[str, Any]) -> list[str]:
    """The files of kvpress's columns that an evaluation read; [] if it read others, too."""
    sources = content["data"]["sources"]
    files = [source.removeprefix(SOURCE).partition("?")[0] for source in sources]
    return files if all(source.startswith(SOURCE) for source in sources) else []


def _rows(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every row of the data, by its place."""
    found = {}
    for file in _sources(content):
        path = paths.local(file)
        if not path.exists():
            raise UserError(
                f"--kvpress needs the data that were evaluated, and {file} is not there; run it where it is"
            )
        # By the place in the files, which a record has for its name.
        found |= {row.place: row.content for row in rows(path)}
    return found


def _write(one: Found, system: str, dataset: tuple[str, str], asked: Mapping[str, Any], folder: Path) -> Path:
    content = one.content
    # Replies behind wrong contexts are our control; kvpress has none.
    said = [line for line in one.replies if line["system"] == system and line["context"] == "right"]
    if unknown := [line["record"] for line in said if line["record"] not in asked]:
        raise UserError(
            f"--kvpress: the data have no {unknown[0]}, to which {one.path.parent} has a reply: they have changed; "
            "evaluate again"
        )
    last = content["steps"][-1]["systems"]
    if "full" not in last:
        raise UserError(f"--kvpress: {one.path.parent} has no full context to compare with; add full to eval.methods")
    ratio = 1 - last[system]["kv_slots"] / last["full"]["kv_slots"]
    fraction, model = len(said) / len(asked), content["base"]["name"]
    press = FULL if system == "full" else content["config"]["method"]["name"] if system == "memory" else system
    # As kvpress names its folders, a part of the data by its fraction.
    parts = [*dataset, model.replace("/", "--"), press.replace(":", "-"), f"{ratio:.2f}"]
    parts += [f"fraction{fraction:.3f}"] * (fraction < 1)
    target = folder / "__".join(part for part in parts if part)
    # Results in it may be kvpress's own.
    if target.exists():
        raise UserError(f"--kvpress: {target} exists already; remove it, or give another --workdir")
    # Beside it, and then in its place: half a result is none.
    made = target.with_name(f".{target.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    answers = [(asked[line["record"]], line["reply"]) for line in said]
    columns = [column for column in answers[0][0] if column != "context"]
    with (made / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*columns, "predicted_answer", "compression_ratio"])
        table.writerows([*(row.get(column) for column in columns), reply, round(ratio, 4)] for row, reply in answers)
    if dataset[0] == "ruler":
        (made / "metrics.json").write_text(json.dumps(ruler(answers), indent=4), encoding="utf-8")
    config = {
        "dataset": dataset[0], "data_dir": dataset[1] or None, "model": model, "press_name": press,
        "compression_ratio": round(ratio, 4), "fraction": round(fraction, 3),
        "max_new_tokens": content["config"]["eval"]["reply_tokens"], "press_init_command": content["systems"][system],
    }  # fmt: skip
    (made / "config.yaml").write_text(output.yaml_text(config), encoding="utf-8")
    os.replace(made, target)
    return target


def ruler(answers: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, dict[str, float]]:
    """RULER's score of each task (Hsieh et al. 2024, arXiv 2404.06654), percent.

    Of a question it is the share of its answers that stand in the reply, upper or lower case; of one of the tasks
    ``qa_…``, whose answers are ways to say the same, whether any does.

    Args:
      answers: rows of the data, with ``task`` and ``answer``, and the reply to each.
    """
    scores: dict[str, list[float]] = {}
    for row, reply in answers:
        wanted = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        hits = [answer.lower() in reply.lower() for answer in wanted]
        whole = any(hits) if row["task"].startswith("qa") else sum(hits) / len(hits)
        scores.setdefault(row["task"], []).append(float(whole))
    return {task: {"string_match": round(100 * sum(own) / len(own), 2)} for task, own in sorted(scores.items())}
