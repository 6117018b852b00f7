"""The definition of attention to what a rule shows, and its gradients: plain float64, on the host.

Kernels are held against it, in the tests and on a device (`jax_ccm.devices.numbers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_ccm.attention.shared import Score
from jax_ccm.rules import visibility
from jax_ccm.rules.types import Rule, Slots


def exact(
    rule: Rule,
    q_slots: Slots,
    q: Any,
    sources: Sequence[tuple[Any, Any, Slots]],
    d_out: Any,
    score: Score | None = None,
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Output and gradients.

    Args:
      rule: who sees whom.
      q_slots: `Slots` of ``[B, T]``.
      q: ``[B, T, N, H]`` queries.
      sources: for each source of keys ``(k, v, slots)``: ``[B, S, K, H]`` twice and `Slots` of ``[B, S]``.
      d_out: ``[B, T, N, H]``, the gradient of the output.
      score: how products become scores; None for ``H ** -0.5`` times them.

    Returns:
      ``float64``: the output ``[B, T, N, H]``, the gradient of the queries, and for each source those of its keys and
      values.
    """

    def wide(x):
        return np.asarray(x, np.float64)

    group = q.shape[2] // sources[0][0].shape[2]
    k, v = (np.concatenate([wide(s[i]) for s in sources], axis=1) for i in (0, 1))
    # [B, 1, T, S]: the same for all heads.
    mask = np.concatenate([np.asarray(visibility.visible(rule, q_slots, s[2])) for s in sources], axis=-1)[:, None]
    score = score or Score(q.shape[3] ** -0.5)
    q, d_out = wide(q), wide(d_out)
    each_k, each_v = (np.repeat(x, group, axis=2) for x in (k, v))  # [B, S, N, H]
    products, slope = np.einsum("btnh,bsnh->bnts", q, each_k) * score.scale, score.scale
    if score.cap is not None:
        products = score.cap * np.tanh(products / score.cap)
        slope = score.scale * (1 - (products / score.cap) ** 2)
    scores = np.where(mask, products, -np.inf)
    # A row that sees nothing has a finite top, and so weights of 0 instead of NaN.
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - top)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", weights, each_v)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, each_v)
    # The gradient of a softmax: weights times what is above the weighted mean.
    d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True)) * slope

    def shared(x):
        # Query heads of a group, neighbours, share a key: its gradient is the sum over them.
        return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3)

    d_q = np.einsum("bnts,bsnh->btnh", d_scores, each_k)
    d_k = shared(np.einsum("bnts,btnh->bsnh", d_scores, q))
    d_v = shared(np.einsum("bnts,btnh->bsnh", weights, d_out))
    ends = np.cumsum([s[0].shape[1] for s in sources])[:-1]
    return out, d_q, list(zip(np.split(d_k, ends, axis=1), np.split(d_v, ends, axis=1), strict=True))
