"""Products of two arrays whose operands are rounded to one type while sums and results stand in another.

A processor with units for bfloat16 multiplies two bfloat16 matrices several times as fast as two of float32, and adds
up in float32 while it does so. What it must not be given is one operand of each type: XLA then turns the smaller type
into float32 first. So the backward pass, whose cotangents are float32, needs products of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def einsum(spec: str, a, b, *, compute=None, output=None) -> jax.Array:
    """``jnp.einsum(spec, a, b)`` with operands of one type, forward and backward.

    Args:
      spec: two terms without repeated letters; a letter of one term stands in the other or in the result, too, so that
        each gradient is a product of the same kind. No ellipsis.
      a, b: the operands, of any floating types.
      compute: type that both are rounded to; None for that of ``a``.
      output: type of the result, in which its cotangent comes; None for that of ``a``. At least float32 is summed in.

    Returns:
      The result in ``output``. Gradients have the types of ``a`` and ``b``.
    """
    compute = jnp.dtype(a.dtype if compute is None else compute)
    output = jnp.dtype(a.dtype if output is None else output)
    if a.dtype == b.dtype == compute == output:
        return jnp.einsum(spec, a, b)
    return _rounded(spec, compute.name, output.name, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rounded(spec: str, compute: str, output: str, a, b) -> Any:
    # Asked of XLA, whose product else has the type of its operands.
    total = np.promote_types(output, np.float32)
    found = jnp.einsum(spec, a.astype(compute), b.astype(compute), preferred_element_type=total)
    return found.astype(output)


def _forward(spec, compute, output, a, b):
    # Only what a gradient needs is kept: in training an adapter none of the activations before a frozen kernel.
    kept = b.value.astype(compute) if a.perturbed else None, a.value.astype(compute) if b.perturbed else None
    # As empty numbers, since residuals are arrays; gradients get the types of the operands before rounding.
    types = np.zeros((), a.value.dtype), np.zeros((), b.value.dtype)
    return _rounded(spec, compute, output, a.value, b.value), (kept, types)


def _backward(spec, compute, output, residuals, g):
    (b, a), types = residuals
    terms, result = spec.split("->")
    left, right = terms.split(",")
    # Rounded too: beside a float32 cotangent XLA would turn the kept operand into float32 (see above).
    g = g.astype(compute)

    def product(spec, x, like):
        return jnp.einsum(spec, g, x, preferred_element_type=jnp.float32).astype(like.dtype)

    # No letter is lost or repeated (see `einsum`), so that each gradient is again a product of two terms.
    to_a = None if b is None else product(f"{result},{right}->{left}", b, types[0])
    to_b = None if a is None else product(f"{result},{left}->{right}", a, types[1])
    return to_a, to_b


_rounded.defvjp(_forward, _backward, symbolic_zeros=True)
