"""What a session can still say of a closed chunk: LoMA's repetition, or token after token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_ccm.errors import UserError
from jax_ccm.memory.cache import append, open_raw, with_room
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.types import Kind, MemoryCache, Method, Slots
from jax_ccm.rules.visibility import gate


def repeat(
    model: Transformer,
    cache: MemoryCache,
    length: int,
    back: int = 1,
    *,
    method: Method,
    begin=None,
):
    """What a session can still say of a closed chunk, word for word.

    The raw text is gone from the cache, so nothing but memory can answer: in one pass of repetition tokens over it
    (LoMA, repetition zone), or, with `Method.repeat_by` "text", token after token, each fed the likeliest one before.

    Args:
      model: the decoder with its adapter.
      cache: the sessions; not changed.
      length: tokens of the chunk, the same in each row.
      back: how many chunks ago it was closed, from 1. A mixture of chunks still has only the last one apart.
      method: static; one with a `Method.repeat`.
      begin: ``int32 [B]``, position of the chunk's first token; None if it and all chunks since had the same length.

    Returns:
      Logits ``float32 [B, length, V]``, for each place of the chunk the token that stood there.
    """
    if method.repeat is None:
        raise UserError(f"method {method.name!r} has no repetition token; only methods trained with one can repeat")
    if back <= method.recent:
        raise UserError(
            f"the text of the last {method.recent} chunks is still there (method.recent); repeat one from further back "
            f"than that, not {back}"
        )
    # The chunk ended before all that was read since, of equal lengths, and before what is still open.
    if begin is None:
        raw = open_raw(cache, method) & (cache.slots.kind != Kind.SINK)
        begin = cache.next_position - jnp.sum(raw, axis=1) - length * back
    place = jnp.arange(length)[None]
    position = begin[:, None] + place

    def whole(value):
        return jnp.broadcast_to(jnp.asarray(value, jnp.int32), position.shape)

    # The segment of the closed chunk, whose memory is then at distance 0; index behind all of the cache.
    index = cache.next_position[:, None] + place
    slots = Slots(whole(Kind.REPEAT), whole((cache.chunks - back)[:, None]), index, position)
    tokens = whole(model.config.vocab_size + method.repeat.embedding_index)
    if method.repeat_by == "text":
        return _say_again(model, with_room(cache, length), tokens[:, 0], slots, method)
    hidden, _, _ = model(tokens, slots, gate(method, slots), rule=method.rule, memory=cache)
    return model.logits(hidden)


def _say_again(model: Transformer, cache: MemoryCache, prompt, slots: Slots, method: Method):
    """Logits ``float32 [B, length, V]`` of a greedy repetition; the cache has room for it.

    Args:
      model: the decoder with its adapter.
      cache: the sessions.
      prompt: ``int32 [B]``, what is fed first.
      slots: `Slots` of ``[B, length]``, of what is fed.
      method: static.
    """

    def say(carry, slots):
        cache, token = carry
        slots = slots.map(lambda x: x[:, None])
        hidden, (k, v), _ = model(token[:, None], slots, gate(method, slots), rule=method.rule, memory=cache)
        logits = model.logits(hidden[:, 0])
        return (append(cache, k, v, slots, token[:, None]), jnp.argmax(logits, axis=-1).astype(jnp.int32)), logits

    # [length, B]: each token is fed the one before.
    _, logits = jax.lax.scan(say, (cache, prompt), slots.map(lambda x: jnp.swapaxes(x, 0, 1)))
    return jnp.swapaxes(logits, 0, 1)
