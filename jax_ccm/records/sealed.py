"""Files that cannot be taken for what they are not: safetensors with a JSON header, and a digest over every byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.records import paths
from jax_ccm.records.parsing import parse_json

# In the file's own header, where no text inside a JSON string can stand: quotes in there are escaped.
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')
# Stands in the digest's place while the digest is taken, and is as long: no offset in the file changes.
_UNKNOWN = "0" * 64
# Names and shapes of arrays, and what is said about them.
MOST_HEADER = 2**24


class Sealed:
    """A file that `write` wrote, or one without a digest; its arrays are read when they are asked for.

    Attributes:
      path: the file.
      header: what it says of itself, JSON values.
      digest: of all of it, hexadecimal; empty if it has none.
      shapes: name -> shape and type of each array, such as ``((3, 4), "F32")``.
    """

    def __init__(self, path: str | Path, name: str):
        """Reads all but the arrays.

        Args:
          path: the file.
          name: of the header among the file's metadata.

        Raises:
          UserError: if it cannot be read, is no such file, or is not what was written.
        """
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            self.digest = _checked_digest(self.path)
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                self.shapes: dict[str, tuple[tuple[int, ...], str]] = {
                    key: (tuple(x.get_shape()), str(x.get_dtype())) for key, x in slices.items()
                }
        except (OSError, SafetensorError, ValueError) as e:
            raise _unreadable(path, e) from e
        header = parse_json(metadata.get(name, "{}"), f"{path}: its metadata {name!r}")
        self.header: dict[str, Any] = header if isinstance(header, dict) else {}

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays, by name.

        Raises:
          UserError: if the file can no longer be read.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            # Not by way of a device: there each shape would be a program of its own.
            return load_file(str(self.path))
        # The last for a type that NumPy has no name for.
        except (OSError, SafetensorError, ValueError, AttributeError) as e:
            raise _unreadable(self.path, e) from e


def write(path: str | Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], name: str) -> str:
    """Writes arrays and what is said about them. A file that was there stays until the new one is whole, on disk.

    Args:
      path: the file.
      arrays: by name.
      header: JSON values.
      name: of the header among the file's metadata.

    Returns:
      The digest: SHA-256 of the file, in which the digest itself reads 64 zeros.

    Raises:
      UserError: if the file cannot be written.
    """
    from safetensors.numpy import save

    content = bytearray(save(dict(arrays), {"digest": _UNKNOWN, name: json.dumps(header)}))
    found = _DIGEST.search(content)
    assert found is not None
    digest = hashlib.sha256(content).hexdigest()
    content[found.start(1) : found.end(1)] = digest.encode()
    path = Path(path)
    # A name of this thread's own: of two that write one file, the last that is whole counts.
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            # Before the rename: else the name could be on disk, and the content not, when the machine stops.
            os.fsync(file.fileno())
        os.replace(part, path)
        paths.settle(path.parent)
    except (OSError, ValueError) as e:  # the second for a name with a zero byte
        raise UserError(f"{path} cannot be written: {e}") from e
    finally:
        # After the rename there is none; after an error it would stay.
        with contextlib.suppress(OSError, ValueError):
            part.unlink()
    return digest


def _checked_digest(path: Path) -> str:
    """The digest that a file has; empty if it has none.

    Raises:
      UserError: if it is not the digest of this file.
    """
    # A pipe would keep us waiting, and a device need not end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a plain file")
    with path.open("rb") as file:
        # safetensors: 8 bytes with the length of the header, the header in JSON (at least "{}"), the arrays.
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(path.stat().st_size - 8, MOST_HEADER):
            raise OSError(f"its header is said to have {size:,} bytes; it is cut short, or none of this kind")
        head = file.read(size)
        found = _DIGEST.findall(head)
        if not found:
            return ""
        running = hashlib.sha256(size.to_bytes(8, "little") + _DIGEST.sub(f'"digest":"{_UNKNOWN}"'.encode(), head))
        while block := file.read(2**20):
            running.update(block)
    if found != [running.hexdigest().encode()]:
        raise OSError("it is damaged: its digest is not that of what it holds")
    return found[0].decode()


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read: {error}")
