"""Memory of which several tokens or chunks have shares: pooled slots, and mixtures."""

from __future__ import annotations

import numpy as np

from jax_ccm.rules.types import Method


def pools(indices: np.ndarray, segment: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which text each pooled slot is the mean of: ``size`` neighbours of one segment, or the fewer that remain.

    Args:
      indices: of the text, in order.
      segment: of each place of the row.
      size: tokens for a slot.

    Returns:
      Sources and their shares, both ``[slots * size]`` and 0 where a slot has fewer; the last place of each slot.
    """
    own = segment[indices]
    # The number of a token within its segment, since `own` ascends; and that of its slot.
    rank = np.arange(len(indices)) - np.searchsorted(own, own)
    slot = np.cumsum(rank % size == 0) - 1
    count = np.bincount(slot, minlength=1 if len(slot) else 0)
    source, share = np.zeros((len(count), size), np.int64), np.zeros((len(count), size))
    source[slot, rank % size], share[slot, rank % size] = indices, 1 / count[slot]
    return source.reshape(-1), share.reshape(-1), indices[np.cumsum(count) - 1]


def mix_matrix(method: Method, sources: int, size: int) -> np.ndarray:
    """``float32 [M, P]``: row ``t * n + k`` holds the weights of slot k of all chunks in the mixture of chunk t.

    Chunks ``t`` and ``t - groups`` enter the same (`Method.groups`).
    """
    assert method.mix is not None
    per_chunk, groups = method.slots_per_chunk, method.groups
    chunks = sources // per_chunk
    weights = np.zeros((chunks, chunks))
    # The recurrence ``state(t) = (1 - rate) state(t - groups) + rate new(t)``, unrolled into weights of each chunk.
    for t in range(chunks):
        rate = float(method.mix.rate(t // groups + 1))
        if t >= groups:
            weights[t] = (1 - rate) * weights[t - groups]
        weights[t, t] = rate
    matrix = np.zeros((size, size), np.float32)
    # Slot k of a mixture is made of the k-th slots alone: weights of chunks times the identity over slots.
    matrix[:sources, :sources] = np.kron(weights, np.eye(per_chunk))
    return matrix
