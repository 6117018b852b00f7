"""Kernels compiled ahead of time for devices that are not here: temporaries, seconds, and whether the kernel is inside.

Needs no TPU and no GPU, but their compilers: the ``libtpu`` wheel of the installed jax (``pip install "jax[tpu]"``), or
what `planning.gpus.HELP` says. Nothing is run. ``python -m jax_ccm.plan kernels`` is the command.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ccm.attention.dispatch import memory_attention
from jax_ccm.config.loading import build_method
from jax_ccm.config.schema import Config, from_mapping
from jax_ccm.distributed.sharding import AXES, make_mesh
from jax_ccm.errors import UserError, unknown
from jax_ccm.methods import build
from jax_ccm.nn import ModelConfig, rope
from jax_ccm.nn.blocks import Attention
from jax_ccm.nn.layer import pack
from jax_ccm.numerics import NAMED
from jax_ccm.planning import chips, gpus, programs
from jax_ccm.planning.kernel_costs import Heads
from jax_ccm.records import output
from jax_ccm.records.parsing import read_json
from jax_ccm.rules.batch import Packed
from jax_ccm.rules.types import Rule, Slots

# The smallest topology of each generation.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
# How kernels of Mosaic and of Pallas Triton are called in a compiled program.
CUSTOM_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
# Decoders whose sizes the layer and the training step have.
LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5)
SMOLLM2_135M = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tie_embeddings=True)
TRAINING = from_mapping(
    {
        "model": {"precision": "bfloat16"},
        "method": {"name": "ccm_concat", "comp_tokens": 8},
        "data": {"batch_size": 8, "tokens": 1024, "max_chunks": 16, "scored": 128},
        "train": {"attention": "pallas"},
    }
)
# What is compiled, as the table calls it.
PROGRAMS = {
    "attention": "gradients of attention, T = {:,}",
    "layer": "gradients of a layer, T = {:,}",
    "layer without attention": "the same without attention, T = {:,}",
    "decode": "decoding, 64 sessions with caches of 1,024",
    "training step": "training step, 8 rows of {:,}",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled program says of itself.

    Attributes:
      temporaries: bytes of HBM besides arguments and results. Leaves out what is kept in VMEM.
      kernels: custom calls of Mosaic or Triton kernels in it.
      seconds: of processor time to compile.
    """

    temporaries: int
    kernels: int
    seconds: float


def mesh_for(target: str, **sizes: int) -> Mesh:
    """A mesh of devices that need not be here: one, or on a TPU as many as ``sizes`` of the mesh axes ask for.

    Raises:
      UserError: without the target's compiler.
    """
    if target in gpus.GPUS:
        if lacks := gpus.missing():
            raise UserError(f"{lacks} was not found: {gpus.HELP}")
        return make_mesh(dict.fromkeys(AXES, 1), gpus.devices(target))
    # libtpu wants to be told some accelerator type; the topology is what it compiles for.
    devices = chips.tpus(TOPOLOGIES[target], "v5litepod-4")
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    count = 1
    for size in shape.values():
        count *= size
    return make_mesh(shape, devices[:count])


def compile_for(mesh: Mesh, fn: Callable, *arguments: Any) -> Compiled:
    """Compiles ``fn`` for a mesh; arguments are `jax.ShapeDtypeStruct` trees, whole on every device if not sharded."""
    whole = NamedSharding(mesh, P())

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or whole)

    # Kernels of Triton are lowered only where a mesh is set.
    with jax.set_mesh(mesh):
        return compiled(jax.jit(fn).lower(*jax.tree.map(place, arguments)))[1]


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Compiled]:
    """Compiles a program; it, and what it says of itself."""
    # Of all threads of this process: other work on the machine does not count.
    start = time.process_time()
    program = lowered.compile()
    seconds = time.process_time() - start
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None and memory is not None, "compilers of these targets tell both"
    # Where there is none, plain products took the kernel's place, and nothing else would say so.
    kernels = sum(text.count(f'custom_call_target="{name}"') for name in CUSTOM_CALLS)
    return program, Compiled(memory.temp_size_in_bytes, kernels, seconds)


