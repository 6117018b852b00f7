"""Folders of an adapter: read with clear errors, written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.records import folders, paths
from jax_ccm.weights.pickles import read_torch


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a ``.safetensors`` or torch ``.bin`` file as float32, and the file's metadata.

    Raises:
      UserError: if the file is missing, truncated, or has tensors of another type than float32, bfloat16, float16.
    """
    if path.suffix == ".bin":
        tensors, metadata = read_torch(path), {}
    else:
        tensors, metadata = _read_safetensors(path)
    for name, x in tensors.items():
        # Narrower floats widen exactly; float64 would be rounded.
        if x.dtype.name not in ("float32", "bfloat16", "float16"):
            raise UserError(f"{path}: tensor {name!r} is of type {x.dtype}; an adapter is float32, bfloat16 or float16")
    return {name: x.astype(np.float32) for name, x in tensors.items()}, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}; get it again") from error


def safetensors_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file."""
    from safetensors.numpy import save

    # It writes the buffer of an array as it lies in memory, transposed or not.
    return save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, metadata=metadata)


def write_folder(path: Path, files: dict[str, bytes], known: set[str]) -> None:
    """Writes a folder of files: in a temporary one beside it, which then takes its place.

    Args:
      path: the folder. If it exists, it is replaced.
      files: content by name.
      known: an existing folder is replaced only if it holds nothing but files of these names.

    Raises:
      UserError: if ``path`` is a file, or a folder with other files.
    """
    folders.recover(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder for the adapter")
    strange = sorted(p.name for p in path.iterdir() if p.name not in known) if path.exists() else []
    if strange:
        raise UserError(
            f"{path} holds other files ({', '.join(strange[:5])}); give a new or empty folder for the adapter"
        )
    if paths.is_remote(path):
        # Folders of a bucket are not renamed. What describes the rest comes last, so that half a folder is not taken
        # for a whole one.
        for name in known - files.keys():
            (path / name).unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: name.endswith(".json")):
            (path / name).write_bytes(files[name])
        return

    def write(new: Path) -> None:
        for name, content in files.items():
            (new / name).write_bytes(content)

    folders.replace(path, write)
