"""Where the turns of a conversation come from: the keyboard, a pipe, or the example that comes with the library."""

from __future__ import annotations

import importlib.resources
import sys
from collections.abc import Iterator

HINT = "/help lists commands, an empty line ends the conversation"
ABOUT = """twelve turns, each of which becomes memory
and is dropped as text; then every fact is asked for, beside the conversation, from four memories:
  memory   the slots of these turns              full     their whole text, read by the model itself
  another  the slots of another conversation     nothing  no memory at all
with the bytes of keys and values that each holds"""


def example() -> list[str]:
    """The turns of the conversation that comes with the library, and its questions."""
    return importlib.resources.files("jax_ccm.sessions").joinpath("example.txt").read_text("utf-8").splitlines()


def lines() -> Iterator[str]:
    """Turns from the keyboard or a pipe, up to an empty line or the end."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="surrogateescape")  # what is no UTF-8 is a turn that is refused, not the end
    while True:
        try:
            # What comes from a pipe is printed by whoever reads it.
            line = input("you      " if sys.stdin.isatty() else "").removeprefix("\ufeff").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n         (an empty line or Ctrl-D ends the conversation)")
            continue
        if not line:
            return
        yield line
