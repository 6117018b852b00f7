"""NVIDIA GPUs to compile for, which are not there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# As XLA describes a GPU (GpuTargetConfigProto in text form): the largest memory of a generation, and two of 24 GB.
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 {} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{}"
"""
GPUS = {
    "h100": _CONFIG.format(
        "threads_per_core_limit: 2048 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
        "core_count: 132 fpus_per_core: 128 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 "
        "clock_rate_ghz: 1.98 device_memory_size: 84930461696 cuda_compute_capability { major: 9 minor: 0 }",
        "NVIDIA H100 80GB HBM3",
    ),
    "a100": _CONFIG.format(
        "threads_per_core_limit: 2048 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 "
        "core_count: 108 fpus_per_core: 64 memory_bandwidth: 2039000000000 l2_cache_size: 41943040 "
        "clock_rate_ghz: 1.41 device_memory_size: 84987740160 cuda_compute_capability { major: 8 minor: 0 }",
        "NVIDIA A100-SXM4-80GB",
    ),
    "rtx4090": _CONFIG.format(
        "threads_per_core_limit: 1536 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376 "
        "core_count: 128 fpus_per_core: 128 memory_bandwidth: 1008000000000 l2_cache_size: 75497472 "
        "clock_rate_ghz: 2.52 device_memory_size: 25757220864 cuda_compute_capability { major: 8 minor: 9 }",
        "NVIDIA GeForce RTX 4090",
    ),
    "l4": _CONFIG.format(
        "threads_per_core_limit: 1536 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376 "
        "core_count: 58 fpus_per_core: 128 memory_bandwidth: 300000000000 l2_cache_size: 50331648 "
        "clock_rate_ghz: 2.04 device_memory_size: 24152899584 cuda_compute_capability { major: 8 minor: 9 }",
        "NVIDIA L4",
    ),
}
HELP = (
    "compiling for a GPU needs jax-cuda13-plugin and jax-cuda13-pjrt of the installed jax's version, ptxas on PATH, "
    "and libdevice: pip install --no-deps the two and nvidia-cuda-nvcc and nvidia-nvvm, put nvidia/cu13/bin of "
    "site-packages on the PATH, and set XLA_FLAGS=--xla_gpu_cuda_data_dir to its nvidia/cu13"
)


def missing() -> str | None:
    """What compiling for a GPU lacks on this machine, or None."""
    flag = re.search(r"--xla_gpu_cuda_data_dir=(\S+)", os.environ.get("XLA_FLAGS", ""))
    toolkit = Path(flag[1] if flag else "/usr/local/cuda")
    if not any(list(Path(x).glob("xla_cuda*")) for x in _plugin_paths()):
        return "the CUDA plugin"
    if shutil.which("ptxas") is None:
        return "ptxas"
    if not (toolkit / "nvvm/libdevice/libdevice.10.bc").is_file():
        return "libdevice"
    return None


def devices(name: str, *, hosts: int = 1, each: int = 1) -> Sequence[Any]:
    """So many hosts with so many GPUs each; for a machine that lacks nothing (`missing`)."""
    # The compiler warns of programs near the limits of its own, which are not those of `Chip`.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jax.experimental import topologies

    shape = f"1x{hosts}x{each}"
    found = topologies.get_topology_desc(topology_name=shape, platform="cuda", topology=shape, target_config=GPUS[name])
    return found.devices


def _plugin_paths() -> Sequence[str]:
    spec = importlib.util.find_spec("jax_plugins")
    return list(spec.submodule_search_locations or ()) if spec else []
