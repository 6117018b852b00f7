"""Sessions on disk: a memory file for each, in a folder that one server holds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jax_ccm.errors import UserError

# No separator, no dot: a name is a name and never a path.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ENDING = ".ccm"


class Store:
    """The memory files of a folder.

    Attributes:
      folder: of the files; nobody but its owner can read it.
    """

    def __init__(self, folder: Path):
        """Takes a folder for as long as the process lives.

        Raises:
          UserError: if it cannot be used, or another server holds it.
        """
        self.folder = folder
        lock: IO[str] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (folder / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(".*.tmp"):  # a server that was killed was writing it
                left.unlink()
        except BlockingIOError:
            if lock is not None:
                lock.close()
            raise UserError(f"another server keeps its sessions in {folder}; give another --workdir") from None
        except OSError as e:
            raise UserError(f"--workdir {folder} cannot be used: {e}") from e
        self._lock = lock

    def close(self) -> None:
        """Gives the folder back."""
        self._lock.close()

    def path(self, name: str) -> Path:
        """The file of a session, whether it is there or not.

        Raises:
          UserError: for a name that is none.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"{name[:80]!r} is no name of a session; give 1 to 64 letters, digits, '_' or '-'")
        return self.folder / f"{name}{ENDING}"

    def names(self) -> Iterator[str]:
        """Of all sessions on disk."""
        return (path.stem for path in self.folder.glob(f"*{ENDING}"))

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def remove(self, name: str) -> bool:
        """Removes a session; whether it was there."""
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def touch(self, name: str) -> None:
        """Notes that a session was used now."""
        with contextlib.suppress(OSError):
            os.utime(self.path(name))

    def size(self) -> tuple[int, int]:
        """How many sessions there are, and their bytes."""
        sizes = []
        for path in self.folder.glob(f"*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return len(sizes), sum(sizes)

    def older(self, seconds: float) -> list[str]:
        """Sessions that nobody has used for so long."""
        limit, found = time.time() - seconds, []
        for path in self.folder.glob(f"*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < limit:
                    found.append(path.stem)
        return found
