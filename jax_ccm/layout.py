"""Who sees whom, and the flat ragged layout of a parallel forward.

The layout of CCM-concat with n = 2 for chunks ``a b``, ``c`` and the tail ``d e``::

    place     0  1  2  3  4  5  6  7  8          memory    0  1  2  3
    token     a  b  C0 C1 c  C0 C1 d  e          written   C0 C1 C0 C1
    segment   0  0  0  0  1  1  1  2  2          by chunk  0  0  1  1
    position  0  1  2  3  2  3  4  3  4

Text sees its own segment in place and older segments only through the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.types import INF, RAW, Array, Batch, Chunk, Kind, Method, Mix, Packed, Rule, Slots


def is_in(kind: Array, kinds: tuple[Kind, ...]) -> Array:
    """``bool``, shape of ``kind``: whether it is one of ``kinds``."""
    found = kind == int(kinds[0])
    for other in kinds[1:]:
        found = found | (kind == int(other))
    return found


def visible(rule: Rule, q: Slots, k: Slots) -> Array:
    """Which keys each query sees: ``bool [..., T, S]`` for slots ``[..., T]`` and ``[..., S]``.

    Compare-and-or only, so that the same function serves numpy on the host, `jax.numpy`, and blocks inside a kernel.
    For CCM-concat with n = 1, chunks ``a``, ``b`` and tail ``c``, own places left, memory right::

              a C b C c | M M
        a     x . . . . | . .
        C     x x . . . | . .
        b     . . x . . | x .
        C     . . x x . | x .
        c     . . . . x | x x
    """
    back = q.segment[..., :, None] - k.segment[..., None, :]
    causal = q.index[..., :, None] >= k.index[..., None, :]
    seen = None
    for clause in rule.sees:
        hit = is_in(q.kind, clause.query)[..., :, None] & is_in(k.kind, clause.key)[..., None, :]
        hit = hit & (back >= clause.nearest)
        if clause.farthest < INF:
            hit = hit & (back <= clause.farthest)
        if not set(clause.query + clause.key) <= set(rule.both_ways):
            hit = hit & causal
        seen = hit if seen is None else seen | hit
    if rule.window is not None:
        near = q.position[..., :, None] - k.position[..., None, :] < rule.window
        seen = seen & (near | ~is_in(k.kind, RAW)[..., None, :])
    return seen


def reachable(rule: Rule, k: Slots, segment: Array, position: Array) -> Array:
    """``bool [B, S]``: keys that something in segment ``[B]`` at or after ``position [B]``, or later, can still see.

    What is not reachable may be removed from a cache without changing any result.
    """
    back = segment[:, None] - k.segment
    found = None
    for clause in rule.sees:
        hit = is_in(k.kind, clause.key) & (back <= clause.farthest)
        found = hit if found is None else found | hit
    if rule.window is not None:
        found = found & ((position[:, None] - k.position < rule.window) | ~is_in(k.kind, RAW))
    return found


def with_window(rule: Rule, window: int | None) -> Rule:
    """The rule with a base model's sliding window over raw text added; memory and sinks are exempt."""
    if window is None:
        return rule
    return dataclasses.replace(rule, window=window if rule.window is None else min(window, rule.window))


