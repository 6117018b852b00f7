"""What the kernels of all devices share: constants of the online softmax, and two passes as one function."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

# A hidden score, and the maximum before anything was seen: far enough apart that exp(HIDDEN - UNSEEN) is 0.
HIDDEN, UNSEEN = -1e30, -1e20


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
