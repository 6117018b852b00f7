"""Sessions as a recurrence is fed them, and the likelihoods of their scored tokens."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from jax_ccm.errors import UserError
from jax_ccm.memory.cache import check, init_cache, select
from jax_ccm.memory.repetition import repeat
from jax_ccm.memory.steps import compress, compress_step, read
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.examples import Example, Segment, concat
from jax_ccm.rules.rows import WITH_SINK, Sizes, arrange, chunk, closed, measure
from jax_ccm.rules.types import RAW, Chunk, Kind, MemoryCache, Method

# Chunks and tails are padded to multiples of this, so that a few shapes serve all lengths.
MULTIPLE = 32
# Losses and hits of the scored tokens of one row, in pieces.
Scored = list[tuple[np.ndarray, np.ndarray]]


def same_context(arranged: Sequence[Sequence[Segment]]) -> list[list[int]]:
    """Numbers of the sessions whose contexts ask for the same, token by token; in the order of the first of each.

    The last token of a context predicts the first one of the tail: where that is scored, it belongs to what is asked.

    Args:
      arranged: the sessions (`arrange`).
    """
    found: dict[bytes, list[int]] = {}
    for number, (*context, tail) in enumerate(arranged):
        digest = hashlib.sha256()
        for segment in context:
            kept = np.zeros(0, bool) if segment.kept is None else segment.kept
            # Lengths in front of the numbers: text cut otherwise is another context.
            digest.update(f"{len(segment.tokens)},{len(kept)}:".encode())
            for array in (segment.tokens.astype("<i4"), segment.scored, kept):
                digest.update(array.tobytes())
        digest.update(tail.tokens[:1][tail.scored[:1]].astype("<i4").tobytes())
        found.setdefault(digest.digest(), []).append(number)
    return list(found.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Behind:
    """Sessions that have read their contexts, a batch of them.

    Attributes:
      cache: of as many rows as a batch has; those behind the last of ``numbers`` are idle.
      numbers: of the examples, one for each row.
      sessions: the examples of all rows, whose tails are still to be read.
      scored: losses and hits of the scored tokens of each example's context, in pieces.
    """

    cache: MemoryCache
    numbers: list[int]
    sessions: Stream
    scored: list[Scored]


def behind_contexts(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    rows: int,
    room: int = 0,
    capacity: int | None = None,
) -> Iterator[Behind]:
    """Reads the contexts of examples chunk by chunk, one that several share once for all their tails.

    Args:
      model: the decoder with its adapter.
      method: what the examples are run with.
      examples: sessions of any lengths.
      rows: rows of a batch.
      room: tokens for which there is to be room behind each tail.
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.

    Yields:
      All examples, batch after batch, in an order in which neighbours are of about the same lengths.
    """
    arranged = [arrange(method, example) for example in examples]
    sizes = [[len(segment.tokens) for segment in segments] for segments in arranged]
    # Neighbours in this order have as many chunks, of about the same lengths.
    order = sorted(same_context(arranged), key=lambda those: (len(sizes[those[0]]), max(sizes[those[0]])))
    # One shape of cache for all. Shapes alone: a cache of all examples together is not allocated.
    roomy = jax.eval_shape(lambda: cache_for(model, method, [_longer(example, room) for example in examples]))
    raw = _padded(roomy.k.shape[2] - roomy.memory_capacity, method.chunk or 1)
    slots = roomy.memory_capacity if capacity is None else min(roomy.memory_capacity, capacity)
    overflow = "error" if capacity is None else "evict"
    for first in range(0, len(order), rows):
        groups = order[first : first + rows]
        cache = init_cache(model, method, rows, memory_capacity=slots, raw_capacity=raw, overflow=overflow)
        contexts = filled([those[0] for those in groups], rows)
        cache, scored = _read_contexts(model, method, cache, stream(method, [examples[i] for i in contexts]))
        # One for each tail: the row that holds its context, and the number of the example.
        tails = [(row, index) for row, those in enumerate(groups) for index in those]
        for begin in range(0, len(tails), rows):
            some = tails[begin : begin + rows]
            own_rows, chosen = zip(*filled(some, rows), strict=True)
            # A copy of each row for each of its tails: what is scored is read into it and thrown away.
            own = select(cache, np.array(own_rows))
            sessions = stream(method, [examples[i] for i in chosen])
            yield Behind(own, [number for _, number in some], sessions, [scored[row] for row, _ in some])


def score_recurrently(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    rows: int,
    capacity: int | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores examples chunk by chunk. A context that several of them share is read once, for all their tails.

    Args:
      model: the decoder with its adapter.
      method: what the examples are run with.
      examples: sessions of any lengths.
      rows: rows of a batch.
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.

    Returns:
      For each example, in the order given, ``float64 [q]`` negative log-likelihoods in nats and ``bool [q]`` whether
      the token is the most likely one, of its scored tokens.
    """
    found: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(examples)
    for behind in behind_contexts(model, method, examples, rows=rows, capacity=capacity):
        answers = _score_tails(model, method, behind.cache, behind.sessions)
        # Idle rows repeat the first, and stand behind all others: `zip` ends before them.
        for number, before, answer in zip(behind.numbers, behind.scored, answers, strict=False):
            losses, hits = zip(*before, answer, strict=True)
            found[number] = np.concatenate(losses), np.concatenate(hits)
    return [scores for scores in found if scores is not None]


