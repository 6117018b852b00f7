"""Memory files in words: what one holds, and in what two differ. No model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_ccm.memory.files import called
from jax_ccm.memory.held import SIZES, Held
from jax_ccm.rules.types import Kind

# Of the header, what is no part of what a file is about.
_ASIDE = ("format", "version", "written", "about", "model", "method", "fingerprints", "sessions")


def portrait(held: Held) -> Iterator[str]:
    """What a file holds, line by line."""
    header, arrays = held.header, held.arrays
    layers, heads, width, vocabulary = (header["model"][name] for name in SIZES)
    sessions = header["sessions"]
    yield f"{held.path}: {sessions} session{'s' * (sessions != 1)}, {held.path.stat().st_size:,} bytes"
    when = f", written {header['written']} by jax_ccm {header.get('version')}" if "written" in header else ""
    yield f"  format        {header['format']}{when}"
    yield f"  digest        {held.digest or 'none: an earlier version wrote it, and damage would go unseen'}"
    yield f"  method        {called(header['method'])}"
    yield (
        f"  model         {layers} layers, {heads} key/value heads of {width}, {arrays['k'].dtype}; {vocabulary:,} "
        f"tokens{_rope(header['model'])}"
    )
    for name, value in header["fingerprints"].items():
        yield f"  {name:13} {value}"
    for name, value in header["about"].items():
        if name != "turns":
            yield f"  {name:13} {value}"
    for number in range(sessions):
        yield from _session(held, number)


def _rope(model: Mapping[str, Any]) -> str:
    if "rope_theta" not in model:
        return ""
    scaling = model.get("rope_scaling")
    return f"; RoPE of base {model['rope_theta']:g}" + (f", {scaling}" if scaling else "")


def _session(held: Held, number: int) -> Iterator[str]:
    arrays, at = held.arrays, held.of(number)
    tokens, chunks = int(arrays["tokens"][number]), int(arrays["chunks"][number])
    kind, segment, position = (arrays[name][at] for name in ("kind", "segment", "position"))
    turns = held.turns if held.header["sessions"] == 1 else ()
    spoken = f"{len(turns)} turn{'s' * (len(turns) != 1)}, " if turns else ""
    yield f"session {number}: {spoken}{chunks} chunks closed, {tokens:,} tokens read"
    counts = [f"{int((kind == k).sum())} {k.name.lower()}" for k in Kind if (kind == k).any()]
    # Keys and values of one slot in all layers.
    each = 2 * arrays["k"][:, :1].nbytes
    mixed = sum(arrays[name][:, number].nbytes for name in ("mixed_k", "mixed_v") if name in arrays)
    more = f" and {mixed:,} of the float32 mixture" if mixed else ""
    yield (
        f"  slots         {', '.join(counts) or 'none'}: {len(kind) * each:,} bytes{more}; full context would hold "
        f"{tokens * each:,}"
    )
    for name, (first, end) in enumerate(turns, 1):
        of = (kind == Kind.MEMORY) & (segment >= first) & (segment < end)
        where = f", positions {position[of].min()} to {position[of].max()}" if of.any() else ""
        last = f" to {end - 1}" if end > first + 1 else ""
        yield f"  turn {name:<8} chunk{'s' * (end > first + 1)} {first}{last}: {int(of.sum())} slots{where}"


def difference(a: Held, b: Held) -> Iterator[str]:
    """In what two files differ, line by line; nothing if they hold the same memory."""
    for name in ("fingerprints", "model", "method"):
        here, there = a.header[name], b.header[name]
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                yield f"{name}, {key}: {here.get(key)} | {there.get(key)}"
    for key in sorted((a.header.keys() | b.header.keys()) - {*_ASIDE}):
        if a.header.get(key) != b.header.get(key):
            yield f"{key}: {a.header.get(key)} | {b.header.get(key)}"
    if a.header["sessions"] != b.header["sessions"]:
        yield f"sessions: {a.header['sessions']} | {b.header['sessions']}"
        return
    sizes = [[held.header["model"][name] for name in SIZES] for held in (a, b)]
    if sizes[0] != sizes[1]:
        return  # there is nothing to compare number by number
    for number in range(a.header["sessions"]):
        yield from _apart(a, b, number)


def _apart(a: Held, b: Held, number: int) -> Iterator[str]:
    """What differs in a session of two files of one model."""
    name = f"session {number}"
    for key in ("tokens", "chunks"):
        if a.arrays[key][number] != b.arrays[key][number]:
            yield f"{name}, {key}: {a.arrays[key][number]} | {b.arrays[key][number]}"
    where = [held.of(number) for held in (a, b)]
    places = [
        list(zip(*(held.arrays[x][at].tolist() for x in ("kind", "segment", "index", "position")), strict=True))
        for held, at in zip((a, b), where, strict=True)
    ]
    # Slots are the same if all four integers are: what was read at the same place in the same way.
    common = [(places[0].index(slot), places[1].index(slot)) for slot in places[0] if slot in places[1]]
    here, there = (np.array(x, int) for x in (zip(*common, strict=True) if common else ((), ())))
    if len(common) < max(map(len, places)):
        yield f"{name}: {len(places[0])} | {len(places[1])} slots, {len(common)} of them at the same place in the text"
    both = [(x, a.arrays[x][:, where[0]][:, here], b.arrays[x][:, where[1]][:, there]) for x in ("k", "v")]
    both += [(x, a.arrays[x][:, number], b.arrays[x][:, number]) for x in ("mixed_k",) if x in a.arrays]
    for what, x, y in both:
        x, y = x.astype(np.float64), y.astype(np.float64)
        if x.size and not np.array_equal(x, y):
            norm = np.linalg.norm(x) or 1.0
            worst = int(np.argmax([np.linalg.norm(x[n] - y[n]) for n in range(len(x))]))
            yield (
                f"{name}, {what} of the slots that they share: {np.linalg.norm(x - y) / norm:.3g} apart (relative "
                f"distance; most in layer {worst})"
            )
