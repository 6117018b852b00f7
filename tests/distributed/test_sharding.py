"""Eight devices compute what one does; tables, meshes and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from tests import cases

ROOT = Path(__file__).parents[2]
ONES = dict.fromkeys(sharding.AXES, 1)
# Every mesh that fits the tiny model (4 query heads, 2 key/value heads, width 32), all axes at once included.
MESHES = [
    {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4},
    {"fsdp": 2, "tensor": 2, "context": 2}, {"context": 8}, {"data": 4, "context": 2}, {"fsdp": 4, "tensor": 2},
]  # fmt: skip
MIXED = {"fsdp": 2, "tensor": 2, "context": 2}
FAST = [("concat_n2_sink", MIXED), ("merge_n1", MIXED), ("concat_n2_sink", {"data": 2, "tensor": 4})]
SLOW = [
    *(("merge_n2_sink", sizes) for sizes in MESHES),
    *((name, {"data": 2, "fsdp": 2, "tensor": 2}) for name in cases.METHODS),
]


def label(case) -> str:
    name, sizes = case
    return f"{name}-{'-'.join(f'{axis}{size}' for axis, size in sizes.items())}"


def on_eight_devices(pairs) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.sharded", json.dumps(pairs)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {label((row["method"], row["mesh"])) if "mesh" in row else "weights": row for row in found}


@pytest.fixture(scope="module")
def fast():
    return on_eight_devices(FAST)


@pytest.fixture(scope="module")
def slow():
    return on_eight_devices(SLOW)


def check_equal(row: dict) -> None:
    assert all(gap <= 1e-5 for gap in row["gaps"].values()), row["gaps"]
    assert row["gaps"]["tokens"] == 0
    mesh = ONES | row["mesh"]
    assert row["shares"]["kernel"] == mesh["fsdp"] * mesh["tensor"]
    kv = mesh["tensor"] if cases.CONFIG.num_kv_heads % mesh["tensor"] == 0 else 1
    assert row["shares"]["cache"] == mesh["data"] * mesh["fsdp"] * kv


@pytest.mark.parametrize("case", FAST, ids=label)
def test_a_mesh_computes_what_one_device_does(fast, case):
    """Loss, gradients of every parameter, memory after chunks and generated tokens; and each device holds its part."""
    check_equal(fast[label(case)])


def test_weights_are_read_in_slices(fast):
    """Of a kernel that eight devices share, no more than an eighth is ever read at once; and all of it is right."""
    assert fast["weights"]["weights"] == {"share": 1 / 8, "gap": 0}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=label)
def test_every_mesh_and_every_method(slow, case):
    check_equal(slow[label(case)])


def mesh_of(**sizes) -> AbstractMesh:
    sizes = ONES | sizes
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * 4)


def test_every_large_parameter_is_spread():
    """Only norms, output biases and the adapter's small factors are whole."""
    from jax_ccm.nn import AdapterConfig, ModelConfig, abstract_transformer

    config = ModelConfig("qwen3", 256, 64, 128, 2, 8, 4, 8, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    model = abstract_transformer(config, AdapterConfig(rank=4, tokens=2))
    for keys, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        path = sharding.path_of(keys)
        spec = sharding.fit(mesh_of(fsdp=2, tensor=2), sharding.lookup(sharding.PARAMETERS, path), leaf.shape)
        cut = {axis for axis in spec if axis}
        if path.endswith(("kernel", "embedding")):
            assert cut == {"fsdp", "tensor"}, path
        elif path.endswith(("scale", "comp", "o_proj.bias", "down_proj.bias", "o_proj.lora_b")):
            assert not cut, path
        elif path.endswith("lora_a"):
            assert cut == ({"tensor"} if "o_proj" in path else set()), path
        else:
            assert cut == {"tensor"}, path


@pytest.mark.parametrize(
    ("spec", "shape", "sizes", "fitted"),
    [
        (P("tensor", "fsdp"), (97, 32), {"tensor": 2, "fsdp": 4}, P(None, "fsdp")),  # an odd vocabulary stays whole
        (P(("data", "fsdp"), "context"), (8, 16), {"data": 2, "fsdp": 2}, P(("data", "fsdp"))),
        (P(("data", "fsdp")), (6, 3), {"data": 2, "fsdp": 2}, P()),
        (P(None, "tensor"), (4, 4), {}, P()),
    ],
)
def test_fit(spec, shape, sizes, fitted):
    assert sharding.fit(mesh_of(**sizes), spec, shape) == fitted


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not make up the 1 device"),
        ({"data": -1, "tensor": 2}, "divides 1"),
        ({"data": -1, "tensor": -1}, "at most one may be -1"),
        ({"data": 0}, "at least 1"),
    ],
)
def test_bad_meshes(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(ONES | sizes, jax.devices()[:1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, r"mesh.tensor is 3, which does not divide num_heads = 4 .* 1"),
        ({"fsdp": 5}, r"mesh.fsdp is 5, which does not divide hidden_size = 32"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.check(mesh_of(**sizes), cases.CONFIG)


def test_rows_and_tokens_must_spread_evenly():
    with pytest.raises(UserError, match="data.batch_size is 6, .* multiple of 4, such as 8"):
        sharding.check_rows(mesh_of(data=2, fsdp=2), "data.batch_size", 6)
    with pytest.raises(UserError, match="data.tokens is 41, .* multiple of 2"):
        sharding.check_tokens(mesh_of(context=2), "data.tokens", 41)


def test_one_device_is_left_alone():
    mesh = sharding.make_mesh(ONES | {"data": -1}, jax.devices()[:1])
    with sharding.use(mesh):
        assert jax.sharding.get_abstract_mesh().empty
    assert sharding.process_rows(mesh, 6).tolist() == list(range(6))
    placed = sharding.place(mesh, {"tokens": np.arange(6).reshape(3, 2)})
    assert placed["tokens"].shape == (3, 2)