def _longer(example: Example, count: int) -> Example:
    """The example with so many more tokens behind its tail, for its size."""
    *context, tail = example.segments
    more = Segment(np.zeros(count, np.int32), np.zeros(count, bool))
    return dataclasses.replace(example, segments=(*context, concat(tail, more)))


def filled(numbers: Sequence[Any], rows: int) -> list[Any]:
    """As many as a batch has rows: idle ones repeat the first."""
    return [*numbers, *[numbers[0]] * (rows - len(numbers))]


def _read_contexts(model, method: Method, cache, sessions: Stream) -> tuple[MemoryCache, list[Scored]]:
    """The sessions behind their contexts, and the scores of each row's."""
    rows: list[Scored] = [[] for _ in sessions.tail.tokens]
    for time in range(sessions.context.tokens.shape[0]):
        chunk = jax.tree.map(operator.itemgetter(time), sessions.context)
        targets, weights = sessions.targets[0][time], sessions.weights[0][time]
        # Most contexts are not scored, and then need no logits.
        asked = bool(weights.any())
        cache, *made = _step(model, cache, *fit(chunk, targets), method=method, close=True, asked=asked)
        if asked:
            for row, piece in zip(rows, _scored(weights, *made), strict=True):
                row.append(piece)
    return cache, rows


def _score_tails(model, method: Method, cache, sessions: Stream) -> Scored:
    """The scores of each row's tail."""
    tail = fit(sessions.tail, sessions.targets[1])
    cache, *made = _step(model, cache, *tail, method=method, close=False, asked=True)
    # Once a batch: what was lost on the way stays noted.
    check(cache)
    return _scored(sessions.weights[1], *made)


def _scored(weights: np.ndarray, losses, hits) -> Scored:
    """Losses and hits of each row where it is scored."""
    losses, hits = np.asarray(losses, np.float64), np.asarray(hits)
    indices = [np.flatnonzero(used) for used in weights > 0]
    return [(losses[row, where], hits[row, where]) for row, where in enumerate(indices)]


