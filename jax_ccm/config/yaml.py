"""Nested mappings, as YAML files hold them, read strictly into dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jax_ccm.errors import UserError, unknown
from jax_ccm.records import paths


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML 1.2 mapping; a key that stands twice is an error.

    Raises:
      UserError: for a file that is missing, not YAML, or not a mapping.
    """
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.constructor import DuplicateKeyError

    try:
        text = paths.of(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as a config: {e}") from e
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as e:
        key = text[e.problem_mark.index :].partition(":")[0].strip()
        raise UserError(f"{path}, line {e.problem_mark.line + 1}: the key {key!r} stands twice; keep one") from None
    except YAMLError as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deep to be read; a config has three levels") from None
    except (ValueError, TypeError, LookupError) as e:  # numbers of thousands of digits, dates and tags that are none
        raise UserError(f"{path} holds something that no config can: {e}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}; a config is a mapping of sections such as 'model:'")
    return tree


def convert(kind: Any, value: Any, path: str = "") -> Any:
    """``value`` as ``kind``, strictly.

    Args:
      kind: a type hint built of dataclasses, tuples, unions with None, literals and plain types.
      value: nested mappings, lists and plain values.
      path: of the value, for messages.

    Raises:
      UserError: naming the path of the offending key.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{path or 'the config'} is {_show(value)}; it must be a mapping of keys")
        hints = typing.get_type_hints(kind)

        def under(name):
            return f"{path}.{name}" if path else str(name)

        names = [field.name for field in dataclasses.fields(kind)]
        for name in value:
            if name not in names:
                raise unknown("config key", under(name), map(under, names))
        return kind(**{name: convert(hints[name], given, under(name)) for name, given in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # Of unions there are only those of one type with None.
        (kind,) = (arg for arg in args if arg is not type(None))
        return convert(kind, value, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path} is {_show(value)}; it must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path} is {_show(value)}; it must be a list")
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise UserError(f"{path} has {len(value)} entries; it must have {len(args)}")
        return tuple(convert(arg, v, f"{path}[{i}]") for i, (arg, v) in enumerate(zip(args, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # In Python True is an int.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{path} is {_show(value)}; it must be {_article(kind)}")
    return value


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


def _show(value: Any) -> str:
    return f"{value!r} ({'nothing' if value is None else type(value).__name__})"
