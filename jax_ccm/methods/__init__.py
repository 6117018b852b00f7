"""The methods, as data: an explicit table from name to builder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jax_ccm.errors import UserError, unknown
from jax_ccm.methods import baselines, ccm, compressive, eviction, loma, sentinel
from jax_ccm.records import named
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


def builder_of(name: str) -> Callable[..., Method]:
    """The function that builds a method.

    Args:
      name: a key of `METHODS`, or ``package.module:function`` for a function of your own that returns a `Method`.

    Raises:
      UserError: for an unknown name, or a function that is not there or does not say that it returns a `Method`.
    """
    if named.is_named(name):
        return named.function(name, "method.name", (Method,))
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def build(name: str, **options: Any) -> Method:
    """Builds a method by name.

    Args:
      name: a key of `METHODS`, or ``package.module:function`` for one of your own.
      **options: what that builder takes.

    Raises:
      UserError: for an unknown name, an option that the method does not have, or one that it needs and is not given.
    """
    # Options are the builder's own arguments, so that its signature is the list of what is allowed.
    builder = builder_of(name)
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
    made = builder(**options)
    if not isinstance(made, Method):
        raise UserError(f"method {name!r} is a function that returned {made!r}; it must return a Method")
    return made


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

    # As far as the other method has them: only `ema` has a decay.
    def shared(other):
        return {x: options[x] for x in options if x in inspect.signature(METHODS[other]).parameters}

    return {
        _UPDATES[other]: build(other, **shared(other)) for other in dict.fromkeys(("ccm_concat", "ccm_merge", name))
    }
