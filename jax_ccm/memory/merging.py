"""Two memories made one: what the second conversation told, as if it had been told after the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.memory.files import called
from jax_ccm.memory.held import Held
from jax_ccm.nn import ModelConfig, RopeScaling, rope
from jax_ccm.rules.types import Kind

_PAIRS = ("sessions", "method", "model", "fingerprints", "overflow")


def merge(first: Held, second: Held) -> Held:
    """The memory of both conversations, the second behind the first.

    Appended slots are renumbered, and their keys rotated on by the length of the first: where chunks are independent of
    each other the result is what reading one conversation after the other gives. Means are weighted by their numbers of
    chunks. In other mixtures, and in selections, what was read last counts by when it was read: they are refused.

    Args:
      first: of any number of sessions.
      second: of as many, of the same model, adapter and method.

    Returns:
      What `files.write` writes; the pending logits are those of the second.

    Raises:
      UserError: for memories that do not go together, whose text is still open, or of a method that has no merging.
    """
    where = f"{first.path} and {second.path}"
    for name in _PAIRS:
        if first.header[name] != second.header[name]:
            raise UserError(f"{where} differ in {name}; only memories of one model, adapter and method can be merged")
    method = first.header["method"]
    reason = (
        "selects what it keeps" if method.get("eviction")
        else "pools text" if method.get("pool")
        else "writes no memory" if not method["closes"]
        else "compresses a whole context at once" if method.get("context") != "chunks"
        else "enters chunks into several means in turn" if method.get("groups", 1) > 1
        else "weighs chunks by when they were read" if method.get("mix") and method["mix"].get("kind") != "Mean"
        else ""
    )  # fmt: skip
    if reason:
        raise UserError(f"{where} cannot be merged: method {called(method)} {reason}")
    for held in (first, second):
        if not np.isin(held.arrays["kind"], (Kind.MEMORY, Kind.SINK)).all():
            raise UserError(_still_text(held))
    _require_one_system(first, second)
    turn = turner(model_config(first), method)
    rows = [_merged_row(first, second, row, turn) for row in range(first.header["sessions"])]
    a, b = first.arrays, second.arrays
    arrays = {name: np.concatenate([row[name] for row in rows], axis=1) for name in ("k", "v")}
    arrays |= {name: np.concatenate([row[name] for row in rows]) for name in ("kind", "segment", "index", "position")}
    counts = ("tokens", "chunks", *({"rebased"} & (a.keys() | b.keys())))
    none = np.zeros_like(a["tokens"])
    arrays |= {name: a.get(name, none) + b.get(name, none) for name in counts}
    arrays |= {"live": np.array([len(row["kind"]) for row in rows], np.int32), "logits": b["logits"]}
    if "mixed_k" in a:
        arrays |= {name: np.stack([row[name] for row in rows], axis=1) for name in ("mixed_k", "mixed_v")}
    # Turns are written down for a single session only.
    offset = int(a["chunks"][0])
    turns = [*first.turns, *((start + offset, end + offset) for start, end in second.turns)]
    about = first.header["about"] | ({"turns": [list(turn) for turn in turns]} if len(rows) == 1 else {})
    memory = max((int((row["kind"] == Kind.MEMORY).sum()) for row in rows), default=0)
    header = first.header | {
        "about": about | {"merged": [first.digest, second.digest]},
        # With room for all that was merged.
        "memory_capacity": max(first.header["memory_capacity"], second.header["memory_capacity"], memory),
    }
    return Held(first.path, header, "", arrays)


def _require_one_system(first: Held, second: Held) -> None:
    """Refuses to lose a system message: of the second memory only one that the first begins with, too."""
    for row in range(first.header["sessions"]):
        sinks = []
        for held in (first, second):
            at = held.of(row)
            values = held.arrays["v"][:, at].astype(np.float32)
            sinks.append(values[:, held.arrays["kind"][at] == Kind.SINK])
        ours, theirs = sinks
        if theirs.shape[1] <= int(first.header["method"].get("sink") or 0):
            continue
        # The same tokens, perhaps read in pieces of another length.
        if ours.shape != theirs.shape or np.abs(ours - theirs).mean() > 0.01 * np.abs(theirs).mean():
            raise UserError(
                f"{second.path} begins with a system message that {first.path} does not begin with, and a merged "
                "memory has one. Merge memories that begin alike, or read the second conversation behind the "
                "first: load that, then `tell` or `read` (`Conversations`)"
            )


def _still_text(held: Held) -> str:
    """What is to be done about text in a memory that was to be merged."""
    kind, chunks = held.arrays["kind"], held.arrays["chunks"]
    is_text = ~np.isin(kind, (Kind.MEMORY, Kind.SINK))
    of = np.repeat(np.arange(len(chunks)), held.arrays["live"])
    # Open text is of the segment that is not closed yet.
    is_open = is_text & (held.arrays["segment"] >= chunks[of])
    text = f"{held.path} holds {int(is_text.sum())} tokens as text, "
    if not held.header["method"]["closes"] or not is_open.any():
        recent, name = held.header["method"].get("recent"), called(held.header["method"])
        which = "for good" if not recent else "until the next is closed" if recent == 1 else f"for {recent} chunks"
        return (
            f"{text}which its method, {name}, keeps {which}, and only memory can be merged. Read the second "
            "conversation behind the first instead: load that, then `tell` or `read` (`Conversations`)"
        )
    return (
        f"{text}of which {int(is_open.sum())} are of a chunk that is still open, and only memory can be merged. Load "
        "it, close the chunk (`jax_ccm.compress`; `Conversations` closes each turn by itself), and save it again"
    )


def _merged_row(first: Held, second: Held, row: int, turn) -> dict[str, np.ndarray]:
    """One session of both: its live slots, in order."""
    here, there = first.of(row), second.of(row)
    there = np.arange(there.start, there.stop)[second.arrays["kind"][there] == Kind.MEMORY]  # one sink is enough
    a, b = first.arrays, second.arrays
    ended, chunks = int(first.next_positions[row]), int(a["chunks"][row])
    # RoPE turns by sums: a key of position p, turned on by where the first ended, is one of position p + ended.
    k = turn(b["k"][:, there], ended)
    # By how much the second is later: in segment by chunks, in index and position by text tokens.
    shifted = {"kind": 0, "segment": chunks, "index": ended, "position": ended}
    slots = {name: (b[name][there] + by).astype(np.int32) for name, by in shifted.items()}
    if "mixed_k" not in a:
        old = {name: a[name][here] for name in shifted}
        return {
            "k": np.concatenate([a["k"][:, here], k], axis=1),
            "v": np.concatenate([a["v"][:, here], b["v"][:, there]], axis=1),
            **{name: np.concatenate([old[name], slots[name]]) for name in shifted},
        }
    # One mean over all chunks; the slots are those of the newest.
    if not len(there):
        return {name: a[name][:, here] for name in ("k", "v")} | {name: a[name][here] for name in shifted} | {
            name: a[name][:, row] for name in ("mixed_k", "mixed_v")
        }  # fmt: skip
    # A mean over all chunks is the mean of both means, each weighted by its number of chunks. A turned mean is the mean
    # of turned keys.
    share = b["chunks"][row] / (chunks + b["chunks"][row])
    mean = {
        "mixed_k": (1 - share) * a["mixed_k"][:, row] + share * turn(b["mixed_k"][:, row], ended),
        "mixed_v": (1 - share) * a["mixed_v"][:, row] + share * b["mixed_v"][:, row],
    }
    mean = {name: x.astype(np.float32) for name, x in mean.items()}
    # The sink stands in front; the slots behind it are the new mean, rounded to the type of the cache.
    sink = np.arange(here.start, here.stop)[a["kind"][here] != Kind.MEMORY]
    return {
        "k": np.concatenate([a["k"][:, sink], mean["mixed_k"][:, : len(there)].astype(k.dtype)], axis=1),
        "v": np.concatenate([a["v"][:, sink], mean["mixed_v"][:, : len(there)].astype(k.dtype)], axis=1),
        **{name: np.concatenate([a[name][sink], slots[name]]) for name in shifted},
        **mean,
    }


def turner(config: ModelConfig, method: Mapping[str, Any]):
    """What turns keys ``[L, N, K, H]`` on by so many positions; each layer by its own frequencies."""
    if method.get("rope") == "cache":  # keys are rotated when they are read
        return lambda keys, by: keys
    # In float64: an angle of thousands of positions is rounded only in its cosine and sine.
    kinds = [rope.frequencies(config.as_seen(kind)).astype(np.float64) for kind in config.windowed]

    def turn(keys, by: int):
        rotated = []
        for layer, kind in zip(keys, kinds, strict=True):
            angles = np.broadcast_to(by * kind, (1, len(layer), len(kind)))
            # Without the attention factor of the model's scaling, which the keys have already.
            rotated.append(rope.rotate(layer[None], *(f(angles).astype(np.float32) for f in (np.cos, np.sin))))
        return np.concatenate([np.asarray(x) for x in rotated])

    return turn


def model_config(held: Held) -> ModelConfig:
    """The model's config as a file has it.

    Raises:
      UserError: for an older file, which has only sizes.
    """
    given: dict[str, Any] = dict(held.header["model"])
    try:
        if isinstance(given.get("rope_scaling"), dict):
            given["rope_scaling"] = RopeScaling(**_tupled(given["rope_scaling"]))
        config = ModelConfig(**_tupled(given))
        if "rope_theta" not in given:
            raise TypeError
        return config
    except (TypeError, ValueError):
        raise UserError(
            f"{held.path} does not say how its keys are rotated (an older version wrote it); load it and save it again"
        ) from None


def _tupled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass from JSON, where a tuple is a list."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
