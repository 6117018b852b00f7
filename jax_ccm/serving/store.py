"""Sessions on disk: a memory file for each, in a folder that one server holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.serving.requests import Refused

# No separator, no dot: a name is a name and never a path.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAMED = "give 1 to 64 letters, digits, '_' or '-'"
ENDING = ".ccm"
# Ids of responses are names of sessions, too, and no client may choose such a name for one.
RESPONSE = "resp_"
# Of a file that a session is saved to: no separator, and no dot in front.
_FILENAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class Store:
    """The memory files of a folder, and those that clients save sessions to, in another one.

    Attributes:
      folder: of the files; nobody but its owner can read it.
    """

    def __init__(self, folder: Path, slots: Path | None = None):
        """Takes folders for as long as the process lives.

        Args:
          folder: of the sessions.
          slots: of the files that sessions are saved to and restored from; None if there is to be none of that.

        Raises:
          UserError: if one cannot be used, or another server holds it.
        """
        self.folder, self._slots = folder, slots
        if slots is not None and slots.resolve() == folder.resolve():
            raise UserError(f"--slot_save_path and --workdir are both {folder}; give two folders")
        self._locks = [_take(folder, "--workdir")]
        if slots is not None:
            try:
                self._locks.append(_take(slots, "--slot_save_path"))
            except UserError:
                self.close()
                raise

    def close(self) -> None:
        """Gives the folders back."""
        for lock in self._locks:
            lock.close()

    def path(self, name: str) -> Path:
        """The file of a session, whether it is there or not.

        Raises:
          UserError: for a name that is none.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"{name[:80]!r} is no name of a session; {_NAMED}")
        return self.folder / f"{name}{ENDING}"

    def slot(self, filename: str) -> Path:
        """The file that a session is saved to or restored from, whether it is there or not.

        Raises:
          Refused: for a name that is none, or if there is no folder for it.
        """
        if self._slots is None:
            raise Refused(
                "this server saves and restores no slots; start it with --slot_save_path FOLDER", status=501,
                code="not_supported",
            )  # fmt: skip
        if not _FILENAME.fullmatch(filename):
            raise Refused(
                f"filename is {filename[:80]!r}; give 1 to 128 letters, digits, '_', '-' or '.', no dot in front",
                "filename",
            )
        return self._slots / filename

    def made_in(self, session: str) -> tuple[list[str], list[Path]]:
        """What was made of a session and is kept: the responses, and the files that it was saved to."""
        responses = [path.stem for path in self.folder.glob(f"{RESPONSE}*{ENDING}") if _session_of(path) == session]
        found = [] if self._slots is None else [path for path in self._slots.iterdir() if _session_of(path) == session]
        return responses, found

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
        """How many sessions there are, and their bytes, with those of the files that they were saved to."""
        sizes = []
        sessions = list(self.folder.glob(f"*{ENDING}"))
        for path in (*sessions, *([] if self._slots is None else self._slots.glob("[!.]*"))):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return len(sessions), sum(sizes)

    def older(self, seconds: float) -> list[str]:
        """Sessions that nobody has used for so long."""
        limit, found = time.time() - seconds, []
        for path in self.folder.glob(f"*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < limit:
                    found.append(path.stem)
        return found


def require_session(name: str) -> None:
    """Raises unless a client may give a session this name.

    Raises:
      Refused: with what it may be.
    """
    if not _NAME.fullmatch(name):
        raise Refused(f"{name[:80]!r} is no name of a session; {_NAMED}", "session_id")
    if name.startswith(RESPONSE):
        raise Refused(f"{name[:80]!r} is the name of a response, not of a session", "session_id")


def _take(folder: Path, option: str) -> IO[str]:
    """Takes a folder for this process; the lock is given back when it is closed."""
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
        raise UserError(f"another server keeps its sessions in {folder}; give another {option}") from None
    except OSError as e:
        raise UserError(f"{option} {folder} cannot be used: {e}") from e
    return lock


def _session_of(path: Path) -> str | None:
    """The session that a memory was made in, as its file says; None if it says nothing, or is no memory.

    Only the head of the file is read: what it holds matters to nobody who wants it gone.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(files.NAME, "{}"))["about"]
            return about.get("session")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError):
        return None
