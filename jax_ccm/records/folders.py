"""Folders that are replaced as a whole: written beside their place, and put back where a process died in between."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax_ccm.records import paths


def replace(folder: Path, write: Callable[[Path], Any]) -> None:
    """Writes a folder beside ``folder`` and puts it in its place, on disk when this returns.

    If this fails, ``folder`` is as it was. If the process is killed, it is so too, or at the next `recover`. In a
    bucket, where nothing is renamed, it is written file by file.

    Args:
      folder: what is there is replaced; folders above it are made.
      write: gets an empty folder on this machine, and fills it.
    """
    if paths.is_remote(folder):
        with tempfile.TemporaryDirectory() as made:
            write(Path(made))
            paths.upload(Path(made), folder, remove=True)
        return
    folder = _place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    _clear(folder)
    # Names of this thread's own: of two that write one folder, the last that is whole counts.
    mark = f"{os.getpid()}.{threading.get_ident()}"
    new, old = (folder.with_name(f".{folder.name}.{word}-{mark}") for word in ("new", "old"))
    try:
        new.mkdir()
        with _in_use(new):
            write(new)
            for path in (*new.rglob("*"), new):
                paths.settle(path)
            _swap(new, folder, old)
        paths.settle(folder.parent)
    finally:
        recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        # Where it cannot be put back, it is all there is.
        if os.path.lexists(folder):
            shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Puts a folder back that a process was killed while replacing; where it is there, or never was, does nothing.

    Between its two renames nothing is under the folder's name, and what was there is whole beside it.
    """
    if paths.is_remote(folder) or os.path.lexists(folder := _place(folder)):
        return
    # It may have been put back by now, or the disk cannot be written: then the folder is missing as it was.
    with contextlib.suppress(OSError):
        # Each was the folder at its time; the newest is what was replaced last.
        left = sorted(_beside(folder, "old"), key=lambda path: path.stat().st_mtime)
        if left:
            left[-1].rename(folder)


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Puts ``new`` in the place of a folder, which is then ``old``."""
    while True:
        try:
            new.rename(folder)
            return
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # A rename replaces no folder that holds files: that goes aside first. Whoever looks for it at this moment may
        # put it back (`recover`), or write it, too: then once more.
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)


def _clear(folder: Path) -> None:
    """Removes what processes have left that were killed in `replace`, but not what another one is writing."""
    for left in (*_beside(folder, "new"), *_beside(folder, "old")):
        with contextlib.suppress(OSError), _in_use(left):
            shutil.rmtree(left)


def _beside(folder: Path, word: str) -> list[Path]:
    """Folders that stand beside one while it is replaced."""
    # Earlier versions named them without a mark.
    name = re.compile(rf"\.{re.escape(folder.name)}\.{word}(-[\d.]+)?")
    return [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]


def _place(folder: Path) -> Path:
    """Where a folder is: not the link that points to it, and with a parent."""
    return Path(os.path.realpath(folder))


def hold(folder: Path) -> int:
    """A file descriptor that holds a folder until it is closed, or the process has ended in whatever way.

    Where the file system has no locks nothing is held.

    Raises:
      BlockingIOError: if another one holds it.
    """
    # The folder itself: no file is left behind, and the lock goes where the folder is renamed to.
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass
    return handle


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """`hold`, as a context."""
    handle = hold(folder)
    try:
        yield
    finally:
        os.close(handle)
