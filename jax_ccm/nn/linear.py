"""Linear layers, and the conditional LoRA that fires only on some tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_ccm.nn.config import AdapterConfig
from jax_ccm.numerics import Precision, einsum
from jax_ccm.rules.types import Array


class Gate(NamedTuple):
    """A gate that is 0 but for a few tokens of each row.

    Attributes:
      values: ``float32 [B, P]``.
      indices: ``int32 [B, P]``, the tokens that have them; one that stands twice counts twice.
    """

    values: Array
    indices: Array


class Linear(nnx.Module):
    """``y = x W + b``, with an optional gated low-rank branch.

    With an adapter (CCM, section 3.2; equation 5)::

        y = x W + b + gate * (alpha / r) * dropout(x) A B

    where the gate is one number per token. Gate 0 leaves ``x W + b`` bit for bit as it was.

    Attributes:
      kernel: ``[in, out]``; ``[out, in]`` if `transposed`; None if `fused` with others.
      bias: ``[out]`` or None.
      lora_a, lora_b: float32 ``[in, r]`` and ``[r, out]``, or None.
    """

    def __init__(
        self,
        key,
        in_features: int,
        out_features: int,
        *,
        bias=False,
        adapter: AdapterConfig | None = None,
        precision: Precision = Precision(),
    ):
        key, key_a = jax.random.split(key)
        init = jax.random.normal(key, (in_features, out_features), jnp.float32) * in_features**-0.5
        self.kernel = nnx.Param(init.astype(precision.params))
        self.precision, self.transposed = precision, False
        self.bias = nnx.Param(jnp.zeros((out_features,), precision.params)) if bias else None
        if adapter is not None and adapter.rank:
            # Kaiming-uniform with a = sqrt(5), as in the LoRA and CCM code: U(-1/sqrt(in), 1/sqrt(in)).
            bound = in_features**-0.5
            self.lora_a = nnx.LoRAParam(
                jax.random.uniform(key_a, (in_features, adapter.rank), jnp.float32, -bound, bound)
            )
            # Zeros, as in the LoRA and CCM code: an untrained adapter leaves the base as it is.
            self.lora_b = nnx.LoRAParam(jnp.zeros((adapter.rank, out_features), jnp.float32))
        else:
            self.lora_a = self.lora_b = None
        self.scale = adapter.scale if adapter is not None else 0.0
        self.dropout = adapter.dropout if adapter is not None else 0.0

    def __call__(self, x, gate=None, dropout_key=None):
        """Applies the layer.

        Args:
          x: ``[B, T, in]``.
          gate: ``float32 [B, T]``, 1 where the LoRA acts; a `Gate`, for which it is run on few tokens; or None for
            nowhere.
          dropout_key: PRNG key of the dropout on the LoRA's input, or None for no dropout.

        Returns:
          ``[B, T, out]`` of the type `Precision.output`.
        """
        return self.complete(self.product(x), x, gate, dropout_key)

    def product(self, x):
        """``x W``."""
        assert self.kernel is not None
        return _product(self.precision, x, self.kernel[...], "oi" if self.transposed else "io")

    def complete(self, y, x, gate=None, dropout_key=None):
        """The layer's output for ``y = x W``: with bias and branch."""
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if self.lora_a is None or gate is None:
            return y
        if isinstance(gate, Gate):
            # Row by row: with row numbers as indices the compiler would gather the rows of all devices.
            # [B, P, out] of the P gated tokens alone.
            delta = self._branch(jax.vmap(lambda x, place: x[place])(x, gate.indices), gate.values, dropout_key)
            add = jax.vmap(lambda y, place, delta: y.at[place].add(delta))
            # Added, not set: unused indices all point to place 0, with a gate of 0.
            return add(y, gate.indices, delta.astype(y.dtype))
        return y + self._branch(x, gate, dropout_key).astype(y.dtype)

    def _branch(self, x, gate, dropout_key):
        """``gate * (alpha / r) * dropout(x) A B``, float32."""
        assert self.lora_a is not None and self.lora_b is not None
        # float32 throughout, whatever the base computes in: as CCM's code keeps and runs its LoRA.
        h = x.astype(jnp.float32)
        if dropout_key is not None and self.dropout:
            keep = jax.random.bernoulli(dropout_key, 1.0 - self.dropout, h.shape)
            h = jnp.where(keep, h / (1.0 - self.dropout), 0.0)
        delta = (h @ self.lora_a[...]) @ self.lora_b[...]
        return gate[..., None] * self.scale * delta


def _product(precision: Precision, x, kernel, axes: str):
    """``x W`` for ``[B, T, in]``, or as many axes in front as there are, and a kernel of axes "io" or "oi"."""
    # The letters i and o are the kernel's; `einsum` takes no ellipsis.
    front = "abcdefgh"[: x.ndim - 1]
    return einsum(f"{front}i,{axes}->{front}o", x, kernel, compute=precision.compute, output=precision.output)


def transposed(layer: Linear) -> Linear:
    """The same layer, its kernel with outputs in front: each is then one run through memory."""
    assert layer.kernel is not None
    made = copy.copy(layer)
    made.kernel, made.transposed = nnx.Param(layer.kernel[...].T), not layer.transposed
    return made


class Fused(nnx.Module):
    """Layers that read the same input, their products done as one: for one token, few large ones are faster.

    Attributes:
      kernel: ``[in, sum of outs]``.
      parts: the layers, without their kernels.
      ends: where in the output each ends.
    """

    def __init__(self, layers: Sequence[Linear]):
        kernels = [layer.kernel[...] for layer in layers if layer.kernel is not None]
        self.kernel = nnx.Param(jnp.concatenate(kernels, axis=1))
        self.parts = nnx.List([copy.copy(layer) for layer in layers])
        # The parts keep bias and LoRA; the joined kernel takes the place of theirs.
        for part in self.parts:
            part.kernel = None
        self.ends = tuple(itertools.accumulate(kernel.shape[1] for kernel in kernels))

    def __call__(self, x, gate=None, dropout_keys=None) -> list[Array]:
        """The output of each layer; arguments as for `Linear`, a key for each."""
        products = jnp.split(_product(self.parts[0].precision, x, self.kernel[...], "io"), self.ends[:-1], axis=-1)
        keys = dropout_keys or [None] * len(self.parts)
        return [part.complete(y, x, gate, key) for part, y, key in zip(self.parts, products, keys, strict=True)]
