"""Weights in safetensors: read tensor by tensor, or a slice of one, and written in Hugging Face layout."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jax_ccm.distributed.sharding import path_of
from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, Transformer
from jax_ccm.records import output
from jax_ccm.records.parsing import parse_json, read_json
from jax_ccm.weights import hf_config

Index = tuple[slice, ...]
_READABLE = ("F32", "BF16", "F16", "F64")
# Projections that some families (`hf_config.FUSED`) keep as the rows of one, in this order.
FUSED_ROWS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Tensors(Protocol):
    """Named tensors in files, under Hugging Face's names and in its layout (kernels ``[out, in]``).

    Attributes:
      shapes: shape of each tensor.
    """

    shapes: dict[str, tuple[int, ...]]

    def describe(self, name: str) -> str:
        """The tensor for an error message: its name in the file."""
        ...

    def file(self, name: str) -> Path:
        """The file that holds it, or would."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of it, of any floating dtype."""
        ...


class Safetensors:
    """A folder with ``model.safetensors``, or with shards and ``model.safetensors.index.json``."""

    def __init__(self, folder: Path):
        """Opens every file and reads its header.

        Raises:
          UserError: if a file is missing, truncated or not safetensors.
        """
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._handles = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        # A whole file counts before an index, as for transformers.
        weight_map = {} if single.is_file() or not index.is_file() else _read_index(index)
        for path in sorted({folder / file for file in weight_map.values()}) or [single]:
            handle = _open(path)
            self._handles[path] = handle
            for name in handle.keys():
                self._files[name] = path
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
        for name, file in weight_map.items():
            if self._files.get(name) != folder / file:
                raise UserError(f"{index} says that tensor {name!r} is in {file!r}, but it is not there")

    def describe(self, name: str) -> str:
        return repr(name)

    def file(self, name: str) -> Path:
        return self._files.get(name, self._folder)

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._handles[self._files[name]].get_slice(name)
        if tensor.get_dtype() not in _READABLE:
            given, allowed = tensor.get_dtype(), ", ".join(_READABLE)
            raise UserError(f"tensor {name!r} in {self._files[name]} is of type {given}; readable: {allowed}")
        return tensor[index]


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of safetensors files (JSON with a 'weight_map'): {error!r}") from error


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        other = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.safetensors") for p in path.parent.glob(pattern)]
        found = f"; found {', '.join(sorted(other)[:5])}" if other else ""
        raise UserError(
            f"there is no weight file {path}{found}. Weights are read from model.safetensors, or from the shards named "
            "in model.safetensors.index.json (a PyTorch .bin is not read: save the model with safe_serialization=True)"
        )
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {_damage(path) or error}; get it again") from error


def _damage(path: Path) -> str | None:
    """What is wrong with a file that safetensors refused, if it is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        # 8 bytes with the length of the header, the header in JSON, the tensors; offsets count from the end of the
        # header.
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            return f"it ends within its header, after {size} bytes"
        try:
            entries = parse_json(file.read(length), str(path))
            entries.pop("__metadata__", None)
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in entries.items()}
        except (UserError, KeyError, TypeError, AttributeError):
            return None
    lost = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size]
    if not lost:
        return None
    return f"it has {size} bytes of {max(ends.values())}; tensor {lost[0]!r} is the first of {len(lost)} cut off"


def hf_name(path: str) -> str:
    """Hugging Face's name of a parameter of the base model; ``{layer}`` stands for the layer of a stacked one.

    >>> hf_name("layers.self_attn.q_proj.kernel")
    'model.layers.{layer}.self_attn.q_proj.weight'
    """
    stem, leaf = path.rsplit(".", 1)
    stem = stem.replace("layers.", "layers.{layer}.", 1)
    prefix = "" if stem == "lm_head" else "model."
    return f"{prefix}{stem}.{'bias' if leaf == 'bias' else 'weight'}"


def split(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors with a name of its own for each projection, also where the file fuses several (`FUSED_ROWS`)."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    rows = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    rows |= dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
    parts = {}
    for name, shape in tensors.shapes.items():
        part = name.split(".")[-2] if "." in name else ""
        sizes = [rows[each] for each in FUSED_ROWS.get(part, ())]
        # One of another size is left as it is, and refused by its name when the model is checked.
        if sizes and shape[0] == sum(sizes):
            first = 0
            for each, size in zip(FUSED_ROWS[part], sizes, strict=True):
                parts[name.replace(part, each)] = (name, first, size)
                first += size
    return _Split(tensors, parts) if parts else tensors


class _Split:
    """`Tensors`, some of which are rows of others: by name, which, from where and how many."""

    def __init__(self, tensors: Tensors, parts: dict[str, tuple[str, int, int]]):
        whole = {name for name, _, _ in parts.values()}
        self._tensors, self._parts = tensors, parts
        self.shapes = {name: shape for name, shape in tensors.shapes.items() if name not in whole}
        self.shapes |= {name: (size, *tensors.shapes[of][1:]) for name, (of, _, size) in parts.items()}

    def _of(self, name: str) -> str:
        return self._parts[name][0] if name in self._parts else name

    def describe(self, name: str) -> str:
        return self._tensors.describe(self._of(name))

    def file(self, name: str) -> Path:
        return self._tensors.file(self._of(name))

    def read(self, name: str, index: Index) -> np.ndarray:
        if name not in self._parts:
            return self._tensors.read(name, index)
        of, first, size = self._parts[name]
        start, stop, _ = index[0].indices(size)
        return self._tensors.read(of, (slice(first + start, first + stop), *index[1:]))


def base_parameters(model: Transformer) -> dict[str, Any]:
    """The leaves of the base model by path, such as "layers.self_attn.q_proj.kernel", without the adapter's."""
    return {path: leaf for path, leaf in parameters(model).items() if not is_adapter(path)}


