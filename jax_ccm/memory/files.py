"""Sessions in files: what a conversation remembers, to go on from later, here or elsewhere.

A ``.ccm`` file is safetensors with a JSON header and a digest over every byte (`jax_ccm.records.sealed`). It holds the
live slots of its sessions, one behind the other, whatever the capacity of the cache that they were in, and they go on
in any cache that has room for them::

    k, v             [L, N, K, H]           keys as the cache holds them, N live slots of all sessions
    kind, segment, index, position  int32 [N]
    ids              int32 [N]              `MemoryCache.ids`, for methods that ask for it
    received         float32 [L, N, K]      `MemoryCache.accumulated_attention`, for methods that ask for it
    live             int32 [B]              how many of the slots are those of each session
    tokens, chunks   int32 [B]
    rebased          int32 [B]              `MemoryCache.rebased`; left out where nothing was moved
    logits           float32 [B, V]         pending
    mixed_k, mixed_v float32 [L, B, M, K, H]  for methods that mix
"""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ccm
from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.memory import earlier
from jax_ccm.memory.cache import check, init_cache
from jax_ccm.memory.held import SLOTS, TYPES, Held, check_shapes, check_slots
from jax_ccm.nn import ModelConfig, Transformer
from jax_ccm.records import sealed
from jax_ccm.rules.describe import completed, describe_method, label
from jax_ccm.rules.types import Kind, MemoryCache, Method, Slots

FORMAT = "jax_ccm.memory/3"
# Formats before: arrays of the whole cache, and no digest. The first rounded mixed memory to the type of the keys.
OLDER = ("jax_ccm.memory/1", "jax_ccm.memory/2")
NAME = "jax_ccm"
# What an older file calls base and adapter.
_MODEL = ("base", "adapter")


class Foreign(UserError):
    """A memory of another model, adapter, tokenizer, template or method."""


