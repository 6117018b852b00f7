"""Functions that a config names, ``package.module:function``: a user's own code, without an edit of the library."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jax_ccm.errors import UserError, unknown

WHOLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_named(name: str) -> bool:
    """Whether a name is that of a function in a module, as opposed to a key of a table."""
    # No name of a table holds a colon.
    return ":" in name


def function(name: str, what: str, returns: tuple[type, ...]) -> Callable[..., Any]:
    """The function of a name. Its module is imported; the function is not called.

    Only a function that says by its annotation that it returns what is wanted is taken: a config may come from somebody
    else, and names nothing that was not written for this.

    Args:
      name: ``package.module:function``, of a module that is installed or lies in the folder of the command.
      what: it is for, for messages, such as "method.name".
      returns: types of which the function must say that it returns one.

    Raises:
      UserError: for a name of another form, a module or function that is not there, or one that says no such thing.
    """
    if not WHOLE.fullmatch(name):
        raise UserError(f"{what} is {name!r}; a function of your own is named package.module:function")
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise  # the module is there, and lacks something itself
        raise UserError(
            f"{what} is {name!r}, but there is no module {e.name!r}; install it, or run the command in the folder that "
            "holds it"
        ) from None
    found = getattr(module, function_name, None)
    if not inspect.isfunction(found):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise unknown(f"function of the module {module_name!r}:", function_name, functions)
    # Also of annotations that are text (from __future__ import annotations).
    hint = typing.get_type_hints(found).get("return")
    if hint not in returns:
        allowed = " or ".join(kind.__name__ for kind in returns)
        raise UserError(
            f"{what} is {name!r}, a function that does not say that it returns {allowed}; it is not called. Annotate "
            f"it: def {function_name}(...) -> {returns[0].__name__}"
        )
    return found


def arguments(function: Callable[..., Any], given: Mapping[str, str], what: str) -> dict[str, Any]:
    """Arguments of a function from text, by its annotations: int, float, bool ("true" or "false") or str.

    Args:
      function: the function.
      given: the text of each argument, by name.
      what: gave them, for messages.

    Raises:
      UserError: for an argument that the function does not have, needs, or cannot take.
    """
    parameters, hints = inspect.signature(function).parameters, typing.get_type_hints(function)
    for name in given:
        if name not in parameters:
            raise unknown(f"option of {what}:", name, parameters)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise UserError(f"{what} lacks the option {name!r}, which the function needs; write ?{name}=VALUE")
    return {name: _value(text, hints.get(name, str), f"{what}: {name}") for name, text in given.items()}


def _value(text: str, kind: Any, what: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"{what} is {text!r}; write true or false")
        return text == "true"
    if kind not in (int, float, str):
        raise UserError(f"{what} is of {kind}; only int, float, bool and str can be written in a config")
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{what} is {text!r}; it must be {'a whole number' if kind is int else 'a number'}") from None