def call(
    rule: Rule,
    batch: int,
    length: int,
    memory: int,
    heads: Heads = Heads(),
    dtype: Any = jnp.bfloat16,
    cap: float | None = None,
    implementation: str = "pallas",
) -> tuple[Callable, Callable, tuple]:
    """One attention in the kernel's own layout, its gradients, and abstract arguments.

    Args:
      rule: who sees whom.
      batch, length, memory: B, T and M; 0 for no memory.
      heads: N, K and H.
      dtype: of queries, keys and values.
      cap: of the scores, as for `memory_attention`.
      implementation: for `memory_attention`, of tokens in order.

    Returns:
      ``forward(arrays, slots)``, ``gradients(arrays, d_out, slots)``, and ``(arrays, d_out, slots)``: arrays are
      ``[B, T, N H]``, twice ``[B, T, K H]``, and twice ``[B, M, K H]``.
    """

    def wide(n, count):
        return jax.ShapeDtypeStruct((batch, n, count * heads.size), dtype)

    # Queries, keys, values: heads and their numbers in one axis, as projections give and take them.
    arrays = [wide(length, n) for n in (heads.heads, heads.kv_heads, heads.kv_heads)]
    arrays += [wide(memory, heads.kv_heads)] * 2 if memory else []

    def slots_of(n):
        return Slots(*[jax.ShapeDtypeStruct((batch, n), jnp.int32)] * 4)

    slots = (slots_of(length), slots_of(memory) if memory else None)

    def forward(arrays, slots):
        # [B, T, N, H], [B, T, K, H] twice, [B, M, K, H] twice
        apart = [x.reshape(*x.shape[:2], -1, heads.size) for x in arrays]
        seen = dict(slots=slots[0], memory_slots=slots[1], cap=cap, implementation=implementation)
        out = memory_attention(*apart, rule=rule, in_order=True, **seen)
        return out.reshape(*out.shape[:2], -1)

    def gradients(arrays, d_out, slots):
        return jax.vjp(lambda arrays: forward(arrays, slots), arrays)[1](d_out)

    return forward, gradients, (arrays, wide(length, heads.heads), slots)