def _padded(length: int, unit: int = 1) -> int:
    """The next multiple of `MULTIPLE` and of a unit."""
    multiple = math.lcm(MULTIPLE, unit)
    return -(-length // multiple) * multiple


def fit(*arrays: Any) -> Any:
    """Chunks ``[B, C]`` (and arrays as long), padded on the right to one of few lengths."""

    def pad(x):
        # At the end, with zeros, which are invalid places.
        return np.pad(x, ((0, 0), (0, _padded(x.shape[1]) - x.shape[1])))

    return jax.tree.map(pad, arrays)


@functools.partial(jax.jit, static_argnames=("method", "close", "asked"), donate_argnums=1)
def _step(model, cache, chunk, targets, *, method, close, asked):
    """Reads a chunk and closes it, or reads a tail; if asked, losses ``[B, C]`` and hits of the token behind each."""
    cache, logits = read(model, cache, chunk, method=method, query=not close)  # [B, C, V]
    if close:
        cache = compress(model, cache, jnp.any(chunk.valid, axis=1), method=method)
    if not asked:
        # Without a reader, the logits are not even computed.
        return (cache,)
    return cache, *losses_and_hits(logits, targets)


def losses_and_hits(logits, targets):
    """Cross-entropies ``float32 [B, C]`` in nats, and ``bool`` whether each target is the most likely token."""
    return cross_entropy(logits, targets), jnp.argmax(logits, axis=-1) == targets


@dataclasses.dataclass(frozen=True)
class Stream:
    """Sessions as a recurrence is fed them; rows of fewer chunks, or shorter ones, are padded with invalid tokens.

    Attributes:
      context: `Chunk` of ``[time, B, C]``.
      tail: `Chunk` of ``[B, C']``.
      targets: ``int32``, the text token behind each token of the context ``[time, B, C]`` and of the tail ``[B, C']``.
      weights: ``float32``, of the same shapes, 1 where that token is scored.
    """

    context: Chunk
    tail: Chunk
    targets: tuple[np.ndarray, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]


def stream(method: Method, examples: Sequence[Example]) -> Stream:
    """Lays examples out for the recurrence."""
    rows = [arrange(method, example) for example in examples]
    marked = any(s.kept is not None and s.kept.any() for row in rows for s in row[:-1])
    if marked and method.kept_kind is None:
        raise UserError(f"method {method.name!r} keeps no text, but a segment has text to keep{WITH_SINK}")
    time = max(len(row) for row in rows) - 1
    length = max((len(s.tokens) for row in rows for s in row[:-1]), default=1)
    tail = max(len(row[-1].tokens) for row in rows)
    # tokens, valid, targets, weights, kept
    dtypes = (np.int32, bool, np.int32, np.float32, bool)
    of_context = [np.zeros((time, len(rows), length), dtype) for dtype in dtypes]
    of_tail = [np.zeros((len(rows), tail), dtype) for dtype in dtypes]
    for i, row in enumerate(rows):
        text = np.concatenate([segment.tokens for segment in row])
        scored = np.concatenate([segment.scored for segment in row])
        # The token behind each, over the borders of segments: the last of a chunk predicts the first of the next.
        behind = np.append(text[1:], 0), np.append(scored[1:], False)
        first = 0
        for number, segment in enumerate(row):
            count = len(segment.tokens)
            place = slice(first, first + count)
            kept = np.zeros(count, bool) if segment.kept is None else segment.kept
            values = (segment.tokens, np.ones(count, bool), behind[0][place], behind[1][place], kept)
            last = number == len(row) - 1
            for array, value in zip(of_tail if last else of_context, values, strict=True):
                array[(i, slice(count)) if last else (number, i, slice(count))] = value
            first += count
    tokens, valid, targets, weights, kept = zip(of_context, of_tail, strict=True)
    keeps = method.kept_kind is not None and (method.keeps_text or marked)
    # The tail is of kind QUERY as a whole; only a system message in it makes a difference.
    begins = method.kept_kind is Kind.SINK and bool(kept[1].any())
    return Stream(
        Chunk(tokens[0], valid[0], kept[0] if keeps else None),
        Chunk(tokens[1], valid[1], kept[1] if begins else None),
        targets,
        weights,
    )


def cache_for(model: Transformer, method: Method, examples: Sequence[Example]) -> MemoryCache:
    """A cache with just the room that the examples need."""
    rows = [arrange(method, example) for example in examples]
    chunks = max(max(len(row) for row in rows) - 1, 1)
    # Text that some later segment can see stays in the cache.
    keeps = any(set(clause.key) & set(RAW) and clause.farthest > 0 for clause in method.rule.sees)
    lengths = [[len(segment.tokens) for segment in row] for row in rows]
    # A system message takes slots of raw text for as long as the session lives.
    kept = max(0 if row[0].kept is None else int(row[0].kept.sum()) for row in rows)
    raw, unit = max(sum(row) if keeps else max(row) for row in lengths) + kept, method.chunk or 1
    return init_cache(
        model,
        method,
        len(rows),
        memory_capacity=max(method.memory_slots(chunks, max(map(max, lengths))), 1),
        raw_capacity=-(-raw // unit) * unit,
    )


def caps_for(method: Method, examples: Sequence[Example]) -> Sizes:
    """The smallest sizes of a batch that holds all examples."""
    return Sizes.of_all([measure(method, example) for example in examples])


def repeat_recurrently(
    model: Transformer, method: Method, examples: Sequence[Example], *, rows: int
) -> list[list[np.ndarray]]:
    """Has each chunk said again as soon as its text is gone (`repeat`).

    Args:
      model: the decoder with its adapter.
      method: one with a `Method.repeat`.
      examples: sessions of any lengths.
      rows: rows of a batch.

    Returns:
      For each closed chunk of each example what is said of it, ``int32 [c]``, as many tokens as it has.
    """
    arranged = [arrange(method, example) for example in examples]
    # Text of recent chunks is closed once so many newer ones are there; what follows the last is never read.
    texts = [
        [segment.tokens for segment in row[: len(closed(method, row)) + (method.recent if closed(method, row) else 0)]]
        for row in arranged
    ]
    longest = max((len(text) for row in texts for text in row), default=1)
    roomy = jax.eval_shape(lambda: cache_for(model, method, examples))
    chunks = max(map(len, texts), default=0)
    slots = max(roomy.memory_capacity, method.memory_slots(max(chunks, 1), longest), 1)
    # Sinks have slots of their own, which `init_cache` adds again.
    raw = roomy.k.shape[2] - roomy.memory_capacity - method.sink
    found: list[list[np.ndarray]] = [[] for _ in examples]
    for first in range(0, len(examples), rows):
        numbers = range(first, min(first + rows, len(examples)))
        cache = init_cache(model, method, rows, memory_capacity=slots, raw_capacity=max(raw, longest))
        own = [texts[i] for i in numbers] + [[]] * (rows - len(numbers))
        for time in range(max(map(len, own))):
            pieces = [row[time] if time < len(row) else np.zeros(0, np.int32) for row in own]
            # The chunk that was closed in this step: an older one where recent chunks stay as text.
            asked = time - method.recent
            # A row that has ended says something, too, which nobody hears.
            begin = np.array([sum(map(len, row[: max(asked, 0)])) for row in own], np.int32)
            given = chunk(pieces, longest, model.config.vocab_size)
            cache, said = _close_and_repeat(model, cache, given, begin, method=method, length=longest)
            if asked < 0:
                continue
            said = np.asarray(said)
            for row, i in enumerate(numbers):
                if time < len(texts[i]):
                    found[i].append(said[row, : len(texts[i][asked])])
        check(cache)
    return found


@functools.partial(jax.jit, static_argnames=("method", "length"), donate_argnums=1)
def _close_and_repeat(model, cache, chunk, begin, *, method, length):
    """Reads a chunk and closes it; the cache, and the tokens ``int32 [B, length]`` that are said of it."""
    cache = compress_step(model, cache, chunk, method=method)
    logits = repeat(model, cache, length, method.recent + 1, method=method, begin=begin)
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)
