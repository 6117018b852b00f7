"""Decoders with arbitrary weights, made on the device: what is measured does not depend on their values."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.config.schema import Config
from jax_ccm.devices.record import DoesNotFit
from jax_ccm.distributed import sharding
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer, abstract_transformer


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device alone: all numbers of the check are those of one."""
    return sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])


def bytes_limit() -> int:
    """Memory of the device that a program may have; half of the machine's where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def arbitrary(shape: ModelConfig, adapter: AdapterConfig, precision: str) -> Transformer:
    """A decoder whose weights are small numbers of both signs, and whose norms are one.

    Raises:
      DoesNotFit: if they take more than the device has.
    """
    abstract = abstract_transformer(shape, adapter, precision)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    if size > bytes_limit():
        raise DoesNotFit(f"weights of {size / 2**30:.1f} GiB; the device has {bytes_limit() / 2**30:.1f}")

    # Of each number's place alone, so that no temporary is as large as a stack of weights.
    def values(path, x):
        return _values(jax.tree_util.keystr(path), x)

    def make():
        return jax.tree_util.tree_map_with_path(values, abstract)

    return jax.jit(make, out_shardings=sharding.parameter_shardings(one_device(), abstract, shape))()


def _values(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
    if "norm" in name:
        return jnp.ones(x.shape, x.dtype)
    place = jnp.zeros(x.shape, jnp.uint32)
    # The primes of xxHash32: one for each axis.
    for axis, factor in zip(range(len(x.shape)), (2654435761, 2246822519, 3266489917, 668265263), strict=False):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(factor)
    place = (place ^ (place >> 15)) * np.uint32(2246822519)
    # 24 bits, which float32 holds exactly: from -0.03 up to 0.03.
    return ((place >> 8).astype(jnp.float32) * (0.06 / 2**24) - 0.03).astype(x.dtype)


def experiment(config: Config, shape: ModelConfig) -> Experiment:
    """What a config describes, with such a decoder in the place of its base, on one device."""
    method = build(config.method.name, **config.method.options())
    given = config.adapter
    adapter = AdapterConfig(given.rank, given.alpha, given.dropout, given.targets, tokens=method.num_embeddings)
    return Experiment(config, arbitrary(shape, adapter, config.model.precision), method, None, one_device())
