"""What the kernels of all devices share: constants of the online softmax, two passes as one, heads as rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_ccm.rules.types import Slots

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
        # ``tanh'(x) = 1 - tanh(x)**2``, from the score itself.
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


def heads_as_rows(q, slots: Slots, kv_heads: int):
    """Queries ``[B, T, N, H]`` as ``[B, T G, K, H]``, with G = N / K, and their slots ``[B, T]`` as ``[B, T G]``."""
    batch, length, heads, size = q.shape
    group = heads // kv_heads
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, size), 3, 2)  # [B, T, G, K, H]
    return q.reshape(batch, length * group, kv_heads, size), slots.map(lambda x: jnp.repeat(x, group, axis=1))


def rows_as_heads(out, length: int):
    """``[B, T G, K, H]`` as ``[B, T, N, H]`` again, for T of ``length``."""
    batch, rows, kv_heads, size = out.shape
    out = out.reshape(batch, length, rows // length, kv_heads, size)
    return jnp.moveaxis(out, 2, 3).reshape(batch, length, -1, size)  # [B, T, K, G, H]


class Refused(ValueError):
    """The kernel does not take this call; the message says why."""
