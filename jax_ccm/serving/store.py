"""Sessions on disk: a memory file for each, in a folder that one server holds."""

from __future__ import annotations

import contextlib
import fcntl
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jax_ccm.errors import UserError
from jax_ccm.serving.index import Index
from jax_ccm.serving.requests import Refused

# No separator, no dot: a name is a name and never a path.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAMED = "give 1 to 64 letters, digits, '_' or '-'"
ENDING = ".ccm"
# Ids of responses are names of sessions, too, and no client may choose such a name for one.
RESPONSE = "resp_"
# Of a file that a session is saved to: no separator, and no dot in front.
_FILENAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class Unkept(UserError):
    """What was to be kept, or to go, is not so on disk: that one is full, or the folder is not writable any more."""


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
        self._index = Index(folder, ENDING, begins=RESPONSE)
        self._saved = None if slots is None else Index(slots)

    def close(self) -> None:
        """Gives the folders back."""
        for lock in self._locks:
            lock.close()

    def path(self, name: str) -> Path:
        """The file of a session, whether it is there or not.

        Raises:
          UserError: for a name that is none.
        """
        if not is_name(name):
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

    @contextlib.contextmanager
    def writing(self, name: str, session: str | None = None) -> Iterator[Path]:
        """Where the file of a session is written: it counts when it is there.

        Args:
          name: of the session.
          session: in which it was made, if it is a response; None for none.

        Yields:
          The path.

        Raises:
          Unkept: if it cannot be written; the message names the session, not where it lies.
        """
        path = self.path(name)
        try:
            yield path
        except UserError as e:
            raise Unkept(str(e).replace(str(path), path.name)) from e
        finally:
            # After a failure as well: the file of before may be there, and counts.
            self._index.wrote(path.name, session)

    @contextlib.contextmanager
    def saving(self, filename: str, session: str) -> Iterator[Path]:
        """Where a session is saved to, as `writing`."""
        path = self.slot(filename)
        try:
            yield path
        except UserError as e:
            raise Unkept(str(e).replace(str(path), filename)) from e
        finally:
            if self._saved is not None:
                self._saved.wrote(filename, session)

    def made_in(self, session: str) -> list[str]:
        """The responses that were made in a session and are kept."""
        return [name.removesuffix(ENDING) for name in self._index.made_in(session)]

    def remove_saved(self, session: str) -> bool:
        """Removes the files that a session was saved to; whether there was one. Raises as `remove`."""
        if self._slots is None or self._saved is None:
            return False
        self._saved.refresh()  # people may have carried files in and out
        found = self._saved.made_in(session)
        for filename in found:
            _unlink(self._slots / filename)
            self._saved.gone(filename)
        return bool(found)

    def names(self) -> Iterator[str]:
        """Of all sessions on disk."""
        return (name.removesuffix(ENDING) for name in self._index)

    def __contains__(self, name: str) -> bool:
        # The disk is asked, and not the index: one look at one name is cheap, and true.
        return self.path(name).is_file()

    def remove(self, name: str) -> bool:
        """Removes a session; whether it was there.

        Raises:
          Unkept: if it is still there: its folder cannot be written.
        """
        path = self.path(name)
        found = _unlink(path)
        self._index.gone(path.name)
        return found

    def touch(self, name: str) -> None:
        """Notes that a session was used now."""
        self._index.used(self.path(name).name)

    def size(self) -> tuple[int, int]:
        """How many sessions there are, and their bytes, with those of the files that they were saved to."""
        return len(self._index), self._index.bytes + (0 if self._saved is None else self._saved.bytes)

    def older(self, seconds: float) -> list[str]:
        """Sessions that nobody has used for so long."""
        limit = time.time_ns() - int(seconds * 10**9)
        return [name.removesuffix(ENDING) for name in self._index.older(limit)]


def is_name(name: str) -> bool:
    """Whether a session, or a response, may have this name."""
    return _NAME.fullmatch(name) is not None


def require_session(name: str) -> None:
    """Raises unless a client may give a session this name.

    Raises:
      Refused: with what it may be.
    """
    if not is_name(name):
        raise Refused(f"{name[:80]!r} is no name of a session; {_NAMED}", "session_id")
    if name.startswith(RESPONSE):
        raise Refused(f"{name[:80]!r} is the name of a response, not of a session", "session_id")


def _unlink(path: Path) -> bool:
    """Removes a file; whether it was there. Raises as `Store.remove`."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as e:
        raise Unkept(f"{path.name} cannot be removed: {e.strerror}") from e
    return True


def _take(folder: Path, option: str) -> IO[str]:
    """Takes a folder for this process; the lock is given back when it is closed."""
    lock: IO[str] | None = None
    try:
        # A memory is personal data: nobody else on the machine may look into the folder.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("w")
        # The kernel gives the lock back when the process ends in whatever way: a kill leaves nothing to clear up.
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
