"""Where arrays live: the mesh, one table of path patterns, and how each process feeds its share of a batch.

The mesh has four axes (`make_mesh`), always all of them, of size 1 where they are not used:

    data      copies of the model; rows of a batch and sessions of a cache are spread over them
    fsdp      weights (and what is trained) are cut into as many pieces, gathered layer by layer; rows are spread, too
    tensor    heads, inner units of the MLP and vocabulary are spread: each device computes a part of every layer
    context   the tokens of a row are spread, for sequences that do not fit one device

`PARAMETERS`, `CACHE` and `BATCH` say for every array, by its path, which axis cuts which dimension (patterns are
searched in order, the first counts). An axis that does not divide a dimension leaves it whole; `check` refuses the
cases in which that would waste the axis. Key/value heads count as wholes: where ``tensor`` does not divide them, each
device keeps all of them, which is what multi-query models need.

Nothing else in the library names a mesh axis. How it is used:

    mesh = make_mesh(sizes)                                 # process-wide: jax.devices() of all processes
    with use(mesh):                                         # activations are constrained, caches are initialised spread
        model = jax.jit(init, out_shardings=parameter_shardings(mesh, jax.eval_shape(init), config))(...)
        rows = process_rows(mesh, batch_size)               # the rows of a global batch that this process reads
        batch = place(mesh, local_batch)                    # numpy [rows, ...] or [A, rows, ...] -> global arrays

With several processes every process runs the same program: it loads only the slices of its own devices
(`parameter_shardings` with `jax.make_array_from_callback`), feeds its own rows, and reads back what is replicated
(`replicated`). The sum over all processes of ``len(process_rows(mesh, n))`` is n, unless ``tensor`` or ``context`` span
processes: those then read the same rows.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ccm.errors import UserError

Tree = Any
AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")

# Stacked layers have their number in front. What is not named is whole on every device: norms, biases of outputs, the
# embeddings of compression tokens, counters. Optimizer moments have the paths of their parameters.
PARAMETERS: tuple[tuple[str, P], ...] = (
    (r"embed_tokens\.embedding$", P("tensor", "fsdp")),  # [V, D]
    (r"lm_head\.kernel$", P("fsdp", "tensor")),  # [D, V]
    (r"(q|k|v|gate|up)_proj\.kernel$", P(None, "fsdp", "tensor")),  # [L, D, out]
    (r"(o|down)_proj\.kernel$", P(None, "tensor", "fsdp")),  # [L, in, D]
    (r"(q|k|v|gate|up)_proj\.bias$", P(None, "tensor")),  # [L, out]
    # The small factors of the LoRA follow the side of the projection that tensor cuts, so that it needs no exchange.
    (r"(q|k|v|gate|up)_proj\.lora_b$", P(None, None, "tensor")),  # [L, r, out]
    (r"(o|down)_proj\.lora_a$", P(None, "tensor")),  # [L, in, r]
    (r"", P()),
)
CACHE: tuple[tuple[str, P], ...] = (
    (r"^(mixed_)?(k|v)$", P(None, ROWS, None, "tensor")),  # [L, B, S, K, H]
    (r"^accumulated_attention$", P(None, ROWS, None, "tensor")),  # [L, B, S, K]
    (r"^logits$", P(ROWS, "tensor")),  # [B, V]
    (r"", P(ROWS)),
)
BATCH: tuple[tuple[str, P], ...] = (
    (r"^(tokens|slots\.\w+)$", P(ROWS, "context")),  # [B, T]
    (r"", P(ROWS)),
)
# Names of the dimensions of activations, for `constrain`.
ACTIVATIONS: dict[str, str | tuple[str, ...]] = {
    "rows": ROWS,
    "tokens": "context",
    "heads": "tensor",
    "inner": "tensor",
    "vocab": "tensor",
}
# The last dimension of these is K * H.
_KV = re.compile(r"(k|v)_proj\.(kernel|bias|lora_b)$")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
      sizes: of each of `AXES`; at most one is -1, which takes what the others leave.
      devices: None for `jax.devices()`; those of a topology to compile for it.

    Raises:
      UserError: for sizes that do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    given = ", ".join(f"{axis}: {sizes[axis]}" for axis in AXES)
    what = f"{len(devices)} device{'s' if len(devices) > 1 else ''} ({devices[0].device_kind})"
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh is {{{given}}}; each size must be at least 1, and at most one may be -1 (the rest)")
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    if math.prod(shape) != len(devices):
        remedy = f"sizes whose product divides {len(devices)}" if -1 in sizes.values() else "-1 for one of them"
        raise UserError(f"mesh is {{{given}}}, which does not make up the {what} that there are; give {remedy}")
    # Auto is said, because newer versions of JAX make axes Explicit by default, and one code cannot serve both.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """A context in which programs are traced for the mesh; for a single device of the default kind nothing changes."""
    # Without a mesh in use `constrain` and `sharded_init` do nothing, and programs are the same as without this module.
    default = mesh.size == 1 and mesh.devices.flat[0].platform == jax.default_backend()
    return contextlib.nullcontext() if default else jax.set_mesh(mesh)


def describe(mesh: Mesh) -> str:
    """Such as "8 x TPU v5e, data 2 x fsdp 4"."""
    kind = mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {kind}, {axes}" if mesh.size > 1 else kind


def check(mesh: Mesh, config: Any) -> None:
    """Refuses a mesh whose axes would be wasted on a model.

    Args:
      mesh: the mesh.
      config: `ModelConfig`.

    Raises:
      UserError: naming the axis, the dimension and what divides it.
    """
    for axis, name in (("tensor", "num_heads"), ("tensor", "intermediate_size"), ("fsdp", "hidden_size")):
        size, dimension = mesh.shape[axis], getattr(config, name)
        if dimension % size:
            below = [n for n in range(1, min(dimension, mesh.size) + 1) if dimension % n == 0]
            raise UserError(
                f"mesh.{axis} is {size}, which does not divide {name} = {dimension} of this model; sizes that do: "
                f"{', '.join(map(str, below))}"
            )


def check_rows(mesh: Mesh, name: str, rows: int) -> None:
    """Refuses a batch that does not spread evenly.

    Raises:
      UserError: naming the config key.
    """
    count = row_shares(mesh)
    if rows % count:
        raise UserError(
            f"{name} is {rows}, but rows are spread over mesh.data x mesh.fsdp = {count} devices; give a multiple of "
            f"{count}, such as {-(-rows // count) * count}, or use mesh.tensor or mesh.context for some of the devices"
        )


def check_tokens(mesh: Mesh, name: str, tokens: int) -> None:
    """Refuses rows whose tokens do not spread evenly over ``context``.

    Raises:
      UserError: naming the config key.
    """
    count = mesh.shape["context"]
    if tokens % count:
        raise UserError(
            f"{name} is {tokens}, but the tokens of a row are spread over mesh.context = {count} devices; give a "
            f"multiple of {count}"
        )


def parameter_shardings(mesh: Mesh, tree: Tree, config: Any) -> Tree:
    """The tree with a `NamedSharding` for each array.

    Args:
      mesh: the mesh.
      tree: a model, a state of it or of an optimizer; arrays or `jax.ShapeDtypeStruct`.
      config: `ModelConfig`, for the number of key/value heads.
    """

    def one(keys, leaf):
        path = path_of(keys)
        # Whether tensor divides is asked of K and not of K * H: no head is cut in two.
        counts = (*leaf.shape[:-1], config.num_kv_heads) if _KV.search(path) else leaf.shape
        return NamedSharding(mesh, fit(mesh, lookup(PARAMETERS, path), counts))

    return jax.tree_util.tree_map_with_path(one, tree)


def cache_shardings(mesh: Mesh, cache: Tree) -> Tree:
    """`NamedSharding` for each array of a `MemoryCache`: sessions over data and fsdp, key/value heads over tensor."""

    def one(keys, leaf):
        return NamedSharding(mesh, fit(mesh, lookup(CACHE, path_of(keys)), leaf.shape))

    return jax.tree_util.tree_map_with_path(one, cache)


def batch_shardings(mesh: Mesh, batch: Tree, leading: int = 0) -> Tree:
    """`NamedSharding` for each array of a `Batch` or `Chunk` with so many dimensions in front of the rows."""

    def one(keys, leaf):
        spec = fit(mesh, lookup(BATCH, path_of(keys)), leaf.shape[leading:])
        # Micro-batches are run one after the other: their axis stays whole.
        return NamedSharding(mesh, P(*(None,) * leading, *spec))

    return jax.tree_util.tree_map_with_path(one, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def row_shares(mesh: Mesh) -> int:
    """Into how many equal shares the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_shares(mesh: Mesh) -> list[int]:
    """Which of the `row_shares` this process's devices hold, in increasing order."""
    # data and fsdp are the outer axes, so that the devices of one share have neighbouring numbers.
    share = np.arange(mesh.size).reshape(mesh.devices.shape) // (mesh.shape["tensor"] * mesh.shape["context"])
    here = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(mesh.devices)
    return sorted(set(share[here].tolist()))


