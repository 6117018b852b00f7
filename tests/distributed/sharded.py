"""A program of its own, with eight simulated devices: what a mesh computes, beside one device.

    python -m tests.distributed.sharded '[["concat_n2_sink", {"data": 8}], ...]'

prints a line of JSON on reading weights, and one for each pair of a method of `tests.cases.METHODS` and a mesh: the
largest differences.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

if __name__ == "__main__":  # not in a process that only imports this
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tests.conftest  # noqa: F401  (quick compilation)
from jax_ccm.distributed import sharding
from jax_ccm.evals import recurrent
from jax_ccm.memory.cache import init_cache, raw_capacity
from jax_ccm.memory.losses import training_loss
from jax_ccm.memory.steps import compress_scan, read
from jax_ccm.nn import abstract_transformer
from jax_ccm.rules.objective import Objective
from jax_ccm.rules.rows import batch
from jax_ccm.rules.types import Chunk, Method
from jax_ccm.training.step import split
from tests import cases

ROWS = ((5, 3, 7, 4), (2, 6), (4, 1, 3, 3, 2), (6, 2, 2), (1, 4, 3), (3, 3, 3, 3), (7, 2), (2, 2, 5, 1))

# With a teacher, whose rows and attention outputs are spread as well.
OBJECTIVE = Objective(distillation=0.3, alignment=0.3)


def program(method: Method):
    """One jitted program with all that a mesh must not change: ``(params, frozen, batch, cache, context, tail)``."""

    def run(graphdef, params, frozen, made, cache, context, tail):
        def loss_of(params):
            model = nnx.merge(graphdef, params, frozen)
            return training_loss(model, made, method, OBJECTIVE, remat="all")[0]

        loss, grads = jax.value_and_grad(loss_of)(params)
        model = nnx.merge(graphdef, params, frozen)
        after = compress_scan(model, cache, context, method=method)
        full, _ = read(model, after, tail, method=method, query=True)

        def next_token(cache, _):
            token = jnp.argmax(cache.logits, axis=-1).astype(jnp.int32)[:, None]
            cache, _ = read(model, cache, Chunk(token, jnp.ones(token.shape, bool)), method=method, query=True)
            return cache, token

        _, tokens = jax.lax.scan(next_token, full, length=3)
        return {"loss": loss, "grads": grads, "memory": after, "tokens": tokens}

    return jax.jit(run, static_argnums=0)


def compute(method: Method, sizes: dict[str, int] | None):
    """The program's results on a mesh of these sizes, or on one device for None."""
    devices = jax.devices()[: 1 if sizes is None else 8]
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | (sizes or {}), devices)
    examples = cases.sessions_for(method, lengths=ROWS)
    caps = recurrent.caps_for(method, examples)
    caps = type(caps)(-(-caps.tokens // 8) * 8, caps.memory, caps.scored)
    model = cases.model(tokens=max(method.num_embeddings, 1), num_layers=2, targets=cases.ALL)
    sessions = recurrent.stream(method, examples)
    with sharding.use(mesh):
        model = jax.device_put(model, sharding.parameter_shardings(mesh, model, model.config))
        made = sharding.place(mesh, batch(method, examples, caps, cases.VOCAB))
        least = jax.eval_shape(lambda: recurrent.cache_for(model, method, examples))
        slots, raw = least.memory_capacity, raw_capacity(least) + 3
        raw += -raw % (method.chunk or 1)
        cache = init_cache(model, method, len(ROWS), memory_capacity=slots, raw_capacity=raw)
        graphdef, params, frozen = split(model, "all")
        found = program(method)(graphdef, params, frozen, made, cache, sessions.context, sessions.tail)
        jax.block_until_ready(found)
    spread = {
        "kernel": params["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.size,
        "cache": cache.k.addressable_shards[0].data.size,
    }
    return jax.tree.map(np.asarray, found), spread


def difference(a, b) -> float:
    """Largest difference of two trees, relative to the largest number where that is above 1."""
    number = lambda x: np.asarray(x) * 1  # booleans cannot be subtracted
    pairs = zip(*(jax.tree.leaves(jax.tree.map(number, tree)) for tree in (a, b)), strict=True)
    gaps = [np.abs(x - y).max(initial=0) / max(1, np.abs(y).max(initial=0)) for x, y in pairs]
    return float(max(gaps))


def read_in_slices() -> dict[str, float]:
    """Weights from safetensors: the largest share of a kernel that is read at once, and the largest difference."""
    from jax_ccm.weights import load_model, save_hf
    from jax_ccm.weights.hf import Safetensors, base_parameters

    model = cases.model()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    shares, whole = [], Safetensors.read

    def read(self, name, index):
        found = whole(self, name, index)
        if name.endswith("proj.weight"):
            shares.append(found.size / np.prod(self.shapes[name]))
        return found

    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        Safetensors.read = read
        shardings = sharding.parameter_shardings(mesh, abstract_transformer(model.config), model.config)
        loaded = load_model(folder, precision="float32", shardings=shardings)
    return {"share": max(shares), "gap": difference(base_parameters(loaded), base_parameters(model))}


def main() -> None:
    print(json.dumps({"weights": read_in_slices()}), flush=True)
    ones: dict[str, tuple] = {}
    for name, sizes in json.loads(sys.argv[1]):
        method = cases.METHODS[name]
        if name not in ones:
            ones[name] = compute(method, None)
        (one, whole), (many, spread) = ones[name], compute(method, sizes)
        gaps = {part: difference(many[part], one[part]) for part in one}
        shares = {part: whole[part] / spread[part] for part in ("kernel", "cache")}
        print(json.dumps({"method": name, "mesh": sizes, "gaps": gaps, "shares": shares}), flush=True)


if __name__ == "__main__":
    main()
