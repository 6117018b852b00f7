"""What a memory weighs: slots and bytes by formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_ccm.nn.config import ModelConfig
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.occupancy import occupancy
from jax_ccm.rules.rows import arrange
from jax_ccm.rules.types import Method


def context_slots(method: Method, example: Example, capacity: int | None = None) -> int:
    """Key/value slots that a session holds once its context is closed and before its tail is read.

    Args:
      method: the compression method.
      example: the session.
      capacity: memory slots that there is room for, of which the oldest are gone; None for any number.
    """
    *context, _ = arrange(method, example)
    return _held(method, context, capacity)


def held_slots(method: Method, example: Example, capacity: int | None = None) -> int:
    """Key/value slots that a session holds when all of its text is read, the tail raw; arguments of `context_slots`."""
    *context, tail = arrange(method, example)
    if method.remembers:
        return _held(method, context, capacity) + len(tail.tokens)
    return _held(method, [*context, dataclasses.replace(tail, kept=np.ones(len(tail.tokens), bool))], capacity)


def _held(method: Method, chunks: Sequence[Segment], capacity: int | None = None) -> int:
    """Live slots after closed chunks."""
    kept = [np.zeros(len(s.tokens), bool) if s.kept is None else s.kept for s in chunks]
    found = occupancy(
        method, [len(s.tokens) for s in chunks], np.concatenate(kept) if kept else None, capacity=capacity
    )
    return len(found.kind)


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
