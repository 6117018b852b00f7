"""How what is written enters a memory that does not simply grow: as a mixture, or as a selection."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

Array = Any  # a numpy array on the host, a jax array under jit


class Mix(Protocol):
    """A memory that is a mixture: ``memory_t = (1 - rate(t)) memory_(t-1) + rate(t) new_t``."""

    def rate(self, step: Array) -> Array:
        """Weight of chunk number ``step`` (from 1; numpy or jax integers) in the new memory."""
        ...


@dataclasses.dataclass(frozen=True)
class Mean:
    """Running arithmetic mean, ``rate(t) = 1 / t`` (CCM-merge, ICLR 2024, section 3.1)."""

    def rate(self, step: Array) -> Array:
        return 1.0 / step


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving average, ``rate(1) = 1`` and ``rate(t) = decay`` after (CCM, table 16)."""

    decay: float = 0.5

    def __post_init__(self):
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay is {self.decay}; it must lie in (0, 1]: it is the weight of the newest chunk")

    def rate(self, step: Array) -> Array:
        # By arithmetic, since the step may be traced. The first chunk is all there is: its weight is 1.
        return 1.0 * (step <= 1) + self.decay * (step > 1)


class EvictionPolicy(Protocol):
    """A memory that is a selection: of all that a session holds when a chunk is closed, the best by score stay.

    Each head of each layer keeps its own. Nothing is trained; recurrent only.

    Attributes:
      slots: entries that stay for each closed chunk.
      constant: ``slots`` is the number for the whole session instead.
      decay: if set, the cache adds up the attention that each entry receives, and each token that is read multiplies
        what was added up before it by this.
    """

    slots: int
    constant: bool
    decay: float | None

    def score(self, k: Array, attention: Array | None, index: Array, candidates: Array) -> Array:
        """The score of each entry; the highest stay.

        Args:
          k: ``[L, B, S, K, H]`` keys.
          attention: ``float32 [L, B, S, K]``, attention received, or None without ``decay``.
          index: ``int32 [B, S]``.
          candidates: ``bool [B, S]``, the entries that are chosen from.

        Returns:
          ``float32 [L, B, S, K]``; only the order counts.
        """
        ...
