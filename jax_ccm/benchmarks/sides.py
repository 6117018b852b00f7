"""Processes that take turns, so that those which are compared never compute at the same time."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from jax_ccm.errors import RunError, UserError


class Side:
    """A process that runs steps when it is told to.

    Attributes:
      about: what it says of itself.
      steps: names of its steps.
    """

    def __init__(self, process: subprocess.Popen, command: list[str], settings: Mapping[str, Any], remedy: str):
        """Hands over the settings. Arguments and errors as `started`."""
        self.process, self.command = process, command
        ready = self.ask(json.dumps(settings))
        if "error" in ready:
            raise UserError(f"{ready['error']}; {remedy}")
        self.about, self.steps = ready["about"], ready["steps"]

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line.

        Raises:
          RunError: if the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        # A process that has ended: reading finds the end, and that is told.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RunError(f"{shlex.join(self.command)} ended with {self.process.wait()}; what it printed is above")
        return json.loads(answer)


@contextlib.contextmanager
def started(command: list[str], settings: Mapping[str, Any], remedy: str) -> Iterator[Side]:
    """A process that answers as `peer.serve` does, until the block ends.

    Args:
      command: the program with its arguments.
      settings: for its ``make``.
      remedy: what to do where the program, or a package that it needs, is not there.

    Raises:
      UserError: where it is not there.
    """
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as e:
        raise UserError(f"{command[0]} cannot be started ({e.strerror}); {remedy}") from e
    with process:
        try:
            yield Side(process, command, settings, remedy)
        finally:
            # It only waits for lines, and would go on doing so.
            process.kill()
