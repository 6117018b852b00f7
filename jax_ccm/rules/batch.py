"""The arrays of a parallel forward with its loss."""

from __future__ import annotations

import dataclasses

import jax

from jax_ccm.rules.types import Array, Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The memory of a parallel forward: which tokens write it, how, and its slots.

    Attributes:
      source: ``int32 [B, P]``, indices in the row of the tokens that write memory; unused entries are 0
        and reach only slots of kind PAD, or have no share.
      slots: `Slots` of ``[B, M]``, kind MEMORY or PAD.
      mix: ``float32 [B, M, P]``, weights of the sources in each memory slot, or None where memory slot
        j is source j (M = P). Rows of dead slots are zero.
      share: ``float32 [B, P]`` or None. If given, memory slot j is the sum of the c = P / M sources from ``j c`` on,
        each times its share (pooling).
    """

    source: Array
    slots: Slots
    mix: Array | None
    share: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Fixed-shape arrays of a parallel forward with loss. Made on the host by `rows.batch`.

    Attributes:
      tokens: ``int32 [B, T]``; ids of compression tokens are V, V + 1, ...; 0 on padding.
      slots: `Slots` of ``[B, T]``.
      memory: `Packed`, or None for a method that writes no memory.
      indices: ``int32 [B, Q]``, index in the row of the token whose hidden state predicts each scored token.
      targets: ``int32 [B, Q]``, the scored tokens.
      weights: ``float32 [B, Q]``, 1 where scored, 0 on padding.
      steps: ``int32 [B, Q]``, number of chunks that were closed before each scored token.
    """

    tokens: Array
    slots: Slots
    memory: Packed | None
    indices: Array
    targets: Array
    weights: Array
    steps: Array
