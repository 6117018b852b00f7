"""Parallel against recurrent: the same logits, losses and gradients by both roads, and what a memory weighs."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_ccm.errors import UserError
from jax_ccm.memory.cache import check, init_cache
from jax_ccm.memory.losses import mean_loss, scored_logits
from jax_ccm.memory.steps import compress, parallel_forward, read
from jax_ccm.nn.config import ModelConfig
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.examples import Example
from jax_ccm.rules.rows import Sizes, arrange, batch, measure, reachable
from jax_ccm.rules.types import RAW, Batch, Chunk, Kind, MemoryCache, Method, Slots


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


def everything_scored(example: Example) -> Example:
    """The example with every text token of every segment as a target."""
    segments = tuple(dataclasses.replace(s, scored=np.ones(len(s.tokens), bool)) for s in example.segments)
    return dataclasses.replace(example, segments=segments)


def stream(method: Method, examples: Sequence[Example]) -> Stream:
    """Lays examples out for the recurrence."""
    rows = [arrange(method, example) for example in examples]
    if any(s.kept is not None and s.kept.any() for row in rows for s in row) and not method.keeps_text:
        raise UserError(f"method {method.name!r} keeps no text, but a segment has text to keep")
    time = max(len(row) for row in rows) - 1
    length = max((len(s.tokens) for row in rows for s in row[:-1]), default=1)
    tail = max(len(row[-1].tokens) for row in rows)
    # tokens, valid, targets, weights, kept
    dtypes = (np.int32, bool, np.int32, np.float32, bool)
    context_arrays = [np.zeros((time, len(rows), length), dtype) for dtype in dtypes]
    tail_arrays = [np.zeros((len(rows), tail), dtype) for dtype in dtypes]
    for i, row in enumerate(rows):
        text = np.concatenate([segment.tokens for segment in row])
        scored = np.concatenate([segment.scored for segment in row])
        behind = np.append(text[1:], 0), np.append(scored[1:], False)
        first = 0
        for number, segment in enumerate(row):
            count = len(segment.tokens)
            place = slice(first, first + count)
            kept = np.zeros(count, bool) if segment.kept is None else segment.kept
            values = (segment.tokens, np.ones(count, bool), behind[0][place], behind[1][place], kept)
            last = number == len(row) - 1
            for array, value in zip(tail_arrays if last else context_arrays, values, strict=True):
                array[(i, slice(count)) if last else (number, i, slice(count))] = value
            first += count
    # The tail is of kind QUERY as a whole; what is kept in it makes no difference.
    kept = context_arrays[4] if method.keeps_text else None
    return Stream(
        Chunk(*context_arrays[:2], kept),
        Chunk(*tail_arrays[:2]),
        (context_arrays[2], tail_arrays[2]),
        (context_arrays[3], tail_arrays[3]),
    )


def target_steps(method: Method, examples: Sequence[Example]) -> list[np.ndarray]:
    """For each example ``int32 [q]``: how many chunks were closed before each scored token (its time step)."""
    found = []
    for example in examples:
        row = arrange(method, example)
        number = np.repeat(np.arange(len(row)), [len(segment.tokens) for segment in row])
        scored = np.concatenate([segment.scored for segment in row])
        scored[0] = False  # the first token of a session is not predicted
        found.append(number[scored].astype(np.int32))
    return found


def cache_for(model: Transformer, method: Method, examples: Sequence[Example]) -> MemoryCache:
    """A cache with just the room that the examples need."""
    rows = [arrange(method, example) for example in examples]
    chunks = max(max(len(row) for row in rows) - 1, 1)
    # Text that some later segment can see stays in the cache.
    keeps = any(set(clause.key) & set(RAW) and clause.farthest > 0 for clause in method.rule.sees)
    lengths = [[len(segment.tokens) for segment in row] for row in rows]
    raw, unit = max(sum(row) if keeps else max(row) for row in lengths), method.chunk or 1
    return init_cache(
        model,
        method,
        len(rows),
        memory_capacity=max(method.memory_slots(chunks, max(map(max, lengths))), 1),
        raw_capacity=-(-raw // unit) * unit,
    )


def caps_for(method: Method, examples: Sequence[Example]) -> Sizes:
    """The smallest sizes of a batch that holds all examples."""
    needs = [measure(method, example) for example in examples]
    return Sizes(*(max(getattr(need, f.name) for need in needs) for f in dataclasses.fields(Sizes)))


def parallel_logits(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    with_memory: bool = True,
    implementation: str | None = None,
) -> list[np.ndarray]:
    """Logits that predict the scored tokens, by one parallel forward.

    Args:
      model: the decoder with its adapter.
      method: the compression method.
      examples: the sessions; scored tokens may stand in any segment.
      with_memory: False hides every memory slot: what the same text does without its memory.
      implementation: of the attention.

    Returns:
      For each example ``float32 [q, V]``, in the order of its scored tokens.
    """
    method = dataclasses.replace(method, repeat=None)
    made = batch(method, examples, caps_for(method, examples), model.config.vocab_size)
    if not with_memory:
        made = without_memory(made)
    logits = np.asarray(_parallel(model, made, method=method, implementation=implementation))
    return [row[used > 0] for row, used in zip(logits, made.weights, strict=True)]


def without_memory(made: Batch) -> Batch:
    """The batch with its memory hidden from everybody."""
    if made.memory is None:
        return made
    slots = dataclasses.replace(made.memory.slots, kind=np.zeros_like(made.memory.slots.kind))
    return dataclasses.replace(made, memory=dataclasses.replace(made.memory, slots=slots))


def recurrent_logits(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    cache: MemoryCache | None = None,
    implementation: str | None = None,
) -> list[np.ndarray]:
    """Logits that predict the scored tokens, by `read` and `compress` chunk by chunk; sessions of any lengths together.

    Args:
      model: the decoder with its adapter.
      method: the compression method.
      examples: the sessions.
      cache: an empty cache; None makes one with just enough room.
      implementation: of the attention.

    Returns:
      As `parallel_logits`.

    Raises:
      UserError: if the cache given is too small.
    """
    sessions = stream(method, examples)
    cache = cache_for(model, method, examples) if cache is None else cache
    found: list[list[np.ndarray]] = [[] for _ in examples]

    def collect(logits, weights):
        logits = np.asarray(logits)
        for row, values, used in zip(found, logits, weights, strict=True):
            row.append(values[used > 0])

    static = dict(method=method, implementation=implementation)
    for time in range(sessions.context.tokens.shape[0]):
        chunk = jax.tree.map(operator.itemgetter(time), sessions.context)
        cache, logits = _read(model, cache, chunk, query=False, **static)
        collect(logits, sessions.weights[0][time])
        cache = _compress(model, cache, chunk.valid.any(axis=1), **static)
    cache, logits = _read(model, cache, sessions.tail, query=True, **static)
    collect(logits, sessions.weights[1])
    check(cache)
    return [np.concatenate(row) for row in found]


def parallel_gradients(model: Transformer, method: Method, examples: Sequence[Example]) -> tuple[float, Any]:
    """Mean loss of the scored tokens and its gradient with respect to the adapter, by the parallel forward.

    Returns:
      The loss, and a tree of float32 arrays of the adapter's structure.
    """
    method = dataclasses.replace(method, repeat=None)
    made = batch(method, examples, caps_for(method, examples), model.config.vocab_size)
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    loss, gradients = _parallel_gradients(adapter, base, made, graphdef=graphdef, method=method)
    return float(loss), gradients


def recurrent_gradients(model: Transformer, method: Method, examples: Sequence[Example]) -> tuple[float, Any]:
    """As `parallel_gradients`, differentiating through the recurrence (a `jax.lax.scan` over chunks)."""
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    sessions, cache = stream(method, examples), cache_for(model, method, examples)
    arrays = (sessions.context, sessions.tail, sessions.targets, sessions.weights)
    loss, gradients = _recurrent_gradients(adapter, base, cache, arrays, graphdef=graphdef, method=method)
    return float(loss), gradients


def gradient_gap(ours: Any, theirs: Any) -> float:
    """Norm of the difference of two gradients over the norm of the first; 0 if both are zero."""
    norm = lambda trees: np.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in trees))
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    difference = norm([np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs])
    return difference / max(norm([a for a, _ in pairs]), np.finfo(np.float32).tiny)


def context_slots(method: Method, example: Example) -> int:
    """Key/value slots that a session holds once its context is closed and before its tail is read."""
    *context, _ = arrange(method, example)
    if not context:
        return 0
    if method.keep is not None:
        held = -method.sink
        for number, segment in enumerate(context, 1):
            # A chunk may have fewer tokens than slots.
            held = min(method.memory_slots(number), held + len(segment.tokens))
        return held + method.sink
    if method.closes:
        kept = sum(int(segment.kept.sum()) for segment in context if segment.kept is not None)
        return method.memory_slots(len(context)) + kept + int(method.sink)
    text = sum(len(segment.tokens) for segment in context)
    own = np.concatenate([np.full(len(segment.tokens), number) for number, segment in enumerate(context)])
    place = np.arange(text)[None]
    kept = np.concatenate([np.zeros(len(s.tokens), bool) if s.kept is None else s.kept for s in context])
    kind = np.where(place < method.sink, Kind.SINK, np.where(kept, Kind.QUERY, Kind.TEXT))
    slots = Slots(kind, own[None], place, place)
    seen = reachable(method.rule, slots, np.array([len(context)]), np.array([text]))[0]
    pooled = sum(-(-int(count) // method.pool) for count in np.bincount(own[~seen])) if method.pool else 0
    return int(seen.sum()) + pooled


def held_slots(method: Method, example: Example) -> int:
    """Key/value slots that a session holds when all of its text is read, the tail raw."""
    *context, tail = arrange(method, example)
    if method.remembers:
        return context_slots(method, example) + len(tail.tokens)
    segments = [*context, tail]
    counts = [len(segment.tokens) for segment in segments]
    kept = np.concatenate(
        [np.zeros(len(s.tokens), bool) if s.kept is None else s.kept for s in context] + [np.ones(counts[-1], bool)]
    )
    place = np.arange(sum(counts))[None]
    kind = np.where(kept, Kind.QUERY, Kind.TEXT)[None]
    kind = np.where(place < method.sink, Kind.SINK, kind)
    slots = Slots(kind, np.repeat(np.arange(len(counts)), counts)[None], place, place)
    return int(reachable(method.rule, slots, np.array([len(counts)]), np.array([sum(counts)])).sum())


def memory_bytes(method: Method, config: ModelConfig, example: Example, itemsize: int) -> int:
    """Bytes of keys and values that a session carries from its context to its tail.

    Args:
      method: full context carries every token, compressed memory its slots (the sink included; a mixture also its
        float32 form, `Method.mixed_slots`), no context nothing.
      config: the base model.
      example: the session.
      itemsize: bytes of a number, 4 for float32 and 2 for bfloat16.
    """
    slots = context_slots(method, example)
    return slots * config.kv_bytes_per_slot(itemsize) + bool(slots) * method.mixed_slots * config.kv_bytes_per_slot(4)


@functools.partial(jax.jit, static_argnames=("method", "implementation"))
def _parallel(model, made, *, method, implementation):
    hidden = parallel_forward(model, made, method=method, implementation=implementation)
    return scored_logits(model, hidden, made)


_read = jax.jit(read, static_argnames=("method", "query", "implementation"))
_compress = jax.jit(compress, static_argnames=("method", "implementation"))


@functools.partial(jax.jit, static_argnames=("graphdef", "method"))
def _parallel_gradients(adapter, base, made, *, graphdef, method):
    def loss(adapter):
        model = nnx.merge(graphdef, adapter, base)
        return mean_loss(model, parallel_forward(model, made, method=method), made, method)[0]

    return jax.value_and_grad(loss)(adapter)


@functools.partial(jax.jit, static_argnames=("graphdef", "method"))
def _recurrent_gradients(adapter, base, cache, arrays, *, graphdef, method):
    context, tail, targets, weights = arrays

    def loss(adapter):
        model = nnx.merge(graphdef, adapter, base)

        @jax.checkpoint
        def step(cache, scanned):
            chunk, targets, weights = scanned
            cache, logits = read(model, cache, chunk, method=method)
            cache = compress(model, cache, jnp.any(chunk.valid, axis=1), method=method)
            return cache, _total_loss(logits, targets, weights)

        closed, losses = jax.lax.scan(step, cache, (context, targets[0], weights[0]))
        _, logits = read(model, closed, tail, method=method, query=True)
        total = jnp.sum(losses) + _total_loss(logits, targets[1], weights[1])
        return total / jnp.maximum(jnp.sum(weights[0]) + jnp.sum(weights[1]), 1.0)

    return jax.value_and_grad(loss)(adapter)


def _total_loss(logits, targets, weights):
    """Sum of weighted losses for logits ``[B, C, V]``, targets and weights ``[B, C]``."""
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weights)