def layer(rule: Rule, batch: int, length: int, memory: int, *, attention: bool = True) -> tuple[Callable, tuple]:
    """A layer's projections, rotation, memory, attention and output, in bfloat16, and its gradients.

    Args:
      rule: who sees whom.
      batch, length, memory: B, T and M.
      attention: without it, a sum that needs neither a product nor a row of its own stands in its place.

    Returns:
      ``gradients(x, weights, slots, packed, d_out)``, of all weights and of the input ``[B, T, D]``, and abstract
      arguments.
    """
    # Shapes alone: no weights of an 8B decoder are made.
    module = jax.eval_shape(lambda: Attention(jax.random.key(0), LLAMA_8B, None, NAMED["bfloat16"]))
    graphdef, weights = nnx.split(module)

    def forward(x, weights, slots, packed):
        module = nnx.merge(graphdef, weights)
        q, k, v = module.project(x, None, [None] * 4)
        angles = rope.angles(LLAMA_8B, slots.position)
        q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
        if attention:
            memory_k, memory_v = pack(packed, k), pack(packed, v)
            out = memory_attention(
                q, k, v, memory_k, memory_v, rule=rule, slots=slots, memory_slots=packed.slots, implementation="pallas"
            )
        else:
            out = q + jnp.concatenate([k, v] * (q.shape[2] // k.shape[2] // 2), axis=2)
        return module.o_proj(out.reshape(*out.shape[:2], -1))

    def gradients(x, weights, slots, packed, d_out):
        return jax.vjp(lambda x, weights: forward(x, weights, slots, packed), x, weights)[1](d_out)

    def slots_of(n):
        return Slots(*[jax.ShapeDtypeStruct((batch, n), jnp.int32)] * 4)

    packed = Packed(jax.ShapeDtypeStruct((batch, memory), jnp.int32), slots_of(memory), None)
    x = jax.ShapeDtypeStruct((batch, length, LLAMA_8B.hidden_size), jnp.bfloat16)
    return gradients, (x, weights, slots_of(length), packed, x)


def training_step(mesh: Mesh, config: Config = TRAINING, shape: ModelConfig = SMOLLM2_135M) -> Compiled:
    """The step of `jax_ccm.train` for a decoder of the given sizes."""
    rows = config.data.batch_size
    program = programs.training_step(config, shape, build_method(config), mesh, rows, accumulation=1)
    with jax.set_mesh(mesh):
        return compiled(program.function.lower(*program.arguments))[1]


def compilations(mesh: Mesh, lengths: Sequence[int] = (4096, 32768)) -> Iterator[tuple[str, int, Compiled]]:
    """CCM-concat with 8 slots for each 50 tokens of text, decoding of 64 sessions, and training.

    Yields:
      A key of `PROGRAMS`, the length, and what was found.
    """
    rule = build("ccm_concat", comp_tokens=8).rule
    for length in lengths:
        # Of 58 places of the layout, 50 of text and 8 that close it, 8 become slots.
        shape = 1, length, length // 58 * 8
        _, gradients, arguments = call(rule, *shape)
        yield "attention", length, compile_for(mesh, gradients, *arguments)
        for what, attention in (("layer", True), ("layer without attention", False)):
            gradients, arguments = layer(rule, *shape, attention=attention)
            yield what, length, compile_for(mesh, gradients, *arguments)
    forward, _, (arrays, _, slots) = call(rule, 64, 1, 1024)
    yield "decode", 1, compile_for(mesh, forward, arrays, slots)
    yield "training step", TRAINING.data.tokens, training_step(mesh)


def record(path: Path, targets: Sequence[str]) -> None:
    """Compiles everything for each target and writes it into a file, which keeps what other targets have there.

    A table is written beside the file.

    Args:
      path: the JSON file. What another jax wrote there is dropped.
      targets: keys of `TOPOLOGIES` or `gpus.GPUS`; none for all of `TOPOLOGIES`.

    Raises:
      UserError: for an unknown target, one without its compiler, or a file that is not one of these.
    """
    order = [*TOPOLOGIES, *gpus.GPUS]
    for target in targets:
        if target not in order:
            raise unknown("target", target, order)
    kept = _recorded(path)
    for target in targets or TOPOLOGIES:
        mesh = mesh_for(target)
        # Behind `mesh_for`, which refuses a target without its compiler: what stood there then stays.
        kept = [row for row in kept if row["target"] != target]
        for what, length, found in compilations(mesh):
            kept.append({"target": target, "what": what, "length": length, **dataclasses.asdict(found)})
            print(kept[-1], flush=True)
        made = {"jax": jax.__version__, "compiled": sorted(kept, key=lambda row: order.index(row["target"]))}
        # After each target, which takes minutes: what is done stays if the next one fails.
        output.write_json(path, made)
        path.with_suffix(".md").write_text(markdown(made), encoding="utf-8")


def _recorded(path: Path) -> list[dict[str, Any]]:
    """What stands in a file, if the same jax wrote it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = read_json(path) if path.exists() else {"jax": None, "compiled": []}
        # What cannot be shown as a table is no file of ours.
        markdown(before)
        return before["compiled"] if before["jax"] == jax.__version__ else []
    except OSError as e:
        raise UserError(f"{path} cannot be used: {e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} holds something else than compiled kernels ({type(e).__name__}: {e}); give another file, or "
            "remove it"
        ) from e


def markdown(found: dict[str, Any]) -> str:
    """What `record` wrote as a table: a line for each program, a column for each target."""
    targets = list(dict.fromkeys(row["target"] for row in found["compiled"]))
    lines = []
    for what, length in dict.fromkeys((row["what"], row["length"]) for row in found["compiled"]):
        rows = {row["target"]: row for row in found["compiled"] if (row["what"], row["length"]) == (what, length)}
        kernels = ", ".join(str(n) for n in sorted({row["kernels"] for row in rows.values()}))

        def cell(row):
            return f"{row['temporaries'] / 2**20:,.1f} MiB, {row['seconds']:.0f} s"

        cells = [cell(rows[target]) if target in rows else "-" for target in targets]
        lines.append([PROGRAMS[what].format(length), kernels, *cells])
    return output.table(["program", "kernels", *targets], lines, left=2) + "\n"
