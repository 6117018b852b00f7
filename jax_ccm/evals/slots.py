"""What a memory weighs: slots and bytes by formula."""

from __future__ import annotations

import numpy as np

from jax_ccm.nn.config import ModelConfig
from jax_ccm.rules.examples import Example
from jax_ccm.rules.rows import arrange
from jax_ccm.rules.types import Kind, Method, Slots
from jax_ccm.rules.visibility import reachable


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