def parameters(tree) -> dict[str, Any]:
    """All leaves of a model, a state of it, or a pure dict of the same structure, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(keys): leaf for keys, leaf in leaves}


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to the adapter."""
    return path.rsplit(".", 1)[1] in ("lora_a", "lora_b", "comp")


def save_hf(model: Transformer, folder: str | Path, *, max_file_bytes: int = 5_000_000_000) -> Path:
    """Writes the base model in Hugging Face layout: ``config.json`` and safetensors, sharded if large.

    The adapter is not written. Only one stacked parameter and one file are in host memory at a time.

    Args:
      model: the model; weights keep their dtype.
      folder: made if needed; must not hold a model already.
      max_file_bytes: a file is closed before it grows beyond this.

    Returns:
      The folder.

    Raises:
      UserError: if the folder holds a model, or the family's ``config.json`` cannot express this one.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    folder = Path(folder)
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} already holds a model; give an empty or new folder")
    params = base_parameters(model)
    # All base weights are of one type (`Precision.params`).
    dtype = next(iter(params.values())).dtype
    # Before anything is written: it refuses what the format cannot say.
    config = hf_config.to_dict(model.config, dtype.name)
    groups = _groups(params, fused=model.config.family in hf_config.FUSED)
    shards = split_state_dict_into_shards_factory(
        {name: size for path, leaves in groups.items() for name, size in _sizes(path, leaves).items()},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(groups)
    for file, names in shards.filename_to_tensors.items():
        # transformers refuses a file that does not name its framework.
        save_file(dict(next(tensors) for _ in names), folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        output.write_json(folder / "model.safetensors.index.json", index)
    # Last: a folder without it is not taken for a model.
    output.write_json(folder / "config.json", config)
    return folder


def _groups(params: dict[str, Any], fused: bool) -> dict[str, list[Any]]:
    """Parameters by the path that `hf_name` takes: one each, or those that are rows of one tensor."""
    groups: dict[str, list[Any]] = {}
    for path in params:
        stem, leaf = path.rsplit(".", 1)
        before, _, part = stem.rpartition(".")
        whole = next((name for name, parts in FUSED_ROWS.items() if part in parts), None) if fused else None
        if whole is None:
            groups[path] = [params[path]]
        else:
            groups[f"{before}.{whole}.{leaf}"] = [params[f"{before}.{each}.{leaf}"] for each in FUSED_ROWS[whole]]
    # Large ones first: what fills a file of its own would else be planned in the middle of another one.
    return dict(sorted(groups.items(), key=lambda group: -max(_sizes(*group).values())))


def _sizes(path: str, leaves: list[Any]) -> dict[str, int]:
    """Bytes of the tensors that a group becomes, by name."""
    layers = leaves[0].shape[0] if path.startswith("layers.") else 1
    size = sum(leaf.nbytes for leaf in leaves) // layers
    return {hf_name(path).format(layer=layer): size for layer in range(layers)}


def _tensors(groups: dict[str, list[Any]]) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaves in groups.items():
        # Outputs are the last axis here, rows in the file.
        host = np.concatenate([np.asarray(leaf) for leaf in leaves], axis=-1)
        for layer, tensor in enumerate(host if path.startswith("layers.") else host[None]):
            # [in, out] -> [out, in]
            tensor = tensor.T if path.endswith(".kernel") else tensor
            # safetensors writes the buffer of an array as it lies in memory, transposed or not.
            yield hf_name(path).format(layer=layer), np.ascontiguousarray(tensor)
