"""Compression without training: of all that a session has read, each head keeps the few keys of the highest score.

Nothing is run to close a chunk. Memory and the chunk's own text compete for as many slots as a trained method would
have. What stays keeps the rotation of its position. These answer "why train at all?" at equal bytes. For the chunks
``a b``, ``c d`` and the tail ``e``, one slot a chunk (own tokens left; memory right, after each chunk)::

          a b c d e | M1 M2 M2
    a     x . . . . | .  .  .
    b     x x . . . | .  .  .
    c     . . x . . | x  .  .
    d     . . x x . | x  .  .
    e     . . . . x | .  x  x
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.rules.clauses import see
from jax_ccm.rules.types import INF, Array, Kind, Method, Rule

TEXT, QUERY, SINK, MEMORY = Kind.TEXT, Kind.QUERY, Kind.SINK, Kind.MEMORY


@dataclasses.dataclass(frozen=True)
class ByAttention:
    """The score is the attention received so far: H2O (Zhang et al. 2023) sums it over all queries, ``decay`` 1; TOVA
    (Oren et al. 2024) takes the last query's, ``decay`` 0; between them the newest queries count most, as in the
    observation window of SnapKV (Li et al. 2024), whatever will be asked."""

    slots: int
    constant: bool
    decay: float | None

    def score(self, k: Array, attention: Array | None, index: Array, candidates: Array) -> Array:
        assert attention is not None
        return attention


@dataclasses.dataclass(frozen=True)
class ByNorm:
    """The score is a small norm of the key: such keys receive much attention (Devoto et al. 2024)."""

    slots: int
    constant: bool
    decay: float | None = None

    def score(self, k: Array, attention: Array | None, index: Array, candidates: Array) -> Array:
        return -(k.astype("float32") ** 2).sum(-1)


@dataclasses.dataclass(frozen=True)
class BySimilarity:
    """The score is the distance from the rest: the least cosine similarity to the mean direction is kept (KeyDiff, Park
    et al. 2025)."""

    slots: int
    constant: bool
    decay: float | None = None

    def score(self, k: Array, attention: Array | None, index: Array, candidates: Array) -> Array:
        k = k.astype("float32")
        # 1e-12 for keys of zeros, which have no direction.
        k = k / ((k**2).sum(-1, keepdims=True) + 1e-12) ** 0.5
        # The sum in place of the mean: only the order of the scores counts.
        mean = (k * candidates[None, :, :, None, None]).sum(2, keepdims=True)
        return -(k * mean).sum(-1)


@dataclasses.dataclass(frozen=True)
class ByChance:
    """The score is drawn once for each token, for all heads and layers alike: a uniform sample of all that was read."""

    slots: int
    constant: bool
    seed: int
    decay: float | None = None

    def score(self, k: Array, attention: Array | None, index: Array, candidates: Array) -> Array:
        # A hash of the token's place (the finalizer of MurmurHash3), which the token keeps from chunk to chunk.
        x = index.astype("uint32") + np.uint32(self.seed * 0x9E3779B9 % 2**32)
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        x = x ^ (x >> 16)
        # The upper 24 bits are exact in float32.
        return (x >> 8).astype("float32")[None, :, :, None] + np.zeros(k.shape[:-1], np.float32)


def evict(
    score: Literal["attention", "norm", "similarity", "random"] = "attention",
    slots: int = 2,
    constant: bool = False,
    sink: bool = True,
    discount: float | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> Method:
    """Training-free eviction.

    Args:
      score: by what an entry is kept: the accumulated "attention", small "norm" of the key, least "similarity" to
        the mean key, or "random".
      slots: entries that stay for each closed chunk.
      constant: slots is the number for the whole session.
      sink: keep the first token of the session visible to all.
      discount: what each token read multiplies earlier attention by, from 0 (the last query decides, TOVA) to 1 (all
        queries count alike, H2O; the default); for score "attention" only.
      seed: of score "random".
      streaming: positions are indices in the cache, as in StreamingLLM, so that a session may be longer than the base's
        positions; otherwise what stays keeps its own.
    """
    if slots < 1:
        raise UserError(f"slots is {slots}; it must be at least 1")
    if discount is not None and score != "attention":
        raise UserError(f"discount is {discount}, but score is {score!r}; only score 'attention' has one")
    if discount is not None and not 0 <= discount <= 1:
        raise UserError(f"discount is {discount}; it must lie between 0 and 1")
    if seed and score != "random":
        raise UserError(f"seed is {seed}, but score is {score!r}; only score 'random' draws")
    policies = {
        "attention": lambda: ByAttention(slots, constant, 1.0 if discount is None else discount),
        "norm": lambda: ByNorm(slots, constant),
        "similarity": lambda: BySimilarity(slots, constant),
        "random": lambda: ByChance(slots, constant, seed),
    }
    if score not in policies:
        raise UserError(f"score is {score!r}; allowed: {', '.join(policies)}")
    # A selection replaces the one before: memory is of the last chunk closed, at distance 1, and older is out of sight.
    clauses = [see((TEXT, QUERY), (TEXT, QUERY), 0, 0), see((TEXT, QUERY), MEMORY, 1, 1)]
    if sink:
        clauses.append(see((TEXT, QUERY, SINK), SINK, 0, INF))
    rope = "cache" if streaming else "running"
    return Method(name="evict", rule=Rule(tuple(clauses)), sink=sink, rope=rope, eviction=policies[score]())
