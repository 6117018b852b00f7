"""A bucket that is a folder: ``gs://NAME/KEY`` is ``ROOT/NAME/KEY`` for etils.epath and for Orbax."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Bucket(DirFileSystem):
    """As in a bucket, folders need not be made."""

    protocol = ("gs", "gcs")
    root = ""
    cachable = False

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))


@contextlib.contextmanager
def use(monkeypatch: pytest.MonkeyPatch, root: Path) -> Iterator[list[str]]:
    """Has ``gs://`` lie in ``root``; gives the list of the paths that Orbax gets."""
    import orbax.checkpoint as ocp

    for name in Bucket.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, Bucket)
    monkeypatch.setattr(Bucket, "root", str(root))
    filesystem = type(backend.fsspec_backend)._get_filesystem
    filesystem.cache_clear()
    given: list[str] = []
    real = ocp.CheckpointManager

    def manager(directory, **options):
        given.append(os.fspath(directory))
        here = root / os.fspath(directory).removeprefix("gs://")
        here.mkdir(parents=True, exist_ok=True)
        return real(here, **options)

    monkeypatch.setattr(ocp, "CheckpointManager", manager)
    yield given
    filesystem.cache_clear()
