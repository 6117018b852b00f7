"""Arguments of a command line, through tyro."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from jax_ccm.errors import UserError

T = TypeVar("T")


def parse(kind: type[T], args: Sequence[str], **options: Any) -> T:
    """``tyro.cli``, but a value that a dataclass refuses is the same error here as in a YAML file.

    tyro takes every `ValueError` of a class for its own, prints it in a frame and exits.

    Args:
      kind: a dataclass, possibly of others.
      args: the arguments.
      **options: of ``tyro.cli``.

    Raises:
      UserError: by one of these dataclasses.
      SystemExit: with 0 after ``--help``, with 2 for an argument that is unknown or of a wrong type.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(args), **options)
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        if error is not None:
            said.truncate(0)
            raise error from None
        raise
    finally:
        # Its own errors, and warnings.
        if text := said.getvalue():
            sys.stderr.write(text)