def save(
    cache: MemoryCache,
    path: str | Path,
    model: Transformer | ModelConfig,
    *,
    fingerprints: Mapping[str, str],
    method: Method,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Writes sessions to a file. One that was there stays until the new one is whole.

    Args:
      cache: the sessions; valid ones (`cache.check`).
      path: the file.
      model: the decoder that read them; of its config sizes and RoPE are written down.
      fingerprints: of all that a session can go on with only: "base", "adapter", and what else there is to tell apart;
        `load` compares each.
      method: the method that wrote the memory.
      about: JSON values for people and callers, which are not compared.

    Returns:
      The digest of the file.

    Raises:
      UserError: for sessions that are invalid, or spread over several processes, or a file that cannot be written.
    """
    if not cache.k.is_fully_addressable:
        raise UserError("these sessions are spread over several processes; save them where one process holds them all")
    check(cache)
    config = model if isinstance(model, ModelConfig) else model.config
    header = {
        "format": FORMAT,
        "version": jax_ccm.__version__,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fingerprints": dict(fingerprints),
        "method": describe_method(method),
        # max_position changes no number of a memory; it only decides when to warn.
        "model": {name: x for name, x in dataclasses.asdict(config).items() if name != "max_position"},
        "sessions": len(cache.tokens),
        "memory_capacity": cache.memory_capacity,
        # Sinks have slots of their own, as `init_cache` makes them.
        "raw_capacity": cache.k.shape[2] - cache.memory_capacity - int(method.sink),
        "overflow": cache.overflow,
        "about": dict(about or {}),
    }
    return sealed.write(path, _packed(cache), header, NAME)


def write(held: Held, path: str | Path) -> str:
    """Writes what was read from files; as `save`."""
    header = held.header | {
        "format": FORMAT,
        "version": jax_ccm.__version__,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return sealed.write(path, {name: np.ascontiguousarray(x) for name, x in held.arrays.items()}, header, NAME)


def read(path: str | Path) -> Held:
    """What a file holds, for any model: nothing in it is believed before it is checked.

    Raises:
      UserError: if it cannot be read, is no memory file, or is not what was written.
    """
    file = sealed.Sealed(path, NAME)
    form = file.header.get("format")
    if form not in (FORMAT, *OLDER):
        raise UserError(f"{path} is not a memory file of this library (expected format {FORMAT!r})")
    if form == FORMAT and not file.digest:
        raise UserError(f"{path} is damaged: it has no digest")
    if form in OLDER:
        header, arrays = earlier.upgraded(path, file.header, file.shapes, file.arrays)
        if form == OLDER[0] and "mixed_k" in arrays:
            warnings.warn(
                f"{path} is of an earlier version, which rounded mixed memory to {arrays['k'].dtype} after each chunk; "
                "it goes on from the rounded values",
                stacklevel=3,
            )
        else:
            warnings.warn(
                f"{path} is of an earlier version ({form}), without a digest: damage would go unseen. Save it again",
                stacklevel=3,
            )
        return checked(path, header, arrays)
    # The header first, against names, shapes and types: what it promises is not read before it makes sense.
    check_shapes(path, file.header, {name: (shape, TYPES.get(t, t)) for name, (shape, t) in file.shapes.items()})
    held = Held(Path(path), file.header, file.digest, file.arrays())
    check_slots(held)
    return held


def checked(path: str | Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Held:
    """What another file holds of a memory, without a digest of its own.

    Raises:
      UserError: unless it is whole, and what this library writes.
    """
    check_shapes(path, header, {name: (x.shape, str(x.dtype)) for name, x in arrays.items()})
    held = Held(Path(path), header, "", arrays)
    check_slots(held)
    return held


def load(
    file: str | Path | Held,
    model: Transformer | ModelConfig,
    *,
    fingerprints: Mapping[str, str],
    method: Method,
    memory_capacity: int | None = None,
    raw_capacity: int | None = None,
    overflow: Any = None,
    dtype=None,
) -> MemoryCache:
    """Sessions that `save` wrote, spread over the mesh in use as `cache.init_cache` does.

    Args:
      file: the file, or what `read` made of it.
      model: the decoder that will go on from them; its config serves where there are no weights.
      fingerprints: as for `save`.
      method: as for `save`.
      memory_capacity, raw_capacity, overflow: of the cache, as for `init_cache`; None for those of the file.
      dtype: of keys and values; None for the model's own.

    Raises:
      Foreign: if the file is of another model, adapter or method.
      UserError: if it is not one of ours, does not hold what it says, or holds more than there is room for.
    """
    held = file if isinstance(file, Held) else read(file)
    path, header, arrays = held.path, held.header, held.arrays
    _require_kinship(held, fingerprints, method)

    def choose(given, name):
        return header[name] if given is None else given

    def make():
        return init_cache(
            model,
            method,
            header["sessions"],
            memory_capacity=choose(memory_capacity, "memory_capacity"),
            raw_capacity=choose(raw_capacity, "raw_capacity"),
            dtype=dtype,
            overflow=choose(overflow, "overflow"),
        )

    # Shapes alone: whether all fits is known before anything is allocated.
    try:
        expected = jax.eval_shape(make)
    except UserError as e:
        raise UserError(f"{path} does not fit: {e}") from e
    _require_same(path, arrays, expected)
    size, is_memory = expected.k.shape[2], arrays["kind"] == Kind.MEMORY
    for number in range(header["sessions"]):
        # As `cache.append` and `writing.closed` count room: memory apart, everything else together.
        memory, live = int(is_memory[held.of(number)].sum()), int(arrays["live"][number])
        if memory > expected.memory_capacity or live - memory > size - expected.memory_capacity:
            raise UserError(
                f"{path} holds {memory} slots of memory and {live - memory} of other text; here is room for "
                f"memory_capacity={expected.memory_capacity} and {size - expected.memory_capacity}. Make the cache "
                "larger"
            )
    cache = dataclasses.replace(expected, **_unpacked(arrays, size, expected))
    mesh = jax.sharding.get_mesh()
    return cache if mesh.empty else jax.device_put(cache, sharding.cache_shardings(mesh, cache))


def _packed(cache: MemoryCache) -> dict[str, np.ndarray]:
    """The arrays of a file."""
    live = np.asarray(cache.slots.live)
    count = live.sum(axis=1).astype(np.int32)

    def take(x):
        whole = np.asarray(x)  # cut on the host: on a device each number of slots would be a program of its own
        return np.concatenate([whole[:, row, :n] for row, n in enumerate(count)], axis=1)

    found = {"k": take(cache.k), "v": take(cache.v), "live": count}
    found |= {name: np.asarray(getattr(cache.slots, name))[live] for name in SLOTS}
    found |= {name: np.asarray(getattr(cache, name)) for name in ("tokens", "chunks", "logits")}
    if np.any(cache.rebased):
        found["rebased"] = np.asarray(cache.rebased)
    if cache.ids is not None:
        found["ids"] = np.asarray(cache.ids)[live]
    if cache.accumulated_attention is not None:
        found["received"] = take(cache.accumulated_attention)
    if cache.mixed_k is not None and cache.mixed_v is not None:
        found |= {"mixed_k": np.asarray(cache.mixed_k), "mixed_v": np.asarray(cache.mixed_v)}
    # A view of other memory order would be written as it lies there.
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


def _unpacked(arrays: Mapping[str, np.ndarray], size: int, expected: MemoryCache) -> dict[str, Any]:
    """The arrays of a cache of so many places, by its fields; what is not live is zero."""
    live = np.arange(size) < arrays["live"][:, None]

    def spread(x, front: int):
        whole = np.zeros((*x.shape[:front], *live.shape, *x.shape[front + 1 :]), x.dtype)
        whole[(slice(None),) * front + (live,)] = x
        return jnp.asarray(whole)

    found: dict[str, Any] = {name: spread(arrays[name], 1) for name in ("k", "v")}
    if "ids" in arrays:
        found["ids"] = spread(arrays["ids"], 0)
    if "received" in arrays:
        found["accumulated_attention"] = spread(arrays["received"], 1)
    found["slots"] = Slots(*(spread(arrays[name], 0) for name in SLOTS))
    rest = ("tokens", "rebased", "chunks", "logits", "mixed_k", "mixed_v")
    zeros = {
        name: jnp.zeros(x.shape, x.dtype) for name in ("rebased", "lost", "spoiled") for x in [getattr(expected, name)]
    }
    return zeros | found | {name: jnp.asarray(arrays[name]) for name in rest if name in arrays}


def _require_kinship(held: Held, fingerprints: Mapping[str, str], method: Method) -> None:
    """Raises for a file of another model, adapter or method."""
    stored, older = held.header["fingerprints"], "model" in held.header["fingerprints"]
    ours = dict(fingerprints)
    if older:  # one name for base and adapter
        ours = {"model": "-".join(ours[name] for name in _MODEL if name in ours)}
    differ = [name for name in sorted(ours.keys() | stored.keys()) if ours.get(name) != stored.get(name)]
    if differ:

        def show(names):
            return ", ".join(f"{name} {names.get(name)!r}" for name in differ)

        raise Foreign(
            f"{held.path} was written with {show(stored)}; this session uses {show(ours)} (fingerprints). Use the same "
            "base model, adapter, tokenizer and template"
        )
    # Fields that the file does not have yet count as defaults: an older file goes on where nothing else changed.
    here, there = describe_method(method), completed(held.header["method"])
    if differ := sorted(key for key in here | there if here.get(key) != there.get(key)):
        raise Foreign(
            f"{held.path} was written with method {called(there)}; this session uses {label(here)}. They differ in "
            f"{', '.join(differ)}. Use the same one"
        )


def called(method: Mapping[str, Any]) -> str:
    """`describe.label` of a method out of a file, which may be anything."""
    try:
        return label(dict(method))
    except (AttributeError, KeyError, TypeError):
        return repr(method.get("name"))


def _require_same(path, arrays: Mapping[str, np.ndarray], expected: MemoryCache) -> None:
    """Raises unless the arrays have the sizes and types that this model and method have."""
    layers, batch, _, heads, width = expected.k.shape
    count = len(arrays["kind"])
    here = {name: (expected.k.dtype, [layers, count, heads, width]) for name in ("k", "v")}
    here["logits"] = expected.logits.dtype, list(expected.logits.shape)
    if (x := expected.ids) is not None:
        here["ids"] = x.dtype, [count]
    if (x := expected.accumulated_attention) is not None:
        here["received"] = x.dtype, [layers, count, heads]
    for name in ("mixed_k", "mixed_v"):
        if (x := getattr(expected, name)) is not None:
            here[name] = x.dtype, list(x.shape)
    # Beside what is wanted here, what only some methods have: it must not be there for another.
    also = (*here, "ids", "received", "mixed_k")
    there = {name: (x.dtype, list(x.shape)) for name, x in arrays.items() if name in also}

    def show(x):
        return "nothing" if x is None else f"{x[0]} {x[1]}"

    for name in sorted(here.keys() | there.keys()):
        if show(here.get(name)) != show(there.get(name)):
            raise UserError(
                f"{path} holds {show(there.get(name))} as {name!r}; this model and method have {show(here.get(name))}. "
                "Use the model, and the type, that wrote it"
            )
