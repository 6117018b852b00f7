"""Memory files of earlier versions, in the form of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.memory.held import SIZES, SLOTS, mixed_slots
from jax_ccm.methods.stored import described
from jax_ccm.rules.types import Kind


def upgraded(path, header: dict[str, Any], shapes, arrays) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of an older file in the form of today. ``arrays()`` reads them once their sizes make sense."""

    def shape(name, rank):
        return shapes[name][0] if len(shapes.get(name, ((),))[0]) == rank else None

    sizes, vocabulary, capacity = shape("k", 5), shape("logits", 2), header.get("memory_capacity")
    slots = [f"slots.{name}" for name in SLOTS]
    if not sizes or not vocabulary or type(capacity) is not int or not 0 <= capacity <= sizes[2]:
        raise UserError(f"{path} is damaged: it does not say how many sessions and slots it holds")
    layers, batch, size, heads, width = sizes
    rows = dict.fromkeys(slots, (batch, size)) | {"tokens": (batch,), "chunks": (batch,), "v": sizes}
    method = header.get("method")
    for name, wanted in rows.items():
        if shapes.get(name, (None,))[0] != wanted:
            raise UserError(f"{path} is damaged: {name!r} is not of the sizes of the rest")
    method = described(method, str(path))
    old = arrays()
    live = old["slots.kind"] != Kind.PAD
    # Live slots stand in front; one behind a free place was not written by this library.
    if (np.diff(live.astype(int), axis=1) > 0).any():
        raise UserError(f"{path} is damaged: its slots are none that this library writes")

    def packed(x):
        return x[:, live]

    found = {"k": packed(old["k"]), "v": packed(old["v"]), "live": live.sum(axis=1).astype(np.int32)}
    found |= {name: old[f"slots.{name}"][live] for name in SLOTS}
    found |= {name: old[name] for name in ("tokens", "chunks", "logits")}
    if "received" in old:
        found["received"] = packed(old["received"])
    if (old.get("lost", np.zeros(1)) != 0).any() or old.get("spoiled", np.zeros(1, bool)).any():
        # Files of today hold valid sessions alone, and say nothing of others.
        raise UserError(f"{path} holds sessions that are invalid")
    if count := mixed_slots(method):
        found |= {name: old[name] for name in ("mixed_k", "mixed_v") if name in old} or _rounded(old, count)
    renewed = {
        "format": header["format"],
        "fingerprints": {"model": str(header.get("fingerprint"))},
        "method": method,
        "model": dict(zip(SIZES, (layers, heads, width, vocabulary[1]), strict=True)),
        "sessions": batch,
        "memory_capacity": capacity,
        "raw_capacity": size - capacity - int(method.get("sink") or 0),
        "overflow": header.get("overflow"),
        "about": {},
    }
    return renewed, found


def _rounded(old: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Mixed memory as the first format had it: the keys and values themselves."""
    # Memory stands in order in front of all but the sink.
    order = np.argsort(old["slots.kind"] != Kind.MEMORY, axis=1, kind="stable")[:, :count]
    is_memory = np.take_along_axis(old["slots.kind"], order, axis=1) == Kind.MEMORY

    def take(x):
        return np.take_along_axis(x, order[None, :, :, None, None], axis=2)

    def mixed(x):
        return np.where(is_memory[None, :, :, None, None], take(x).astype(np.float32), np.float32(0))

    return {"mixed_k": mixed(old["k"]), "mixed_v": mixed(old["v"])}