def gate(method: Method, slots: Slots) -> Array | None:
    """``float32 [..., S]``: 1 on the kinds where the method's LoRA acts; None if it acts nowhere."""
    if not method.gate:
        return None
    return is_in(slots.kind, method.gate).astype("float32")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of text. ``tokens`` int32 ``[c]``; ``scored`` bool ``[c]``: True on tokens that are targets."""

    tokens: np.ndarray
    scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class Example:
    """One session: context chunks, then a tail.

    Attributes:
      start: int32, tokens before the first segment (beginning of sequence).
      separator: int32, tokens that open every segment but the first.
      segments: the context chunks, and last the tail: the input and what follows it.
      id: names the record in error messages.
    """

    start: np.ndarray
    separator: np.ndarray
    segments: tuple[Segment, ...]
    id: str = ""


def opened(opening: np.ndarray, segment: Segment) -> Segment:
    """The segment with unscored opening tokens in front."""
    return Segment(
        np.concatenate([opening, segment.tokens]).astype(np.int32),
        np.concatenate([np.zeros(len(opening), bool), segment.scored]),
    )


def join(example: Example, groups: Sequence[int]) -> Example:
    """Joins neighbouring segments into one, with the separator between them.

    Args:
      example: the session.
      groups: sizes of the groups, in order; they add up to the number of segments. A last group larger than 1
        joins context into the tail.
    """
    if sum(groups) != len(example.segments) or min(groups) < 1:
        raise ValueError(f"groups {list(groups)} do not partition {len(example.segments)} segments")
    joined, first = [], 0
    for size in groups:
        head, *rest = example.segments[first : first + size]
        pieces = [head, *(opened(example.separator, piece) for piece in rest)]
        joined.append(Segment(np.concatenate([p.tokens for p in pieces]), np.concatenate([p.scored for p in pieces])))
        first += size
    return dataclasses.replace(example, segments=tuple(joined))


def arrange(method: Method, example: Example) -> tuple[Segment, ...]:
    """The segments as the method is fed them, openings included; the last is the tail."""
    count = len(example.segments)
    if method.context == "dropped":
        return (opened(example.start, example.segments[-1]),)
    if method.context == "joined" and count > 2:
        example = join(example, [count - 1, 1])
    first, *rest = example.segments
    return (opened(example.start, first), *(opened(example.separator, segment) for segment in rest))


def chunk(rows: Sequence[Sequence[int]], size: int, vocab_size: int) -> Chunk:
    """A `Chunk` of ragged rows of token ids, padded on the right; an empty row takes no part.

    Args:
      rows: token ids for each session.
      size: C, places of a row.
      vocab_size: V.

    Raises:
      UserError: for a row longer than ``size`` or a token outside the vocabulary.
    """
    tokens, valid = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        if len(row) > size:
            raise UserError(f"row {i} has {len(row)} tokens, the chunk {size} places; raise size or split the row")
        ids = np.asarray(row, np.int64)
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise UserError(f"row {i}: token id {wrong[0]} is outside the vocabulary (0..{vocab_size - 1})")
        tokens[i, : len(row)], valid[i, : len(row)] = ids, True
    return Chunk(tokens, valid)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a batch: ``tokens`` T, ``memory`` P (tokens that write memory), ``scored`` Q."""

    tokens: int
    memory: int
    scored: int


def measure(method: Method, example: Example) -> Sizes:
    """The sizes that one example needs."""
    segments = arrange(method, example)
    chunks = len(segments) - 1
    text = sum(len(segment.tokens) for segment in segments)
    scored = sum(int(segment.scored.sum()) for segment in segments) - int(segments[0].scored[:1].sum())
    return Sizes(text + chunks * len(method.closes), chunks * method.slots_per_chunk, scored)


def batch(method: Method, examples: Sequence[Example], sizes: Sizes, vocab_size: int, pad: str = "right") -> Batch:
    """Lays examples out for a parallel forward.

    A token is predicted from the text token before it, whatever compression tokens stand between. The first token
    of a session has no such token and is not scored.

    Args:
      method: the compression method.
      examples: the rows.
      sizes: static caps; every mixture of lengths within them gives arrays of the same shape.
      vocab_size: V.
      pad: side of the padding, "right" or "left".

    Returns:
      A `Batch` of numpy arrays.

    Raises:
      UserError: if an example exceeds a cap, has an empty segment or a token outside the vocabulary, or the method has
        no parallel form.
    """
    if method.rope == "cache":
        raise UserError(
            f"method {method.name!r} rotates keys by their place in the cache and so has no parallel form; train with "
            "the method of the same name without rope='cache' and stream with this one"
        )
    rows = [_row(method, arrange(method, example), sizes, vocab_size, example.id) for example in examples]
    if pad == "left":
        rows = [_shift(row, sizes.tokens) for row in rows]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    memory = None
    if method.slots_per_chunk and sizes.memory:
        slots = Slots(*(stacked[f"memory_{name}"] for name in ("kind", "segment", "index", "position")))
        memory = Packed(stacked["source"], slots, stacked.get("mix"))
    slots = Slots(*(stacked[name] for name in ("kind", "segment", "index", "position")))
    return Batch(
        stacked["tokens"], slots, memory, *(stacked[name] for name in ("places", "targets", "weights", "steps"))
    )


