"""The kernels compiled for TPUs that are not here: they are in the program, and it needs no T x S array."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from jax_ccm.methods import build
from jax_ccm.nn import ModelConfig
from jax_ccm.planning import ahead

pytestmark = [
    pytest.mark.once,
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    # libtpu says so of every process that only compiles.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in ahead.TOPOLOGIES if target != "v5e"]
CONCAT = build("ccm_concat", comp_tokens=8).rule
MIB = 2**20


@pytest.fixture(autouse=True)
def optimized():
    """Programs as they would be run; the other tests compile quickly instead."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("target", ["v5e", *OTHERS])
def test_gradients(target):
    """32 query and 8 key heads of 128 in bfloat16 at T = 4,096: forward, queries, and keys of text and of memory."""
    _, gradients, arguments = ahead.call(CONCAT, 1, 4096, 560)
    found = ahead.compile_for(ahead.mesh_for(target), gradients, *arguments)
    assert found.kernels == 4
    assert found.temporaries <= 48 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TOPOLOGIES)
def test_gradients_of_long_rows(target):
    """T = 32,768: memory grows with the length alone."""
    _, gradients, arguments = ahead.call(CONCAT, 1, 32768, 4520)
    found = ahead.compile_for(ahead.mesh_for(target), gradients, *arguments)
    assert found.kernels == 4
    assert found.temporaries <= 448 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TOPOLOGIES)
@pytest.mark.parametrize(("length", "more"), [(4096, 64), (32768, 512)])
def test_layer(target, length, more):
    """Between projections and output, attention needs no transposed copies: so much more than the same without it."""
    mesh, found = ahead.mesh_for(target), {}
    for attention in (True, False):
        gradients, arguments = ahead.layer(CONCAT, 1, length, length // 58 * 8, attention=attention)
        found[attention] = ahead.compile_for(mesh, gradients, *arguments)
    assert (found[True].kernels, found[False].kernels) == (4, 0)
    assert found[True].temporaries - found[False].temporaries <= more * MIB


def test_training_step():
    """The step of a run, of few and narrow layers: T x S numbers of every head and layer would be 64 MiB."""
    data = dataclasses.replace(ahead.TRAINING.data, batch_size=1, max_chunks=8)
    config = dataclasses.replace(ahead.TRAINING, data=data)
    shape = ModelConfig("llama", 512, 256, 512, 16, 2, 1, 128)
    found = ahead.training_step(ahead.mesh_for("v5e"), config, shape)
    assert found.kernels == 4
    assert found.temporaries <= 64 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TOPOLOGIES)
def test_training_step_of_smollm2(target):
    """8 rows of 1,024 through the layers of SmolLM2-135M."""
    found = ahead.training_step(ahead.mesh_for(target))
    assert found.kernels == 4
    assert found.temporaries <= 6500 * MIB


@pytest.mark.parametrize("target", ["v5e", *OTHERS])
def test_decoding(target):
    """One query of each of 64 sessions against caches of 1,024: the caches are not copied."""
    forward, _, (arrays, _, slots) = ahead.call(CONCAT, 64, 1, 1024)
    found = ahead.compile_for(ahead.mesh_for(target), forward, arrays, slots)
    assert found.kernels == 1
    cache = 2 * arrays[3].size * 2
    assert found.temporaries < cache / 16


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 64), (32, 32, 96), (16, 8, 256), (32, 1, 128)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_heads(heads, dtype):
    """Heads of 64, 96, 128 and 256, alone and in large groups, at lengths that no block divides."""
    _, gradients, arguments = ahead.call(CONCAT, 1, 1000, 137, ahead.Heads(*heads), dtype)
    assert ahead.compile_for(ahead.mesh_for("v5e"), gradients, *arguments).kernels == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("local", {"hidden": 0.3}), ("window", {"size": 100, "sink": True}), ("loma", {})]
)
def test_rules(name, options):
    """Clauses with windows, hidden fractions and both directions compile."""
    forward, _, (arrays, _, slots) = ahead.call(build(name, **options).rule, 1, 1000, 137)
    assert ahead.compile_for(ahead.mesh_for("v5e"), forward, arrays, slots).kernels == 1


@pytest.mark.slow
def test_capped_scores():
    """Gemma 2's scores compile, forward and backward."""
    _, gradients, arguments = ahead.call(CONCAT, 1, 1000, 137, ahead.Heads(8, 4, 256), cap=50.0)
    assert ahead.compile_for(ahead.mesh_for("v5e"), gradients, *arguments).kernels == 4


@pytest.mark.slow
def test_mesh():
    """Rows and heads spread over four devices: each runs the kernel on its own."""
    mesh = ahead.mesh_for("v5e", data=2, tensor=2)
    forward, _, (arrays, _, slots) = ahead.call(CONCAT, 2, 1024, 128)
    assert ahead.compile_for(mesh, forward, arrays, slots).kernels == 1
