"""Every sharding, and the collectives of every planned step, as short texts: the guard of `test_shardings.py`.

    python -m tests.distributed.shardings          prints them as JSON, file by file
    python -m tests.distributed.shardings write    writes them to tests/golden/shardings, to look at and commit

Collectives are those of eight simulated devices, for a tiny model; counts in loops are for every turn.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # not in a process that only imports this
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
import jax
import jaxlib
from jax.sharding import AbstractMesh, AxisType

import tests.conftest  # noqa: F401  (quick compilation)
from jax_ccm import methods
from jax_ccm.config.loading import scratch_model
from jax_ccm.config.schema import from_mapping
from jax_ccm.distributed import sharding
from jax_ccm.memory.cache import init_cache
from jax_ccm.nn import AdapterConfig, abstract_transformer
from jax_ccm.nn.config import PROJECTIONS
from jax_ccm.planning import hlo, programs
from jax_ccm.planning.models import SHAPES
from jax_ccm.weights import read_config

FOLDER = Path(__file__).parents[1] / "golden" / "shardings"
# Recorded with this compiler; another may choose other exchanges.
JAXLIB = "0.10.2"
CONFIG = from_mapping(
    {
        "model": {"precision": "float32", "scratch": {"heads": 4, "kv_heads": 2, "vocab_size": 96, "layers": 3}},
        "method": {"name": "ccm_concat", "comp_tokens": 2},
        "data": {"tokens": 32, "max_chunks": 4, "scored": 8},
        "train": {"remat": "all"},
    }
)
MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp4_context2": {"fsdp": 4, "context": 2},
}


def sizes(**given: int) -> dict[str, int]:
    return dict.fromkeys(sharding.AXES, 1) | given


def parameters(name: str) -> str:
    """Each array of a model, an adapter beside it, and of a cache, on a mesh of 2 x 4 x 4."""
    mesh = AbstractMesh((2, 4, 4, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    shape = read_config(SHAPES / name)
    model = abstract_transformer(shape, AdapterConfig(tokens=8, targets=tuple(PROJECTIONS)), "bfloat16")
    lines = [f"{name} on data 2 x fsdp 4 x tensor 4: what cuts each dimension"]
    lines += _lines(model, sharding.parameter_shardings(mesh, model, shape))
    cache = jax.eval_shape(lambda: init_cache(
        shape, methods.build("ccm_concat", comp_tokens=8), 8, memory_capacity=128, raw_capacity=32, dtype="bfloat16"
    ))  # fmt: skip
    lines += ["", "cache of 8 sessions", *_lines(cache, sharding.cache_shardings(mesh, cache))]
    batch = programs.abstract_batch(CONFIG, shape, methods.build("ccm_merge", comp_tokens=8), 8)
    lines += ["", "batch of 8 rows", *_lines(batch, sharding.batch_shardings(mesh, batch))]
    return "\n".join(lines) + "\n"


def _lines(tree, shardings) -> list[str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    specs = [s.spec for s in jax.tree.leaves(shardings)]
    show = lambda axes: "*".join(axes) if isinstance(axes, tuple) else axes or "-"
    return [
        f"{sharding.path_of(keys):48} {x.dtype.name:9} {str(list(x.shape)):26} {' '.join(map(show, spec))}".rstrip()
        for (keys, x), spec in zip(leaves, specs, strict=True)
    ]


def collectives(mesh_sizes: dict[str, int]) -> str:
    """The exchanges of a training step, of closing a chunk and of reading a token."""
    mesh = sharding.make_mesh(sizes(**mesh_sizes))
    shape = scratch_model(CONFIG.model.scratch)
    method = methods.build("ccm_concat", comp_tokens=2)
    cache = programs.abstract_cache(CONFIG, shape, method, mesh, 8, 8, 8)
    steps = {
        "training step": programs.training_step(CONFIG, shape, method, mesh, 8, 1),
        "compress step": programs.compress_step(CONFIG, shape, method, mesh, cache),
        "decode step": programs.decode_step(CONFIG, shape, method, mesh, cache),
    }
    lines = []
    for name, program in steps.items():
        lines += [name, *hlo.lines(hlo.collectives(program.compile().as_text())), ""]
    return "\n".join(lines)


def texts() -> dict[str, str]:
    found = {f"parameters_{name}.txt": parameters(name) for name in ("Llama-2-7b-hf", "Llama-3.1-8B", "Qwen3-8B")}
    if jaxlib.__version__ == JAXLIB:
        found |= {f"collectives_{name}.txt": collectives(given) for name, given in MESHES.items()}
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        for file, text in texts().items():
            (FOLDER / file).write_text(text)
    else:
        print(json.dumps(texts()))
