"""Products whose operands are rounded: the values and gradients that the rounding alone explains."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.numerics import einsum

SPECS = {
    "bti,io->bto": ((2, 5, 16), (16, 12)),
    "bti,oi->bto": ((2, 5, 16), (12, 16)),
    "bkqh,bksh->bkqs": ((2, 3, 5, 16), (2, 3, 7, 16)),
    "bkqs,bksh->bkqh": ((2, 3, 5, 7), (2, 3, 7, 16)),
}


def operands(spec: str):
    keys = jax.random.split(jax.random.key(0), 2)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, SPECS[spec], strict=True)]


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_those_of_rounded_operands(spec):
    """Forward, and both gradients, equal float32 products of operands that were rounded by hand."""
    a, b = operands(spec)
    weights = jax.random.normal(jax.random.key(1), jnp.einsum(spec, a, b).shape)
    mixed = lambda a, b: einsum(spec, a, b, compute="bfloat16", output="float32")
    value, pull = jax.vjp(mixed, a, b)
    exact, pull_exact = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), rounded(a), rounded(b))
    np.testing.assert_allclose(value, exact, atol=1e-5)
    for ours, theirs in zip(pull(weights), pull_exact(rounded(weights)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_every_product_has_operands_of_one_type(spec):
    """XLA turns the smaller of two types into the larger one before it multiplies: no product may mix them."""
    a, b = operands(spec)
    b = b.astype(jnp.bfloat16)
    loss = lambda a, b: jnp.sum(jnp.sin(einsum(spec, a, b, compute="bfloat16", output="float32")))
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(a, b))
    assert text.count("dot_general") >= 3
    grads = jax.grad(loss, argnums=(0, 1))(a, b)
    assert [x.dtype for x in grads] == [a.dtype, b.dtype]

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield {str(x.aval.dtype) for x in eqn.invars}
            for inner in eqn.params.values():
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)

    found = list(products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(a, b).jaxpr))
    assert found and all(types == {"bfloat16"} for types in found)


def test_one_type_is_the_plain_product():
    a, b = operands("bti,io->bto")
    assert np.array_equal(einsum("bti,io->bto", a, b), jnp.einsum("bti,io->bto", a, b))


def test_nothing_is_kept_for_frozen_weights():
    """In training an adapter the activations before a frozen kernel are not kept for the backward pass."""
    x, kernel = operands("bti,io->bto")
    kept = lambda argnums: jax.vjp(
        (lambda x: einsum("bti,io->bto", x, kernel, compute="bfloat16", output="float32")) if argnums == 0 else
        (lambda kernel: einsum("bti,io->bto", x, kernel, compute="bfloat16", output="float32")),
        x if argnums == 0 else kernel,
    )[1]  # fmt: skip
    shapes = lambda pull: {leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape") and leaf.ndim}
    assert shapes(kept(0)) == {kernel.shape}
    assert shapes(kept(1)) == {x.shape}
