"""Kernels compiled ahead of time for devices that are not here: temporaries, seconds, and whether the kernel is inside.

Needs no TPU and no GPU, but their compilers: the ``libtpu`` wheel of the installed jax (``pip install "jax[tpu]"``), or
what `planning.gpus.HELP` says. Nothing is run::

    python -m jax_ccm.ahead results/kernels/tpu.json
    JAX_PLATFORMS=cpu python -m jax_ccm.ahead results/kernels/gpu.json h100 a100
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ccm.attention import memory_attention
from jax_ccm.errors import RunError
from jax_ccm.planning import gpus
from jax_ccm.sharding import AXES, make_mesh
from jax_ccm.types import Rule, Slots

# The smallest topology of each generation.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
# How kernels of Mosaic and of Pallas Triton are called in a compiled program.
CUSTOM_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
# libtpu looks for a TPU's environment unless it is told one.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """N, K and H."""

    heads: int = 32
    kv_heads: int = 8
    size: int = 128


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
      RunError: without the target's compiler.
    """
    if target in gpus.GPUS:
        if lacks := gpus.missing():
            raise RunError(f"{lacks} was not found: {gpus.HELP}")
        return make_mesh(dict.fromkeys(AXES, 1), gpus.devices(target))
    if importlib.util.find_spec("libtpu") is None:
        raise RunError('compiling for a TPU needs the libtpu wheel of the installed jax: pip install "jax[tpu]"')
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    devices = topologies.get_topology_desc(topology_name=TOPOLOGIES[target], platform="tpu").devices
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    count = 1
    for size in shape.values():
        count *= size
    return make_mesh(shape, devices[:count])


def compile_for(mesh: Mesh, fn: Callable, *arguments: Any) -> Compiled:
    """Compiles ``fn`` for a mesh; arguments are `jax.ShapeDtypeStruct` trees, whole on every device if not sharded."""
    whole = NamedSharding(mesh, P())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or whole)
    with jax.set_mesh(mesh):
        lowered = jax.jit(fn).lower(*jax.tree.map(place, arguments))
        start = time.process_time()
        program = lowered.compile()
    seconds = time.process_time() - start
    text = program.as_text()
    kernels = sum(text.count(f'custom_call_target="{name}"') for name in CUSTOM_CALLS)
    return Compiled(program.memory_analysis().temp_size_in_bytes, kernels, seconds)


def call(
    rule: Rule, batch: int, length: int, memory: int, heads: Heads = Heads(), dtype: Any = jnp.bfloat16
) -> tuple[Callable, Callable, tuple]:
    """One attention in the kernel's own layout, its gradients, and abstract arguments.

    Args:
      rule: who sees whom.
      batch, length, memory: B, T and M; 0 for no memory.
      heads: N, K and H.
      dtype: of queries, keys and values.

    Returns:
      ``forward(arrays, slots)``, ``gradients(arrays, d_out, slots)``, and ``(arrays, d_out, slots)``: arrays are
      ``[B, T, N H]``, twice ``[B, T, K H]``, and twice ``[B, M, K H]``.
    """
    wide = lambda n, count: jax.ShapeDtypeStruct((batch, n, count * heads.size), dtype)
    arrays = [wide(length, n) for n in (heads.heads, heads.kv_heads, heads.kv_heads)]
    arrays += [wide(memory, heads.kv_heads)] * 2 if memory else []
    places = lambda n: Slots(*[jax.ShapeDtypeStruct((batch, n), jnp.int32)] * 4)
    slots = (places(length), places(memory) if memory else None)

    def forward(arrays, slots):
        apart = [x.reshape(*x.shape[:2], -1, heads.size) for x in arrays]
        out = memory_attention(*apart, rule=rule, slots=slots[0], memory_slots=slots[1], implementation="pallas")
        return out.reshape(*out.shape[:2], -1)

    def gradients(arrays, d_out, slots):
        return jax.vjp(lambda arrays: forward(arrays, slots), arrays)[1](d_out)

    return forward, gradients, (arrays, wide(length, heads.heads), slots)


def report(targets: Sequence[str], lengths: Sequence[int] = (4096, 32768)) -> list[dict[str, Any]]:
    """CCM-concat with 8 slots for each 50 tokens of text on every target, and decoding of 64 sessions."""
    from jax_ccm.methods import build

    rule = build("ccm_concat", comp_tokens=8).rule
    rows = []
    for target in targets:
        mesh = mesh_for(target)
        for length in lengths:
            _, gradients, arguments = call(rule, 1, length, length // 58 * 8)
            rows.append({"target": target, "what": "gradients", "length": length})
            rows[-1] |= dataclasses.asdict(compile_for(mesh, gradients, *arguments))
            print(rows[-1], flush=True)
        forward, _, (arrays, _, slots) = call(rule, 64, 1, 1024)
        rows.append({"target": target, "what": "decode", "length": 1})
        rows[-1] |= dataclasses.asdict(compile_for(mesh, forward, arrays, slots))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    path = Path(sys.argv[1])
    found = {"jax": jax.__version__, "compiled": report(sys.argv[2:] or list(TOPOLOGIES))}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
