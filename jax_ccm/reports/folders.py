"""What is in the folders that commands wrote: read, and told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.evals import stored
from jax_ccm.records import paths
from jax_ccm.records.parsing import parse_json, read_json, read_text


@dataclasses.dataclass(frozen=True)
class Found:
    """What one command left behind.

    Attributes:
      kind: "evaluation", "comparison", "speed" or "training".
      name: what to call it.
      path: of its file.
      content: of the file; of a training run ``{"lines": [...], "summary": {...}}``.
      replies, continuations: lines of ``replies.jsonl`` and ``continuations.jsonl`` beside an evaluation.
    """

    kind: str
    name: str
    path: Path
    content: Mapping[str, Any]
    replies: Sequence[Mapping[str, Any]] = ()
    continuations: Sequence[Mapping[str, Any]] = ()


# File -> its kind, the command that writes it, and keys that it has.
FILES = {
    "results.json": ("evaluation", "evaluate", ("title", "config", "base", "data", "systems", "steps", "memory")),
    "comparison.json": ("comparison", "compare", ("base", "data", "steps", "systems")),
    "bench.json": ("speed", "bench", ("title", "options", "turns", "steps")),
}
METRICS, LOSSES = "metrics.jsonl", ("loss", "validation_loss")


def find(given: Sequence[str]) -> list[Found]:
    """What is in some folders, in their order.

    Args:
      given: folders, or ``NAME=DIR``.

    Raises:
      UserError: for a folder that is not there or holds nothing that a command wrote, a damaged file, or one that a
        newer version wrote.
    """
    found: list[Found] = []
    for text in given:
        name, equals, folder = text.partition("=")
        # A folder may have "=" in its own name.
        if not equals or paths.of(text).is_dir():
            name, folder = "", text
        path = paths.of(folder)
        if not path.is_dir():
            raise UserError(f"{folder} is no folder; give working directories of {_commands()}, or NAME=DIR")
        here = [_read(path / file, name or _name(path)) for file in FILES if (path / file).exists()]
        # Evaluations write metrics, too: without one of their own files it is a training run.
        if not here and (path / METRICS).exists():
            here = [_training(path, name or _name(path))]
        if not here:
            raise UserError(
                f"{folder} holds none of {', '.join((*FILES, METRICS))}; give the --workdir of {_commands()}"
            )
        found += here
    if not found:
        raise UserError(f"there is nothing to report; give one or more working directories of {_commands()}")
    return _apart(found)


def _commands() -> str:
    return "jax_ccm.evaluate, train, compare or bench"


def _name(path: Path) -> str:
    """The last folder of a path, and the one that it is in."""
    return "/".join(path.parts[-2:]).lstrip("/") if len(path.parts) > 1 else str(path)


def _apart(found: Sequence[Found]) -> list[Found]:
    """The same, with a number behind names of one kind that are given twice."""
    seen: dict[tuple[str, str], int] = {}
    apart = []
    for one in found:
        number = seen[one.kind, one.name] = seen.get((one.kind, one.name), 0) + 1
        apart.append(one if number == 1 else dataclasses.replace(one, name=f"{one.name} ({number})"))
    return apart


def _read(file: Path, name: str) -> Found:
    kind, command, keys = FILES[file.name]
    content = stored.read(file)
    # An empty list of steps is as good as none: there is nothing to show.
    missing = [key for key in keys if not content.get(key)]
    if missing:
        raise UserError(
            f"{file} lacks {', '.join(missing)}, which jax_ccm.{command} writes; run it again, or leave its folder out"
        )
    said = {name: file.parent / f"{name}.jsonl" for name in ("replies", "continuations")}
    read = {name: _lines(path) for name, path in said.items() if kind == "evaluation" and path.exists()}
    return Found(kind, name, file, content, **read)


def _training(folder: Path, name: str) -> Found:
    file = folder / METRICS
    lines = [line for line in _lines(file) if set(LOSSES) & set(line)]
    numbers = (int, float, type(None))

    def sound(line):
        return isinstance(line.get("step"), int) and all(isinstance(line.get(key), numbers) for key in LOSSES)

    if not lines or not all(map(sound, lines)):
        raise UserError(f"{file} holds no losses by step; give a working directory of {_commands()}")
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    return Found("training", name, file, {"lines": lines, "summary": summary})


def _lines(file: Path) -> list[Mapping[str, Any]]:
    """The JSON objects of a file, one a line. The last one may be cut off, as by a process that is killed."""
    found, lines = [], read_text(file).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line, f"{file} line {number}")
        except UserError:
            # A line that is broken earlier is damage, not the end of a process.
            if number == len(lines):
                break
            raise
        if not isinstance(value, Mapping):
            raise UserError(f"{file} line {number} is no JSON object; run the command that wrote it again")
        found.append(value)
    return found