def process_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The rows of a global batch that this process feeds, ``int64``, increasing."""
    size = rows // row_shares(mesh)
    return np.concatenate([np.arange(share * size, (share + 1) * size) for share in process_shares(mesh)])


def place(mesh: Mesh, batch: Tree, leading: int = 0) -> Tree:
    """Global arrays of the rows that each process has.

    Args:
      mesh: the mesh.
      batch: numpy arrays of this process's rows (`process_rows`), each whole in its other dimensions.
      leading: dimensions in front of the rows.

    Returns:
      `jax.Array` of all rows, spread as `BATCH` says.
    """
    shares = process_shares(mesh)
    total = row_shares(mesh)

    def one(sharding, local):
        size = local.shape[leading] // len(shares)
        shape = (*local.shape[:leading], size * total, *local.shape[leading + 1 :])

        # ``index`` is of the global array. Here the shares of this process lie behind each other, also where shares of
        # other processes are between them; each piece lies within one share.
        def piece(index):
            first = (index[leading].start or 0) // size if size else 0
            count = (index[leading].stop or shape[leading]) - (index[leading].start or 0)
            begin = shares.index(first) * size
            return local[(*index[:leading], slice(begin, begin + count), *index[leading + 1 :])]

        return jax.make_array_from_callback(shape, sharding, piece)

    if len(shares) == total:
        return jax.device_put(batch, batch_shardings(mesh, batch, leading))
    # The shapes of the global arrays.
    whole = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (*x.shape[:leading], x.shape[leading] // len(shares) * total, *x.shape[leading + 1 :]), x.dtype
        ),
        batch,
    )
    return jax.tree.map(one, batch_shardings(mesh, whole, leading), batch)


def sharded_init(make, shardings_of) -> Tree:
    """What ``make()`` returns, spread from the start over the mesh in use.

    Args:
      make: makes a pytree of arrays.
      shardings_of: ``(mesh, abstract tree) -> tree of shardings``, such as `cache_shardings`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return make()
    # Specs, not shardings: they also serve where this is being traced, and only an abstract mesh is known.
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings_of(mesh, jax.eval_shape(make)))
    return jax.jit(make, out_shardings=specs)()


