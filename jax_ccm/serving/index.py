"""What lies in a folder, known without a look at it: sizes, when each file was used, and what it was made in."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax_ccm.memory import files


class Entry(NamedTuple):
    """What is known of a file.

    Attributes:
      size: bytes.
      used: nanoseconds of the time at which it was written, or used, last.
      number: of its place on disk; a file that replaces another one has a new one.
      session: in which it was made; None if that is of no interest, or its own affair.
    """

    size: int
    used: int
    number: int
    session: str | None


class Index:
    """The memory files of a folder, by name, those that nobody has used for longest first.

    It is made anew from the folder whenever a server starts, so that nothing has to be kept on disk beside the files
    and nothing can disagree with them after a kill. From then on the server, which alone writes there, says what it
    does. A look at the folder for each question would cost a second at some ten thousand files.

    Attributes:
      bytes: of all of them.
    """

    def __init__(self, folder: Path, ending: str = "", begins: str = ""):
        """Looks at a folder.

        Args:
          folder: of the files.
          ending: of their names. What has a dot in front is none of them.
          begins: how the names begin of those whose heads are read for the session that they were made in.
        """
        self._folder, self._ending, self._begins = folder, ending, begins
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.bytes = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def refresh(self) -> None:
        """Looks at the folder again: others may have come to write there. Heads are read of what has changed alone."""
        found = []
        for each in os.scandir(self._folder):
            if each.name.startswith(".") or not each.name.endswith(self._ending):
                continue
            with contextlib.suppress(FileNotFoundError):  # it has gone in the meantime
                if each.is_file():
                    found.append((each.name, self._entry(each.name, each.stat(), None)))
        # In order of use, which `older` relies on, and which `used` and `wrote` keep up by putting the newest last.
        self._entries = OrderedDict(sorted(found, key=lambda item: item[1].used))
        self.bytes = sum(entry.size for entry in self._entries.values())

    def _entry(self, name: str, stat: os.stat_result, session: str | None) -> Entry:
        """What is known of a file: as before if it is the same, of a session as its head says if that is not given."""
        now, old = (stat.st_size, stat.st_mtime_ns, stat.st_ino), self._entries.get(name)
        # The number on disk tells a replaced file from the one before, even within one tick of the clock.
        if old is not None and old[:3] == now:
            return old
        if not name.startswith(self._begins):
            return Entry(*now, None)
        return Entry(*now, session_of(self._folder / name) if session is None else session)

    def wrote(self, name: str, session: str | None) -> None:
        """Notes that a file was written, or that it was tried, and the session that it was made in, if in one."""
        try:
            entry = self._entry(name, (self._folder / name).stat(), session)
        except FileNotFoundError:
            self.gone(name)
            return
        if entry == self._entries.get(name):  # it is as it was, and was not used either
            return
        self.gone(name)
        self._entries[name] = entry
        self.bytes += entry.size

    def used(self, name: str) -> None:
        """Notes that a file was used now; on disk too, for the next server."""
        path = self._folder / name
        with contextlib.suppress(OSError):
            # The time on disk is all that tells the next server which sessions are idle.
            os.utime(path)
            stat, old = path.stat(), self._entries.get(name)
            if old is not None:
                self._entries[name] = old._replace(used=stat.st_mtime_ns)
                self._entries.move_to_end(name)

    def gone(self, name: str) -> None:
        """Notes that a file is not there any more."""
        if (entry := self._entries.pop(name, None)) is not None:
            self.bytes -= entry.size

    def made_in(self, session: str) -> list[str]:
        """The files that were made in a session."""
        return [name for name, entry in self._entries.items() if entry.session == session]

    def older(self, nanoseconds: int) -> list[str]:
        """The files that were used last before a point in time, the longest idle first."""
        # In order of use: the first one that is young enough ends it.
        idle = itertools.takewhile(lambda item: item[1].used < nanoseconds, self._entries.items())
        return [name for name, _ in idle]


def session_of(path: Path) -> str | None:
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
