"""Typed access to a parsed ``config.json``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax_ccm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fields:
    """Typed access to a ``config.json``."""

    raw: dict[str, Any]
    defaults: dict[str, Any]
    where: str

    def __call__(self, name: str, kind: type, *, default: Any = None, optional: bool = False) -> Any:
        value = self.raw[name] if name in self.raw else self.defaults.get(name, default)
        if value is None:
            if optional:
                return None
            value = default  # null counts as absent, as in transformers
        number = isinstance(value, int | float) and not isinstance(value, bool)
        positive = number and 0 < value < float("inf")
        whole = positive and isinstance(value, int)
        if not {int: whole, float: positive, bool: isinstance(value, bool)}[kind]:
            wanted = {int: "a positive integer", float: "a positive number", bool: "true or false"}[kind]
            given = f"is {value!r}" if name in self.raw else "is missing"
            raise UserError(f"{self.where}: {name} {given}; it must be {wanted}")
        return kind(value)


def names(raw: dict[str, Any], field: str, where: str) -> list[str]:
    value = raw.get(field) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: {field} is {value!r}; it must be a list of names")
    return value


def numbers(given: dict[str, Any], name: str, where: str) -> tuple[float, ...]:
    value = given.get(name)

    def number(x):
        return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf

    if not isinstance(value, list) or not all(map(number, value)):
        raise UserError(f"{where}: {name} is {value!r}; it must be a list of positive numbers")
    return tuple(map(float, value))
