"""Types of numbers, and products of them."""

from jax_ccm.numerics.precision import NAMED, Precision, automatic, resolved
from jax_ccm.numerics.products import einsum

__all__ = ["NAMED", "Precision", "automatic", "einsum", "resolved"]
