"""What the kernels of all devices share: constants of the online softmax, and two passes as one function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# A hidden score, and the maximum before anything was seen: far enough apart that exp(HIDDEN - UNSEEN) is 0.
HIDDEN, UNSEEN = -1e30, -1e20


@dataclasses.dataclass(frozen=True)
class Score:
    """How the product of a query and a key becomes their score.

    Attributes:
      scale: what it is multiplied by.
      cap: if set, c of ``c tanh(x / c)``, which keeps scores within ``(-c, c)`` (Gemma 2).
    """

    scale: float
    cap: float | None = None

    def of(self, products):
        """Scores, float32."""
        scores = products * self.scale
        return scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)

    def back(self, gradients, scores):
        """Gradients of the scaled products, from those of their scores."""
        return gradients if self.cap is None else gradients * (1 - (scores / self.cap) ** 2)


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Attention of which the gradients are known.

    Args:
      forward: ``(call, q, q_slots, sources) -> out, lse``; ``call`` is static, a source is ``(k, v, slots)``.
      backward: ``(call, q, q_slots, sources, out, lse, d_out) -> d_q, [(d_k, d_v) of each source]``.

    Returns:
      ``(call, q, q_slots, sources) -> out``. Only its arguments, ``out`` and ``lse`` are kept for the gradients.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(call, q, q_slots, sources):
        return forward(call, q, q_slots, sources)[0]

    def keep(call, q, q_slots, sources):
        out, lse = forward(call, q, q_slots, sources)
        return out, (q, q_slots, sources, out, lse)

    def pull(call, kept, d_out):
        d_q, d_sources = backward(call, *kept, d_out)
        return d_q, None, tuple((d_k, d_v, None) for d_k, d_v in d_sources)

    attend.defvjp(keep, pull)
    return attend
