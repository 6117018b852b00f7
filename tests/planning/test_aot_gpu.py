"""The Triton kernels compiled for GPUs that are not here, each in a process that a failed compilation may abort."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from jax_ccm.planning import gpus

MISSING = gpus.missing()
pytestmark = [
    pytest.mark.once,
    pytest.mark.aot,
    pytest.mark.skipif(MISSING is not None, reason=f"{MISSING} is not installed"),
]
MIB = 2**20

# Gradients of heads, type and rule named on the command line, at lengths that no block divides.
PROGRAM = """
import sys
import jax.numpy as jnp
from jax_ccm.methods import build
from jax_ccm.planning import ahead
target, heads, kv_heads, size, dtype, name, options = sys.argv[1:]
rule = build(name, **eval(options)).rule
heads = ahead.Heads(int(heads), int(kv_heads), int(size))
_, gradients, arguments = ahead.call(rule, 1, 1000, 137, heads, getattr(jnp, dtype))
print(ahead.compile_for(ahead.mesh_for(target), gradients, *arguments).kernels)
"""


def run(*arguments: str) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("target", ["h100", pytest.param("a100", marks=pytest.mark.slow)])
def test_report(target, tmp_path):
    """Attention, a layer, decoding and a training step: the kernel is in them, no T x S array, no copy."""
    run("-m", "jax_ccm.plan", "kernels", str(tmp_path / "gpu.json"), target)
    rows = json.loads((tmp_path / "gpu.json").read_text())["compiled"]
    found = {(row["what"], row["length"]): row for row in rows}
    kernels = {"attention": 4, "layer": 4, "layer without attention": 0, "decode": 1, "training step": 4}
    assert all(row["kernels"] == kernels[what] for (what, _), row in found.items())
    temporaries = {program: row["temporaries"] / MIB for program, row in found.items()}
    for length, alone, more in ((4096, 48, 64), (32768, 448, 512)):
        assert temporaries["attention", length] <= alone
        assert temporaries["layer", length] - temporaries["layer without attention", length] <= more
    assert temporaries["decode", 1] <= 16
    assert temporaries["training step", 1024] <= 6500


@pytest.mark.slow
@pytest.mark.parametrize("target", gpus.GPUS)
@pytest.mark.parametrize(
    ("heads", "dtype", "rule"),
    [
        ((9, 3, 64), "bfloat16", ("ccm_concat", "dict(comp_tokens=8)")),
        ((16, 8, 256), "bfloat16", ("ccm_concat", "dict(comp_tokens=8)")),
        ((32, 1, 128), "float32", ("ccm_concat", "dict(comp_tokens=8)")),
        ((16, 8, 256), "float32", ("ccm_concat", "dict(comp_tokens=8)")),
        ((32, 8, 128), "bfloat16", ("window", "dict(size=100, sink=True)")),
        ((32, 8, 128), "bfloat16", ("loma", "{}")),
        ((32, 8, 128), "bfloat16", ("sentinel", "{}")),
    ],
    ids=str,
)
def test_gradients(target, heads, dtype, rule):
    assert run("-c", PROGRAM, target, *map(str, heads), dtype, *rule).split()[-1] == "4"
