"""What commands leave behind: how they were called, on which software, JSON, YAML, and tables in Markdown."""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.records import paths

# Of the JSON that commands write for others to read: raised when it changes so that an older reader would misread it.
# Files without a number are of the first, in which whole texts were a time step "text" (`evals.stored`).
SCHEMA = 2


def command_line(command: str) -> str:
    """How this process was called, as one can type it again.

    Args:
      command: the name after ``python -m``.
    """
    return shlex.join(["python", "-m", command, *sys.argv[1:]])


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python, and of installed packages."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """On what numbers were computed: `versions`, and the first device."""
    import jax

    device = jax.devices()[0]
    return {"versions": versions(packages), "device": f"{device.platform} ({device.device_kind})"}


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, as a whole or not at all; what JSON has no type for is written as text."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    # Half a character, such as of a path that is no UTF-8, becomes \\udcXX, which JSON reads back as what it was.
    paths.write(path, text.encode("utf-8", "backslashreplace"))


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes values as JSON, one a line, as a whole or not at all."""
    paths.write(path, "".join(json.dumps(value) + "\n" for value in values).encode())


def yaml_text(value: Any) -> str:
    """Nested dicts and lists of plain values as YAML 1.2, in their order."""
    from ruamel.yaml import YAML

    # Any: its attributes are typed as what they are before they are set.
    yaml: Any = YAML(typ="safe", pure=True)
    text = io.StringIO()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.dump(value, text)
    return text.getvalue()


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int | None = None) -> str:
    """A table in Markdown, without a line break at its end.

    Args:
      header: titles of the columns.
      rows: a cell for each column.
      left: how many of the first columns are flush left; the others are flush right. None for all.
    """
    rule = ["---" if left is None or number < left else "---:" for number in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
