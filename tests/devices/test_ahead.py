"""Attention as the check times it, compiled for a GPU that is not here, in a process that a failure may abort."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jax_ccm.devices import attention
from jax_ccm.planning import gpus

MISSING = gpus.missing()
pytestmark = [
    pytest.mark.once,
    pytest.mark.aot,
    pytest.mark.skipif(MISSING is not None, reason=f"{MISSING} is not installed"),
]

# JAX asks for the version of cuDNN before it writes the program, and there is none where there is no GPU.
PROGRAM = """
import sys
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax_ccm.devices import attention
from jax_ccm.devices.settings import SIZES
from jax_ccm.planning import ahead
fused.check_cudnn_version = lambda: 91000
name, length = sys.argv[1], int(sys.argv[2])
forward, gradients, (arrays, d_out, slots) = attention.program(name, length, length // 58 * 8, SIZES["full"].heads)
mesh = ahead.mesh_for("h100")
for call, arguments in ((forward, (arrays, slots)), (gradients, (arrays, d_out, slots))):
    print(ahead.compile_for(mesh, call, *arguments).kernels)
"""


@pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [512, pytest.param(32768, marks=pytest.mark.slow)])
def test_attention_for_an_h100(name, length):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", PROGRAM, name, str(length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    # Ours: forward, queries, and keys of text and of memory. cuDNN's are none of Triton.
    assert done.stdout.split() == (["1", "4"] if name == "pallas" else ["0", "0"])
