"""PyTorch's ``.bin`` files, read as data: nothing that is in the file is executed.

A file of `torch.save` (PyTorch 1.6 and later) is an uncompressed zip archive: ``NAME/data.pkl``, a pickle that names
each tensor's storage, and ``NAME/data/KEY``, the bytes of the storages. A pickle is a program; here it is run with an
empty vocabulary. The only names that it may use are those below, and each stands for an inert stand-in of ours.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_ccm.errors import UserError

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_INSTEAD = "save the tensors as safetensors instead (safetensors.torch.save_file)"


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a flat dict of tensors that `torch.save` wrote.

    Args:
      path: the file.

    Returns:
      Arrays in the dtype of the file (bfloat16 as `ml_dtypes.bfloat16`), each a copy of its own.

    Raises:
      UserError: if the file is missing, truncated, of the format before PyTorch 1.6, or needs anything but tensors.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UserError:
        raise
    except Exception as error:  # Of a damaged archive, zipfile raises almost anything.
        raise UserError(_not_a_zip(path, error)) from error


def _not_a_zip(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"{path} cannot be read as a file: {error}"
    with path.open("rb") as file:
        head = file.read(4)
    if head[:1] == b"\x80":
        return (
            f"{path} is in the format of PyTorch before 1.6, a bare pickle, which is not read; load it with torch and "
            f"save it again, or {_INSTEAD}"
        )
    if head[:2] == b"PK":
        return f"{path} is damaged or cut short after {path.stat().st_size} bytes ({error}); get it again"
    return f"{path} is not a file of torch.save: it starts with {head!r}"


def _read(archive: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray]:
    entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise UserError(
            f"{path} is a zip archive, but not one of torch.save: it has {len(roots)} entries NAME/data.pkl"
        )
    for info in entries.values():
        # torch.save never compresses; refusing the rest keeps a small file from unpacking to a huge one.
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: entry {info.filename!r} is compressed, which torch.save never does; refused")
    order = f"{roots[0]}byteorder"
    if order in entries and archive.read(order) != b"little":
        raise UserError(f"{path} was written on a big-endian machine, which is not read; {_INSTEAD}")
    storages: dict[str, np.ndarray] = {}

    def storage(kind: str, key: str, count: int) -> np.ndarray:
        name, dtype = f"{roots[0]}data/{key}", _STORAGES[kind]
        if name not in entries:
            raise UserError(f"{path} lacks the entry {name!r} that its pickle refers to; get it again")
        if entries[name].file_size != count * dtype.itemsize:
            raise UserError(
                f"{path}: entry {name!r} has {entries[name].file_size} bytes, but {count} numbers of {kind} take "
                f"{count * dtype.itemsize}"
            )
        # Several tensors may be views of one storage.
        if key not in storages:
            storages[key] = np.frombuffer(archive.read(name), np.uint8)
        return storages[key].view(dtype)

    found, marker = _unpickle(archive.read(f"{roots[0]}data.pkl"), path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; only a dict of tensors is read")
    arrays = {}
    for name, value in found.items():
        if not (isinstance(name, str) and type(value) is tuple and len(value) == 5 and value[0] is marker):
            raise UserError(
                f"{path}: {name!r} is not a tensor but a {type(value).__name__}; only a dict of tensors is read"
            )
        arrays[name] = _tensor(storage, *value[1:], where=f"{path}: tensor {name!r}")
    return arrays


def _unpickle(data: bytes, path: Path) -> tuple[Any, object]:
    """Runs the pickle; a tensor comes out as ``(marker, storage, offset, size, stride)``, all of it unchecked."""
    marker = object()

    # Made anew for each file, so that a hostile one can change no state that outlives it.
    def rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
        return (marker, storage, offset, size, stride)

    # Stand-ins for storages are strings: a pickle can set the state of almost anything else.
    allowed: dict[tuple[str, str], Any] = {("torch", name): name for name in _STORAGES}
    allowed[("torch._utils", "_rebuild_tensor_v2")] = rebuild
    allowed[("collections", "OrderedDict")] = OrderedDict

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in allowed:
                raise UserError(
                    f"{path} asks for {module}.{name}, which a file of plain tensors does not need. Such a file can "
                    f"run any program, so it is refused; if you trust it, {_INSTEAD}"
                )
            return allowed[module, name]

        def persistent_load(self, pid):
            return pid

    try:
        return Unpickler(io.BytesIO(data)).load(), marker
    except UserError:
        raise
    except Exception as error:  # A damaged pickle can raise anything at all.
        raise UserError(f"{path}: its pickle is damaged ({type(error).__name__}: {error}); get it again") from error


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 0


def _tensor(storage, pid, offset, size, stride, *, where: str) -> np.ndarray:
    """Checks what the pickle says of a tensor and copies it out of its storage."""
    # ("storage", kind, key, device, numbers)
    known = type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and pid[1] in _STORAGES
    if not (known and type(pid[2]) is str and _is_count(pid[4])):
        raise UserError(f"{where} has no storage of a known kind but {pid!r}; known: {', '.join(_STORAGES)}")
    whole = storage(pid[1], pid[2], pid[4])
    shaped = type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    if not (shaped and all(map(_is_count, (offset, *size, *stride)))):
        raise UserError(f"{where} has offset {offset!r}, size {size!r} and stride {stride!r}, which is no tensor")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # The second: with steps of 0 a small file could become a huge array.
    if count and (last >= whole.size or count > whole.size):
        raise UserError(f"{where} of size {list(size)} reaches beyond its storage of {whole.size} numbers")
    if not count:
        return np.zeros(size, whole.dtype)
    strides = [step * whole.itemsize for step in stride]
    # It checks nothing itself; the bounds were checked above.
    return np.lib.stride_tricks.as_strided(whole[offset:], size, strides).copy()
