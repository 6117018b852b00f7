"""Sessions in files: what a conversation remembers, to go on from later."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.memory.cache import check, init_cache
from jax_ccm.nn import ModelConfig, Transformer
from jax_ccm.records.parsing import parse_json
from jax_ccm.rules.describe import describe_method, label, upgraded
from jax_ccm.rules.types import Kind, MemoryCache, Method, Slots

FORMAT = "jax_ccm.memory/2"
# The format before, and what it lacks.
OLDER = "jax_ccm.memory/1"
# Arrays that a file calls otherwise.
IN_FILES = {"accumulated_attention": "received"}
NEW = ("mixed_k", "mixed_v", "spoiled")


def save(cache: MemoryCache, path: str | Path, *, fingerprint: str, method: Method) -> None:
    """Writes sessions to a safetensors file. One that was there stays until the new one is whole.

    Args:
      cache: the sessions; valid ones (`cache.check`).
      path: the file.
      fingerprint: names the base model and the adapter; `load` compares it.
      method: the method that wrote the memory.

    Raises:
      UserError: for sessions that are invalid, or spread over several processes, or a file that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.flax import save_file

    if not cache.k.is_fully_addressable:
        raise UserError("these sessions are spread over several processes; save them where one process holds them all")
    check(cache)
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "method": describe_method(method),
        "memory_capacity": cache.memory_capacity,
        "overflow": cache.overflow,
    }
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_arrays(cache), str(part), metadata={"jax_ccm": json.dumps(meta)})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be written: {e}") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def load(
    path: str | Path, model: Transformer | ModelConfig, *, fingerprint: str, method: Method, dtype=None
) -> MemoryCache:
    """Reads sessions that `save` wrote, spread over the mesh in use as `cache.init_cache` does.

    Args:
      path: the file.
      model: the decoder that will go on from them; its config serves where there are no weights.
      fingerprint: as for `save`.
      method: as for `save`.
      dtype: of keys and values; None for the model's own.

    Raises:
      UserError: if the file is not one of ours, or of another model, adapter or method, or does not hold what it says.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.flax import load_file

    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = parse_json((file.metadata() or {}).get("jax_ccm", "{}"), f"{path}: its metadata 'jax_ccm'")
        arrays = load_file(str(path))
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"{path} cannot be read as a memory file: {e}") from e
    if not isinstance(meta, dict) or meta.get("format") not in (FORMAT, OLDER):
        raise UserError(f"{path} is not a memory file of this library (expected format {FORMAT!r})")
    _require_kinship(path, meta, fingerprint, method)
    expected = _expected(path, meta, arrays, model, method, dtype)
    names = _arrays(expected)
    if meta["format"] == OLDER:
        _compare(path, arrays, {name: x for name, x in names.items() if name not in NEW})
        arrays |= _lacking(path, arrays, method)
    _compare(path, arrays, names)
    slots = Slots(*(arrays[f"slots.{f.name}"] for f in dataclasses.fields(Slots)))
    of_cache = {name: arrays.get(IN_FILES.get(name, name)) for name in vars(expected)}
    cache = dataclasses.replace(expected, slots=slots, **{name: x for name, x in of_cache.items() if x is not None})
    kinds = np.asarray(slots.kind)
    if not np.isin(kinds, list(Kind)).all() or (np.diff((kinds != Kind.PAD).astype(int), axis=1) > 0).any():
        raise UserError(f"{path} is damaged: its slots are none that this library writes")
    mesh = jax.sharding.get_mesh()
    return cache if mesh.empty else jax.device_put(cache, sharding.cache_shardings(mesh, cache))


def _require_kinship(path, meta: dict[str, Any], fingerprint: str, method: Method) -> None:
    """Raises for a file of another model, adapter or method."""
    if meta.get("fingerprint") != fingerprint:
        raise UserError(
            f"{path} was written with fingerprint {meta.get('fingerprint')!r}; this session uses {fingerprint!r}. Use "
            "the same base model and adapter"
        )
    here, there = describe_method(method), meta.get("method")
    if not isinstance(there, dict):
        raise UserError(f"{path} is damaged: it does not say which method wrote it")
    there = upgraded(there, str(path))
    if differ := sorted(key for key in here | there if here.get(key) != there.get(key)):
        raise UserError(
            f"{path} was written with method {label(there)}; this session uses {label(here)}. They differ in "
            f"{', '.join(differ)}. Use the same one"
        )


def _arrays(cache: MemoryCache) -> dict[str, Any]:
    """The arrays of a cache by the names that they have in a file."""
    slots = {f"slots.{f.name}": getattr(cache.slots, f.name) for f in dataclasses.fields(Slots)}
    rest = (f.name for f in dataclasses.fields(MemoryCache) if f.name not in ("slots", "memory_capacity", "overflow"))
    return {IN_FILES.get(name, name): x for name in rest if (x := getattr(cache, name)) is not None} | slots


def _expected(path, meta, arrays, model, method: Method, dtype) -> MemoryCache:
    """The abstract cache that `cache.init_cache` makes for so many sessions and places as the file has."""
    sizes = [arrays[name].shape for name in ("tokens", "slots.kind") if name in arrays]
    capacity = meta.get("memory_capacity")
    if [len(shape) for shape in sizes] != [1, 2] or not isinstance(capacity, int):
        raise UserError(f"{path} is damaged: it does not say how many sessions and places it holds")
    (batch,), (_, size) = sizes
    make = lambda: init_cache(
        model,
        method,
        batch,
        memory_capacity=capacity,
        raw_capacity=size - capacity - int(method.sink),
        dtype=dtype,
        overflow=meta.get("overflow"),
    )
    try:
        return jax.eval_shape(make)
    except UserError as e:
        raise UserError(f"{path} is damaged, or of another model: {e}") from e


def _compare(path, arrays: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises unless the arrays have the names, shapes and types of the expected ones."""
    show = lambda x: "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
    for name in sorted(arrays.keys() | expected.keys()):
        if (here := show(expected.get(name))) != (there := show(arrays.get(name))):
            raise UserError(
                f"{path} holds {there} as {name!r}; this model and method have {here}. Use the model, and the type, "
                "that wrote it; if they are the same, the file is damaged"
            )


def _lacking(path, arrays: dict[str, Any], method: Method) -> dict[str, Any]:
    """What files of the older format lack."""
    lacking: dict[str, Any] = {"spoiled": jnp.zeros(arrays["tokens"].shape, bool)}
    if not method.mixed_slots:
        return lacking
    warnings.warn(
        f"{path} is of an earlier version, which rounded mixed memory to {arrays['k'].dtype} after each chunk; it goes "
        "on from the rounded values",
        stacklevel=3,
    )
    # Memory stands in order in front of all but the sink.
    order = jnp.argsort(arrays["slots.kind"] != Kind.MEMORY, axis=1, stable=True)[:, : method.mixed_slots]
    is_memory = jnp.take_along_axis(arrays["slots.kind"], order, axis=1) == Kind.MEMORY
    take = lambda x: jnp.take_along_axis(x, order[None, :, :, None, None], axis=2)
    mixed = lambda x: jnp.where(is_memory[None, :, :, None, None], take(x).astype(jnp.float32), 0)
    return lacking | {"mixed_k": mixed(arrays["k"]), "mixed_v": mixed(arrays["v"])}
