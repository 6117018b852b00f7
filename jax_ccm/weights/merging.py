"""A low-rank branch as a part of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def add_low_rank(kernel, a, b, scale: float):
    # Layer by layer: a float32 copy of a whole stack would not fit beside a large model.
    def layer(args):
        w, a, b = args
        # "highest", because accelerators would round the operands of a float32 product.
        return (w.astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")).astype(w.dtype)

    return jax.lax.map(layer, (kernel, a, b))