def constrain(x, *names: str | None):
    """An activation, spread over the mesh in use; as it is where there is none.

    Args:
      x: an array under `jax.jit`.
      *names: of its dimensions in `ACTIVATIONS`, or None for whole; those not given are whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(jnp.shape(x), *names))


def in_order(x, *names: str | None):
    """An activation that lies in memory as its axes stand, spread as by `constrain`.

    Attention prefers heads before slots on some devices. What a compiler then turns around must be the layer in hand:
    left to itself it turns a whole cache before the loop over the layers, which takes a second one of the same size.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def order(x):
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    # Without axes of one: the only head of a device would else stand in tiles for two, and be copied into them.
    def lay(x):
        return order(x.reshape([size for size in x.shape if size > 1])).reshape(x.shape)

    if mesh.size <= 1 or mesh.are_all_axes_manual:
        return lay(x)
    # On each device its own part: the constraint by itself would gather the whole.
    spec = activation_spec(jnp.shape(x), *names)
    return jax.shard_map(lay, in_specs=spec, out_specs=spec, check_vma=False)(x)


def activation_spec(shape: Sequence[int], *names: str | None) -> P:
    """How an activation of that shape is spread over the mesh in use; ``names`` as for `constrain`."""
    spec = P(*(None if name is None else ACTIVATIONS[name] for name in names))
    return fit(jax.sharding.get_abstract_mesh(), spec, shape)


def context_shards() -> int:
    """Over how many devices the tokens of a row are spread in the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


def fit(mesh: Any, spec: P, shape: Sequence[int]) -> P:
    """The spec without axes that do not divide their dimension, and without axes of size 1."""
    kept = []
    # A spec ends with the last dimension that is cut.
    for axes, size in zip(spec, shape, strict=False):
        named = () if axes is None else (axes,) if isinstance(axes, str) else axes
        named = tuple(axis for axis in named if mesh.shape[axis] > 1)
        fits = named and size % math.prod(mesh.shape[axis] for axis in named) == 0
        kept.append((named[0] if len(named) == 1 else named) if fits else None)
    # P("data", None) and P("data") mean the same, and are not equal.
    while kept and kept[-1] is None:
        kept.pop()
    return P(*kept)


def lookup(table: Sequence[tuple[str, P]], path: str) -> P:
    """The spec of the first pattern that is found in a path."""
    return next(spec for pattern, spec in table if re.search(pattern, path))


def path_of(keys: Sequence[Any]) -> str:
    """Such as "layers.self_attn.q_proj.kernel", for keys of a module, a state of it or a pure dict alike."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator=".").removesuffix(".value")
