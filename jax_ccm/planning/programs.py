"""The programs of training and serving with abstract arguments: shapes and shardings, no memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.config.schema import Config
from jax_ccm.data.batches import caps
from jax_ccm.distributed import sharding
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.steps import compress, read
from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer, abstract_transformer
from jax_ccm.numerics import Precision
from jax_ccm.rules import rows as layout
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Chunk, MemoryCache, Method
from jax_ccm.training.step import init_state, make_optimizer, make_schedule, make_step, split

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function and abstract arguments for it.

    Attributes:
      function: the jitted function.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      kinds: the arguments once more, by what they are: "weights", "adapter", "optimizer", "cache", "batch".
      mesh: the devices.
    """

    function: Any
    arguments: tuple[Tree, ...]
    kinds: dict[str, Tree]
    mesh: jax.sharding.Mesh

    def compile(self) -> Any:
        """Lowers and compiles for the devices of the mesh."""
        with sharding.use(self.mesh):
            return self.function.lower(*self.arguments).compile()


def on(shardings: Tree, tree: Tree) -> Tree:
    """The abstract tree with a sharding on each array."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def device_bytes(tree: Tree) -> int:
    """Bytes of an abstract tree on each device."""
    sizes = (np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return int(sum(sizes))


def abstract_model(config: Config, shape: ModelConfig, method: Method, mesh: jax.sharding.Mesh) -> Transformer:
    """The model of a config, base and adapter, with the shardings that it is initialised with."""
    given = config.adapter
    adapter = AdapterConfig(given.rank, given.alpha, given.dropout, given.targets, tokens=method.num_embeddings)
    model = abstract_transformer(shape, adapter, config.model.precision)
    return on(sharding.parameter_shardings(mesh, model, shape), model)


def abstract_batch(config: Config, shape: ModelConfig, method: Method, rows: int) -> Batch:
    """A training batch of the sizes that the config fixes, as numpy makes it."""
    # The smallest session: all arrays have the sizes that the config fixes, whatever is in them.
    token = Segment(np.zeros(1, np.int32), np.ones(1, bool))
    example = Example(np.zeros(1, np.int32), np.zeros(0, np.int32), (token,))
    made = layout.batch(method, [example], caps(config.data, method), shape.vocab_size)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), made)


def training_step(
    config: Config, shape: ModelConfig, method: Method, mesh: jax.sharding.Mesh, rows: int, accumulation: int
) -> Program:
    """The training step of `jax_ccm.training.run`, for so many rows of a micro-batch over all devices."""
    model = abstract_model(config, shape, method, mesh)
    graphdef, params, frozen = split(model, config.train.trainable)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.steps))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    shardings = sharding.parameter_shardings(mesh, state, shape)
    state = on(shardings, state)
    batch = abstract_batch(config, shape, method, rows)
    # [accumulation, rows, ...], as the step scans over it.
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((accumulation, *x.shape), x.dtype), batch)
    batch = on(sharding.batch_shardings(mesh, batch, leading=1), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    out = (shardings, sharding.replicated(mesh))
    dropout = config.adapter.dropout > 0
    step = make_step(
        graphdef, method, optimizer, config.train, objective=config.objective, dropout=dropout, shardings=out
    )
    kinds = {"weights": frozen, "adapter": state["params"], "optimizer": state["optimizer"], "batch": batch}
    return Program(step, (state, frozen, batch, key), kinds, mesh)


def abstract_cache(
    config: Config, shape: ModelConfig, method: Method, mesh: jax.sharding.Mesh, sessions: int, slots: int, raw: int
) -> MemoryCache:
    """The cache of so many sessions, ``slots`` for memory and ``raw`` for text."""

    def make():
        return init_cache(
            shape,
            method,
            sessions,
            memory_capacity=slots,
            raw_capacity=raw,
            dtype=Precision.of(config.model.precision).output,
        )

    cache = jax.eval_shape(make)
    return on(sharding.cache_shardings(mesh, cache), cache)


def decode_step(
    config: Config, shape: ModelConfig, method: Method, mesh: jax.sharding.Mesh, cache: MemoryCache
) -> Program:
    """One token for every session: the most likely next one is taken and read."""

    def step(model, cache):
        token = jnp.argmax(cache.logits, axis=-1).astype(jnp.int32)
        chunk = Chunk(token[:, None], jnp.ones((token.shape[0], 1), bool))
        return read(model, cache, chunk, method=method, query=True)[0], token

    return _serving(config, shape, method, mesh, cache, step)


def compress_step(
    config: Config, shape: ModelConfig, method: Method, mesh: jax.sharding.Mesh, cache: MemoryCache
) -> Program:
    """Every session closes its chunk: the method's tokens are run over its raw text, and its memory is written."""

    def step(model, cache):
        # A pair, as `decode_step` returns one.
        return compress(model, cache, method=method), cache.tokens

    return _serving(config, shape, method, mesh, cache, step)


def _serving(config, shape, method, mesh, cache: MemoryCache, step: Callable) -> Program:
    model = abstract_model(config, shape, method, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, cache)
    # Donated, and with the shardings of what goes in, so that the new cache takes the place of the old one.
    function = jax.jit(step, donate_argnums=1, out_shardings=(shardings, None))
    _, adapter, base = split(model, "adapter")
    return Program(function, (model, cache), {"weights": base, "adapter": adapter, "cache": cache}, mesh)
