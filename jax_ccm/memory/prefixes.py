"""Memories as prefixes for PyTorch: what ``transformers`` takes as ``past_key_values``, and back.

A prefix is one safetensors file with a JSON header and a digest (`jax_ccm.records.sealed`). It holds the live slots of
one session as a ``transformers.DynamicCache`` has them, and beside them all that makes a memory of them again::

    keys.0, values.0, keys.1, ...  [1, K, N, H]  of each layer
    memory.NAME                    as `jax_ccm.memory.files` has it, for everything but keys and values

``generate`` counts positions from the length of its cache, N, and a conversation goes on at the number of tokens that
it has read. RoPE knows differences of positions only, so all keys are rotated by the one constant between the two.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.memory.held import Held
from jax_ccm.memory.merging import model_config, turner
from jax_ccm.records import sealed
from jax_ccm.rules.types import Kind

FORMAT = "jax_ccm.prefix/1"
_OTHER = "memory."
# Of which ``transformers`` chooses the frequencies by the length of the text.
_BY_LENGTH = ("dynamic", "longrope")


def is_prefix(path: str | Path) -> bool:
    """Whether a file says of itself that it is a prefix."""
    return Path(path).is_file() and sealed.Sealed(path, files.NAME).header.get("format") == FORMAT


def write(held: Held, path: str | Path) -> str:
    """Writes the memory of a session as a prefix.

    Args:
      held: a memory of one session (`files.read`).
      path: the file. One that was there stays until the new one is whole.

    Returns:
      The digest of the file.

    Raises:
      UserError: if the base, going on from such a cache, would not see what the conversation sees: for a method or
        model with a window or a memory that is read in another way, and for a memory with nothing in it; or if the file
        cannot be written.
    """
    _require_plain(held)
    arrays, method = held.arrays, held.header["method"]
    by = _distance(held)
    k = turner(model_config(held), method)(arrays["k"], by)

    def heads_first(x):
        # [N, K, H] -> [1, K, N, H], as `DynamicCache` has it.
        return np.ascontiguousarray(x.transpose(1, 0, 2)[None])

    # All that is no key or value goes along unchanged, so that the way back loses nothing but rounding.
    found = {_OTHER + name: x for name, x in arrays.items() if name not in ("k", "v")}
    for layer in range(len(k)):
        found |= {f"keys.{layer}": heads_first(k[layer]), f"values.{layer}": heads_first(arrays["v"][layer])}
    header = {"format": FORMAT, "turned": by, "runs": runs(held), "memory": held.header | {"digest": held.digest}}
    return sealed.write(path, {name: np.ascontiguousarray(x) for name, x in found.items()}, header, files.NAME)


def read(path: str | Path) -> Held:
    """The memory that `write` made a prefix of, for `files.write` or `files.load`.

    Keys were rotated and are rotated back: each time they are rounded to their type.

    Raises:
      UserError: if the file cannot be read, is no prefix, or is not what was written.
    """
    file = sealed.Sealed(path, files.NAME)
    memory = file.header.get("memory")
    if file.header.get("format") != FORMAT or not isinstance(memory, dict):
        raise UserError(f"{path} is not a prefix of this library (expected format {FORMAT!r})")
    if not file.digest:
        raise UserError(
            f"{path} has no digest: what was saved again elsewhere does not say which conversation it belongs to. Give "
            "the file that jax_ccm.convert wrote"
        )
    given = file.arrays()
    try:
        layers = range(memory["model"]["num_layers"])

        def whole(name):
            return np.stack([given[f"{name}.{layer}"][0].transpose(1, 0, 2) for layer in layers])

        arrays = {"k": whole("keys"), "v": whole("values")}
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: it does not hold the keys and values of each layer") from None
    arrays |= {name.removeprefix(_OTHER): x for name, x in given.items() if name.startswith(_OTHER)}
    held = files.checked(path, memory, arrays)
    # The distance follows from the arrays; a header that says another belongs to other keys.
    turned, by = file.header.get("turned"), _distance(held)
    if turned != by:
        raise UserError(f"{path} is damaged: its keys are rotated by {turned!r} positions, not {by}")
    arrays["k"] = turner(model_config(held), held.header["method"])(arrays["k"], -by)
    return dataclasses.replace(held, arrays=arrays)


def _distance(held: Held) -> int:
    """By how many positions keys are rotated on: what follows has position N, and not that after the tokens read."""
    return len(held.arrays["kind"]) - int(held.next_positions[0])


def runs(held: Held) -> str:
    """What has to read a text behind a prefix: the "base", or "base and adapter" if the LoRA acts on text, too."""
    return "base and adapter" if {"TEXT", "QUERY"} & set(held.header["method"].get("gate") or ()) else "base"


def _require_plain(held: Held) -> None:
    """Raises unless a turn sees all slots, and all of itself, for as long as it goes on."""
    header, arrays = held.header, held.arrays

    def refused(why):
        return UserError(f"{held.path} cannot be a prefix for PyTorch: {why}")

    if header["sessions"] != 1:
        raise refused(f"it holds {header['sessions']} sessions; save one alone")
    if not len(arrays["kind"]):
        raise refused("nothing is remembered in it yet")
    config, method = model_config(held), header["method"]
    name, sees = files.called(method), method.get("sees") or {}
    if any(config.windowed):
        raise refused("layers of its model have a sliding window, which counts positions, and slots are fewer")
    if config.rope_scaling is not None and config.rope_scaling.kind in _BY_LENGTH:
        raise refused(f"RoPE scaling {config.rope_scaling.kind!r} depends there on the length of the text")
    if method.get("rope") == "cache":
        raise refused(f"method {name} turns keys anew whenever they are read")
    if method.get("chunk"):
        raise refused(f"method {name} compresses every {method['chunk']} tokens, in the middle of an answer, too")
    if method.get("context") != "chunks":
        raise refused(f"method {name} does not go on from a memory that was written before")
    chunks = int(arrays["chunks"][0])

    def within(spans, back):
        return any(a <= back and (b is None or back <= b) for a, b in spans)

    for kind, segment in {(int(k), int(s)) for k, s in zip(arrays["kind"], arrays["segment"], strict=True)}:
        # Of each kind and age that there is: the base in PyTorch has no rule, and attends to all that is in its cache.
        if not within(sees.get(f"QUERY sees {Kind(kind).name}", ()), chunks - segment):
            raise refused(
                f"with method {name} a turn does not see all of it: {Kind(kind).name.lower()} of {chunks - segment} "
                "chunks before, for instance, not at any distance"
            )
    if not within(sees.get("QUERY sees QUERY", ()), 0):
        raise refused(f"with method {name} a turn does not see all of itself")
