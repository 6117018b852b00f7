"""What a memory file holds, and what it must hold to be believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.rules.types import Kind

SIZES = ("num_layers", "num_kv_heads", "head_dim", "vocab_size")
SLOTS = ("kind", "segment", "index", "position")
# As safetensors calls them.
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Held:
    """What a memory file holds, in the form of today.

    Attributes:
      path: the file.
      header: what it says of itself (`save`).
      digest: of the file; empty for an older format.
      arrays: as `jax_ccm.memory.files` lists them.
    """

    path: Path
    header: dict[str, Any]
    digest: str
    arrays: dict[str, np.ndarray]

    @property
    def next_positions(self) -> np.ndarray:
        """``int [B]``, as `MemoryCache.next_position`."""
        return self.arrays["tokens"] - self.arrays.get("rebased", 0)

    @property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """Where the turns of a conversation lie, ``(first, end)`` of their chunks, as far as the file says."""
        said = self.header["about"].get("turns", [])

        def is_span(x):
            return isinstance(x, list) and len(x) == 2 and all(type(n) is int and n >= 0 for n in x)

        return tuple((x[0], x[1]) for x in said) if isinstance(said, list) and all(map(is_span, said)) else ()

    def of(self, number: int) -> slice:
        """Where the slots of a session lie."""
        ends = np.cumsum(self.arrays["live"])
        return slice(int(ends[number] - self.arrays["live"][number]), int(ends[number]))


def check_shapes(path, header: dict[str, Any], given: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises unless a header is whole, and the arrays have the names, shapes and types that it gives them."""

    def damaged(what):
        return UserError(f"{path} is damaged: it does not say {what}")

    def is_count(x):
        # A bool is an int to Python, and JSON has both.
        return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31

    model, method, names = (header.get(key) for key in ("model", "method", "fingerprints"))
    if not isinstance(model, dict) or not all(is_count(model.get(name)) for name in SIZES):
        raise damaged("which model it is for")
    if not isinstance(method, dict) or not isinstance(method.get("closes", []), list):
        raise damaged("which method wrote it")
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise damaged("what it belongs to")
    if not all(is_count(header.get(name)) for name in ("sessions", "memory_capacity", "raw_capacity")):
        raise damaged("how many sessions it holds, in which places")
    if not isinstance(header.get("about"), dict) or not isinstance(header.get("overflow"), str):
        raise damaged("what it is about")
    layers, heads, width, vocabulary = (model[name] for name in SIZES)
    batch = header["sessions"]
    kind = given.get("k", ((), "nothing"))[1]
    # The model's sizes are the header's; how many slots there are, the arrays say, all alike.
    count = given["kind"][0][0] if len(given.get("kind", ((),))[0]) == 1 else 0
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        name: ((layers, count, heads, width), kind) for name in ("k", "v")
    }
    expected |= {name: ((count,), "int32") for name in SLOTS}
    expected |= {name: ((batch,), "int32") for name in ("live", "tokens", "chunks")}
    expected["logits"] = (batch, vocabulary), "float32"
    if "rebased" in given:
        expected["rebased"] = (batch,), "int32"
    if "ids" in given:
        expected["ids"] = (count,), "int32"
    if "received" in given:
        expected["received"] = (layers, count, heads), "float32"
    if method.get("mix"):
        mixed = (layers, batch, mixed_slots(method), heads, width)
        expected |= {name: (mixed, "float32") for name in ("mixed_k", "mixed_v")}
    given = {name: (shape, {"I32": "int32"}.get(kind, kind)) for name, (shape, kind) in given.items()}

    def show(x):
        return "nothing" if x is None else f"{x[1]} {list(x[0])}"

    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) != expected.get(name) or given[name][1] not in (*TYPES.values(), "int32"):
            raise UserError(
                f"{path} is damaged: it holds {show(given.get(name))} as {name!r}, and its header has "
                f"{show(expected.get(name))}"
            )


def check_slots(held: Held) -> None:
    """Raises for slots that this library does not write."""
    a = held.arrays
    wrong = int(a["live"].sum()) != len(a["kind"]) or (a["live"] < 0).any() or (a["tokens"] < 0).any()
    wrong = wrong or not np.isin(a["kind"], [kind for kind in Kind if kind != Kind.PAD]).all()
    if "rebased" in a:
        wrong = wrong or (a["rebased"] < 0).any() or (a["rebased"] > a["tokens"]).any()
    if "ids" in a:
        wrong = wrong or (a["ids"] < 0).any() or (a["ids"] >= held.header["model"]["vocab_size"]).any()
    wrong = wrong or (a["chunks"] < 0).any() or any((a[name] < 0).any() for name in ("segment", "position"))
    # Indices may repeat: all slots of a chunk have that of its last token, and mixed ones that of the newest chunk.
    wrong = wrong or any((np.diff(a["index"][held.of(n)]) < 0).any() for n in range(len(a["live"])))
    if wrong:
        raise UserError(f"{held.path} is damaged: its slots are none that this library writes")
    for name, x in a.items():
        if x.dtype.kind != "i" and not np.isfinite(x.astype(np.float32)).all():
            raise UserError(f"{held.path} is damaged: it holds numbers that are not finite as {name!r}")


def mixed_slots(method: Mapping[str, Any]) -> int:
    """`Method.mixed_slots` of a described method."""
    if not method.get("mix"):
        return 0
    each = sum(token.get("kind") in method.get("writes", ()) for token in method["closes"] if isinstance(token, dict))
    groups = method.get("groups", 1)
    return each * (groups if type(groups) is int and groups > 0 else 1)
