"""When text that is still open becomes memory: at a length, where a sentence ends, or where the caller says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_ccm.errors import UserError
from jax_ccm.memory.cache import open_raw, raw_capacity
from jax_ccm.memory.steps import compress, read
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.types import Array, Chunk, Kind, MemoryCache, Method


@dataclasses.dataclass(frozen=True)
class Closing:
    """Where open text is closed while it is read or generated. Text that is marked as kept does not count.

    Attributes:
      length: most tokens of a span; with so many it is closed.
      after: ids of tokens that close the span that they end, such as those that end a sentence
        (`jax_ccm.data.template.sentence_ends`); () for none.
      shortest: fewest tokens of a span that one of ``after`` closes; with fewer it stays open. Sentinel tokens are
        trained on spans of 2 to 25.
    """

    length: int
    after: tuple[int, ...] = ()
    shortest: int = 2

    def __post_init__(self):
        if not 1 <= self.shortest <= self.length:
            raise UserError(
                f"spans are closed from shortest={self.shortest} to length={self.length} tokens; these must be at "
                "least 1, and in this order"
            )


def policy(method: Method, closing: Closing | None, *, query: bool) -> tuple[Closing | None, bool]:
    """Where a method's text is closed, and whether it is read as a query.

    Args:
      method: with `Method.chunk` it closes text at that length, and nowhere else.
      closing: what the caller asks for.
      query: whether the caller would read the text as a query or an answer.

    Returns:
      The closing, None to leave text open; and ``query``, but False where text that was read as a query is never
      compressed.

    Raises:
      UserError: for a method whose text cannot be closed while it is read.
    """
    if method.chunk is not None:
        if closing is not None:
            raise UserError(
                f"method {method.name!r} closes text every {method.chunk} tokens by itself; ask for no closing"
            )
        return Closing(method.chunk, shortest=method.chunk), query
    if closing is None:
        return None, query
    if not method.remembers:
        raise UserError(f"method {method.name!r} compresses nothing, so there is nothing to close")
    if method.context == "joined":
        raise UserError(f"method {method.name!r} compresses the whole context at once; close it with `compress`")
    if query and not method.sees_memory_in_context:
        raise UserError(
            f"method {method.name!r} compresses chunks that saw no memory, and an answer sees it: it cannot be closed "
            "while it is made. Read it again as context and close that"
        )
    return closing, query and not method.tells_queries_apart


def close_due(
    model: Transformer,
    cache: MemoryCache,
    token,
    valid,
    *,
    method: Method,
    closing: Closing | None,
) -> MemoryCache:
    """`compress` in the rows whose open text has just reached a place where it is to be closed.

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      token: ``int32 [B]``, the last token read in each row.
      valid: ``bool [B]``, rows that have just read one.
      method: static.
      closing: static; None closes nothing.
    """
    if closing is None:
        return cache
    held = _held(cache, method)
    due = valid & _due(closing, held, token, False)

    def close(cache):
        return compress(model, cache, due, method=method)

    return jax.lax.cond(jnp.any(due), close, lambda cache: cache, cache)


def prefill(
    model: Transformer,
    cache: MemoryCache,
    chunk: Chunk,
    *,
    method: Method,
    query: bool = False,
    closing: Closing | None = None,
    ends: Array | None = None,
) -> MemoryCache:
    """Reads text of any length and closes it on the way, prompt and answer alike (LoMA, section on generation).

    Args:
      model: the decoder with its adapter.
      cache: the sessions; their open text may be of different lengths.
      chunk: the text; what is marked as kept stays outside spans (Sentinel).
      method: static. With `Method.chunk` text is closed every so many tokens.
      query: as for `read`.
      closing: where text is closed by other methods, static; None leaves it open: then this is `read`.
      ends: ``bool [B, C]``, tokens that end a span of the caller's choice, besides what ``closing`` says. What stands
        before a span is told apart by `Chunk.kept`.

    Raises:
      UserError: for ``ends`` without a closing, whose length bounds a span, or a method that cannot close.
    """
    if ends is not None and (closing is None or method.chunk is not None):
        raise UserError("ends need a closing, whose length is that of the longest span, and a method without a chunk")
    closing, query = policy(method, closing, query=query)
    if closing is None:
        return read(model, cache, chunk, method=method, query=query)[0]
    # No piece can be longer than the raw region of the cache.
    width, length = min(closing.length, raw_capacity(cache)), chunk.tokens.shape[1]
    # Valid tokens in front, so that each row goes through its own text from left to right, at its own pace.
    front = jnp.argsort(~chunk.valid, axis=1, stable=True)

    def move(x):
        return jnp.take_along_axis(jnp.asarray(x), front, axis=1)

    tokens, count = move(chunk.tokens), jnp.sum(chunk.valid, axis=1)
    kept = jnp.zeros(tokens.shape, bool) if chunk.kept is None else move(chunk.kept)
    ends = jnp.zeros(tokens.shape, bool) if ends is None else move(ends)

    def fill(carry):
        cache, done = carry
        # Rows near their end read beyond it; what lies there is not valid.
        place = jnp.minimum(done[:, None] + jnp.arange(width), length - 1)

        def pick(x):
            return jnp.take_along_axis(x, place, axis=1)

        # As many tokens as the open span would have after each of these.
        held = _held(cache, method)[:, None] + jnp.cumsum(~pick(kept), axis=1)
        due = _due(closing, held, pick(tokens), pick(ends)) & ~pick(kept)
        # Each row reads up to the first place at which it closes, or all of the piece.
        first = jnp.where(jnp.any(due, axis=1), jnp.argmax(due, axis=1) + 1, width)
        take = jnp.minimum(first, count - done)
        piece = Chunk(pick(tokens), jnp.arange(width) < take[:, None], None if chunk.kept is None else pick(kept))
        cache, _ = read(model, cache, piece, method=method, query=query)
        # Whether the last token that was read is one that closes.
        closes = (take > 0) & jnp.take_along_axis(due, jnp.maximum(take - 1, 0)[:, None], axis=1)[:, 0]

        def shrink(cache):
            return compress(model, cache, closes, method=method)

        return jax.lax.cond(jnp.any(closes), shrink, lambda cache: cache, cache), done + take

    def unread(carry):
        return jnp.any(carry[1] < count)

    return jax.lax.while_loop(unread, fill, (cache, jnp.zeros_like(count)))[0]


def _held(cache: MemoryCache, method: Method):
    """``int32 [B]``: open tokens of each row that count towards a span.

    A sink begins the first chunk, and counts; a system message, which is kept beside it, does not.
    """
    raw, sinks = open_raw(cache, method), cache.slots.kind == Kind.SINK
    first = jnp.sum(raw & sinks, axis=1)
    return jnp.sum(raw & ~sinks, axis=1) + jnp.where(first <= method.sink, first, 0)


def _due(closing: Closing, held, token, end):
    """Whether a span of so many tokens, the last one ``token``, is to be closed now; ``end``: the caller says so."""
    due = (held >= closing.length) | end
    if closing.after:
        due |= jnp.isin(token, jnp.asarray(closing.after, jnp.int32)) & (held >= closing.shortest)
    return due
