"""Paths as users give them: local ones, and URLs of buckets (``gs://``, ``s3://``) through `etils.epath`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from jax_ccm.errors import UserError

# Schemes that epath, and Orbax for checkpoints, can read and write; and the package that each needs.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# What pathlib makes of a URL: one slash is gone.
_MANGLED = re.compile(r"(gs|s3):/[^/]")


def of(path: str | os.PathLike) -> Path:
    """A path object for what the user wrote: of pathlib, or for ``gs://`` and ``s3://`` of epath, used in the same way.

    Raises:
      UserError: for the URL of anything else, or if the package that reaches the bucket is not installed.
    """
    if not isinstance(path, str):
        if is_remote(path):
            return path  # type: ignore[return-value]
        path = os.fspath(path)
    if _MANGLED.match(path):
        raise UserError(f"the path {path!r} lacks a slash; write {path.replace(':/', '://', 1)!r}, as a str")
    if (url := _URL.match(path)) is None:
        return Path(path)
    scheme = url[1].lower()
    if scheme not in SCHEMES:
        allowed = " and ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"paths of {scheme}:// are not supported ({path!r}); give a local path, or one of {allowed}")
    if not _reachable(scheme):
        raise UserError(f"{path!r} needs the package {SCHEMES[scheme]}; pip install {SCHEMES[scheme]}")
    from etils import epath

    # A bucket has no "..": names are taken as they are.
    rest = posixpath.normpath(path[len(url[0]) :])
    return epath.Path(f"{scheme}://{rest}")  # type: ignore[return-value]


def _reachable(scheme: str) -> bool:
    import fsspec

    if importlib.util.find_spec("tensorflow") is not None:  # epath prefers it
        return True
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        return False
    return True


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return _URL.match(os.fspath(path)) is not None


def local(path: str | os.PathLike, patterns: Sequence[str] = ("*",)) -> Path:
    """The path itself, or a copy on this machine of what is in a bucket, kept until the process ends.

    Args:
      path: a file or folder.
      patterns: of a folder only the files that fit one of these are copied (not those of folders below, unless a
        pattern has a slash).
    """
    there = of(path)
    if not is_remote(there):
        return there
    # Under the path that it has there, so that suffixes and neighbours stay what they are.
    here = _copies() / str(there).replace("://", "/")
    files = (
        {file for pattern in patterns for file in there.glob(pattern) if not file.is_dir()} if there.is_dir() else []
    )
    for file in sorted(files):
        _fetch(file, here / str(file)[len(str(there)) + 1 :])
    if not files and there.exists() and not there.is_dir():
        _fetch(there, here)
    return here


def _fetch(there: Any, here: Path) -> None:
    found = there.stat()
    stamp = (found.length, found.mtime)
    if _fetched.get(str(there)) == stamp and here.exists():
        return
    here.parent.mkdir(parents=True, exist_ok=True)
    with there.open("rb") as source, here.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)
    # Noted when it is whole, so that an interrupted copy is made again; by size and time, so that a changed file is,
    # too.
    _fetched[str(there)] = stamp


_fetched: dict[str, tuple[int, int]] = {}


@functools.cache
def _copies() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="jax_ccm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file as a whole or not at all; it is on disk when this returns."""
    path = of(path)
    if is_remote(path):  # so it is with every object of a bucket
        path.write_bytes(content)
        return
    # Beside it: a rename is atomic within one file system only.
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        # Before the rename: else the name could be on disk, and the content not, when the machine stops.
        settle(new)
        os.replace(new, path)
        settle(path.parent)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def settle(path: Path) -> None:
    """Waits until what was written to a local file, or the names in a folder, are on disk, where the system can say so.

    Raises:
      OSError: if a file cannot be written.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        # Not every system does it for a folder.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(number)
    finally:
        os.close(number)


def upload(folder: Path, target: Path, *, remove: bool = False) -> None:
    """Copies the files of a local folder, and of those below it, to a folder in a bucket.

    Args:
      folder: on this machine.
      target: in a bucket.
      remove: remove what is there first.
    """
    if remove and target.exists():
        target.rmtree()  # type: ignore[attr-defined]  epath has it
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            there = target / file.relative_to(folder).as_posix()
            there.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as source, there.open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)


def usable(path: str | os.PathLike, option: str = "--workdir") -> Path:
    """A folder that is there when this returns.

    Raises:
      UserError: naming the option, if it cannot be made.
    """
    folder = of(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{option} {path} cannot be used: {e}") from e
    return folder


if TYPE_CHECKING:
    Folder = Path
else:
    # The type of an option that names a file or folder: `pathlib.Path` would turn gs:// into gs:/.
    Folder = Annotated[
        Path,
        PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: of(given[0]),
            is_instance=lambda x: isinstance(x, os.PathLike),
            str_from_instance=lambda x: [str(x)],
        ),
    ]


def usable_beside_training(folder: Path) -> Path:
    """`usable` for what a command writes that is no training run.

    Raises:
      UserError: as `usable`, and for the folder of a training run, whose files would be overwritten.
    """
    if (folder / "checkpoints").exists():
        raise UserError(
            f"--workdir {folder} holds a training run, whose files would be overwritten; give another, such as "
            f"{folder / 'evaluation'}"
        )
    return usable(folder)
