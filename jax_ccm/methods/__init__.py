"""The methods, as data: an explicit table from name to builder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jax_ccm.errors import UserError, unknown
from jax_ccm.methods import baselines, ccm, compressive, eviction, loma, sentinel
from jax_ccm.rules.types import Method

METHODS: dict[str, Callable[..., Method]] = {
    "full": baselines.full,
    "none": baselines.none,
    "window": baselines.window,
    "streaming_llm": baselines.streaming_llm,
    "gist": ccm.gist,
    "ccm_concat": ccm.concat,
    "ccm_merge": ccm.merge,
    "ccm_ema": ccm.ema,
    "compressive": compressive.compressive,
    "loma": loma.loma,
    "sentinel": sentinel.sentinel,
    "local": baselines.local,
    "scattered": baselines.scattered,
    "evict": eviction.evict,
}


# Methods that differ only in how a closed chunk enters the memory, and what tables call them.
_UPDATES = {"ccm_concat": "concat", "ccm_merge": "merge", "ccm_ema": "ema"}


def build(name: str, **options: Any) -> Method:
    """Builds a method by name.

    Args:
      name: a key of `METHODS`.
      **options: what that builder takes.

    Raises:
      UserError: for an unknown name, an option that the method does not have, or one that it needs and is not given.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    builder = METHODS[name]
    allowed = inspect.signature(builder).parameters
    for option in options:
        if option not in allowed:
            raise (
                unknown(f"option of method {name!r}:", option, allowed)
                if allowed
                else UserError(f"method {name!r} takes no options, but {option!r} was given")
            )
    missing = [name for name, option in allowed.items() if option.default is option.empty and name not in options]
    if missing:
        raise UserError(f"method {name!r} needs its option {missing[0]!r}; set it, as method.{missing[0]} in a config")
    return builder(**options)


def beside(name: str, **options: Any) -> dict[str, Method]:
    """A method by what tables call it, and beside CCM's own the appending one and the mean, with the same options.

    Args:
      name: a key of `METHODS`.
      **options: what that builder takes.

    Raises:
      UserError: as `build`.
    """
    own = build(name, **options)
    if name not in _UPDATES:
        return {name: own}
    shared = lambda other: {x: options[x] for x in options if x in inspect.signature(METHODS[other]).parameters}
    return {
        _UPDATES[other]: build(other, **shared(other)) for other in dict.fromkeys(("ccm_concat", "ccm_merge", name))
    }
