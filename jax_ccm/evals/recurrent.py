"""Likelihoods of scored tokens by the recurrence, for methods that have no parallel form."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.evals.parity import Stream, cache_for, stream
from jax_ccm.memory.cache import check, init_cache
from jax_ccm.memory.steps import compress, read, stream_step
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.examples import Example
from jax_ccm.rules.rows import arrange
from jax_ccm.rules.types import Array, Chunk, MemoryCache, Method

# Chunks and tails are padded to multiples of this, so that a few shapes serve all lengths.
MULTIPLE = 32


def score_recurrently(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    rows: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores examples chunk by chunk.

    Args:
      model: the decoder with its adapter.
      method: what the examples are run with.
      examples: sessions of any lengths.
      rows: rows of a batch.

    Returns:
      For each example, in the order given, ``float64 [q]`` negative log-likelihoods in nats and ``bool [q]`` whether
      the token is the most likely one, of its scored tokens.
    """
    sizes = [[len(segment.tokens) for segment in arrange(method, example)] for example in examples]
    # Neighbours in this order have as many chunks, of about the same lengths.
    order = sorted(range(len(examples)), key=lambda i: (len(sizes[i]), max(sizes[i])))
    # One shape of cache for all.
    roomy = jax.eval_shape(lambda: cache_for(model, method, examples))
    most = roomy.k.shape[2] - roomy.memory_capacity
    found: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(examples)
    for first in range(0, len(order), rows):
        those = order[first : first + rows]
        fill = those + those[:1] * (rows - len(those))
        cache = init_cache(
            model,
            method,
            rows,
            memory_capacity=roomy.memory_capacity,
            raw_capacity=_padded(most),
        )
        scored = _score(model, method, cache, stream(method, [examples[i] for i in fill]))
        for row, index in enumerate(those):
            found[index] = scored[row]
    return [scores for scores in found if scores is not None]


def _score(model, method: Method, cache, sessions: Stream) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of each row of a batch."""
    parts: list[tuple[np.ndarray, ...]] = []
    for time in range(sessions.context.tokens.shape[0]):
        chunk = jax.tree.map(operator.itemgetter(time), sessions.context)
        targets, weights = sessions.targets[0][time], sessions.weights[0][time]
        asked = bool(weights.any())
        cache, *found = _step(model, cache, *_fit(chunk, targets), method=method, close=True, asked=asked)
        if asked:
            parts.append((weights, *found))
    tail = _fit(sessions.tail, sessions.targets[1])
    cache, *found = _step(model, cache, *tail, method=method, close=False, asked=True)
    parts.append((sessions.weights[1], *found))
    check(cache)
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in sessions.tail.tokens]
    for weights, losses, hits in parts:
        losses, hits = np.asarray(losses, np.float64), np.asarray(hits)
        for row, used in enumerate(weights > 0):
            where = np.flatnonzero(used)
            rows[row].append((losses[row, where], hits[row, where]))
    join = lambda pieces, kind: np.concatenate([np.zeros(0, kind), *pieces])
    return [(join([a for a, _ in row], np.float64), join([b for _, b in row], bool)) for row in rows]


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _fit(chunk: Chunk, targets: np.ndarray) -> tuple[Chunk, np.ndarray]:
    """A chunk and its targets, padded on the right to one of few lengths."""
    length = chunk.tokens.shape[1]
    pad = lambda x: np.pad(x, ((0, 0), (0, _padded(length) - length)))
    return jax.tree.map(pad, chunk), pad(targets)


@functools.partial(jax.jit, static_argnames=("method", "close", "asked"), donate_argnums=1)
def _step(model, cache, chunk, targets, *, method, close, asked):
    """Reads a chunk and closes it, or reads a tail; if asked, losses ``[B, C]`` and hits of the token behind each."""
    cache, logits = read(model, cache, chunk, method=method, query=not close)
    if close:
        cache = compress(model, cache, jnp.any(chunk.valid, axis=1), method=method)
    if not asked:
        # Without a reader, the logits are not even computed.
        return (cache,)
    target = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
    return cache, jax.nn.logsumexp(logits, axis=-1) - target, jnp.argmax(logits, axis=-1) == targets


def stream_losses(
    model: Transformer, cache: MemoryCache, tokens, targets, valid, *, method: Method, window: int, closes: Array
):
    """Feeds text token by token, compressing whenever the window is full (CCM, section 4.3).

    Args:
      model: the decoder with its adapter.
      cache: the sessions; see `steps.stream_step`.
      tokens: ``int32 [B, T]``.
      targets: ``int32 [B, T]``, the token after each.
      valid: ``bool [B, T]``.
      method: static.
      window: live slots at which a row compresses; static.
      closes: how many of the oldest raw tokens are then compressed.

    Returns:
      The cache, and the negative log-likelihood of the targets, ``float32 [B, T]``, 0 where not valid.
    """

    def body(cache, scanned):
        token, target, use = scanned
        cache, logits = stream_step(
            model, cache, Chunk(token[:, None], use[:, None]), method=method, window=window, closes=closes
        )
        logits = logits[:, 0]
        score = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return cache, (jax.nn.logsumexp(logits, axis=-1) - score) * use

    cache, losses = jax.lax.scan(body, cache, (jnp.swapaxes(tokens, 0, 1), jnp.swapaxes(targets, 0, 1), valid.T))
    return cache, losses.T