def _row(method: Method, segments: Sequence[Segment], sizes: Sizes, vocab: int, name: str) -> dict[str, np.ndarray]:
    """The arrays of one row, padded on the right."""
    where = f"example {name!r}" if name else "an example"
    tokens, kind, segment, position, scored = [], [], [], [], []
    text = 0
    for number, piece in enumerate(segments):
        tail = number == len(segments) - 1
        count = len(piece.tokens)
        if not count:
            raise UserError(f"{where}: segment {number} is empty; drop it, or join it to its neighbour")
        if piece.tokens.min() < 0 or piece.tokens.max() >= vocab:
            bad = piece.tokens[(piece.tokens < 0) | (piece.tokens >= vocab)][0]
            raise UserError(
                f"{where}: token id {bad} in segment {number} is outside the vocabulary (0..{vocab - 1}). Compression "
                "tokens are placed by the method; they may stand neither in text nor in labels"
            )
        closing = () if tail else method.closes
        tokens += [piece.tokens, vocab + np.arange(len(closing))]
        kind += [np.full(count, Kind.QUERY if tail else Kind.TEXT), np.array(closing, np.int64)]
        segment += [np.full(count + len(closing), number)]
        position += [text + np.arange(count), text + count + np.array(method.offsets[: len(closing)], np.int64)]
        scored += [piece.scored, np.zeros(len(closing), bool)]
        text += count
    row = {
        "tokens": np.concatenate(tokens),
        "kind": np.concatenate(kind),
        "segment": np.concatenate(segment),
        "position": np.concatenate(position),
    }
    length = len(row["tokens"])
    row["index"] = np.arange(length)
    if method.sink:
        row["kind"][0] = Kind.SINK
    closes = row["tokens"] >= vocab
    scored = np.flatnonzero(np.concatenate(scored))
    scored = scored[scored > 0]
    before = np.maximum.accumulate(np.where(closes, -1, np.arange(length)))
    row["places"] = before[scored - 1]
    row["targets"] = row["tokens"][scored]
    row["steps"] = row["segment"][scored]
    row["weights"] = np.ones(len(scored))
    source = np.flatnonzero(np.isin(row["kind"], method.writes))
    needs = Sizes(length, len(source), len(scored))
    for field in dataclasses.fields(Sizes):
        need, cap = getattr(needs, field.name), getattr(sizes, field.name)
        if need > cap:
            raise UserError(
                f"{where} needs {field.name}={need} places, the batch has {cap}; raise the cap or filter the data"
            )
    row["source"] = source
    memory = {f: row[f][source] for f in ("segment", "index", "position")}
    memory["kind"] = np.full(len(source), Kind.MEMORY)
    if method.mix is not None:
        row["mix"] = _mix_matrix(method.mix, len(source), method.slots_per_chunk, sizes.memory)
        # State t of the mixture exists once the last of its chunk's tokens has been run.
        memory["index"] = (
            memory["index"].reshape(-1, method.slots_per_chunk).max(1, initial=0).repeat(method.slots_per_chunk)
        )
    row |= {f"memory_{f}": x for f, x in memory.items()}
    caps = {
        "tokens": sizes.tokens,
        "kind": sizes.tokens,
        "segment": sizes.tokens,
        "position": sizes.tokens,
        "index": sizes.tokens,
        "places": sizes.scored,
        "targets": sizes.scored,
        "steps": sizes.scored,
        "weights": sizes.scored,
    }
    pad = lambda x, size: np.concatenate([x, np.zeros(size - len(x), x.dtype)])  # np.pad is ten times slower
    return {
        name: x
        if name == "mix"
        else pad(x, caps.get(name, sizes.memory)).astype(np.float32 if name == "weights" else np.int32)
        for name, x in row.items()
    }


def _mix_matrix(mix: Mix, sources: int, per_chunk: int, size: int) -> np.ndarray:
    """``float32 [M, P]``: row ``t * n + k`` holds the weights of slot k of all chunks in the memory after chunk t."""
    chunks = sources // per_chunk
    weights = np.zeros((chunks, chunks))
    for t in range(chunks):
        rate = float(mix.rate(t + 1))
        if t:
            weights[t] = (1 - rate) * weights[t - 1]
        weights[t, t] = rate
    matrix = np.zeros((size, size), np.float32)
    matrix[:sources, :sources] = np.kron(weights, np.eye(per_chunk))
    return matrix


def _shift(row: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """The row with its padding on the left."""
    empty = size - int((row["kind"] != Kind.PAD).sum())
    row = dict(row)
    for name in ("tokens", "kind", "segment", "index", "position"):
        row[name] = np.roll(row[name], empty)
    for name, used in (("places", row["weights"] > 0), ("source", row.get("memory_kind", np.zeros(0)) == Kind.MEMORY)):
        row[name] = np.where(used, row[name] + empty, 0).astype(np.int32)
    return row
