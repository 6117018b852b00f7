"""Chips and topologies that programs are planned for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from jax_ccm.errors import UserError, unknown
from jax_ccm.planning import gpus

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by the maker's numbers.

    Attributes:
      hbm_bytes: memory of one device; a compiler may keep some of it for itself.
      flops: peak of dense bfloat16 products, FLOP/s.
      hbm_bandwidth: bytes/s.
      link_bandwidth: to the other chips of the slice, bytes/s, one direction, all links together.
      source: where the numbers are from.
      accelerator: prefix of the accelerator type that libtpu is told; None for a GPU.
      usable: share of the memory that a program may have. The TPU compiler knows by itself; on a GPU libraries take
        the rest, and XLA_PYTHON_CLIENT_MEM_FRACTION must be set to this (jax's default is 0.75).
      network_bandwidth: between hosts, bytes/s of a GPU, one direction; slices of TPUs have links alone.
    """

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    source: str
    accelerator: str | None = None
    usable: float = 1.0
    network_bandwidth: float | None = None

    @property
    def is_tpu(self) -> bool:
        """Whether it is no GPU."""
        return self.accelerator is not None

    @property
    def compiler(self) -> str:
        """The package with its compiler."""
        return "libtpu" if self.is_tpu else "jax-cuda13-plugin"

    @property
    def usable_bytes(self) -> int:
        """Of the memory of a device."""
        return int(self.usable * self.hbm_bytes)


CHIPS: dict[str, Chip] = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, "https://cloud.google.com/tpu/docs/v5e", "v5litepod"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, "https://cloud.google.com/tpu/docs/v5p", "v5p"),
    "v6e": Chip(32 * GIB, 918e12, 1600e9, 400e9, "https://cloud.google.com/tpu/docs/v6e", "v6e"),
    # Memory as the driver reports it.
    "h100": Chip(
        84930461696, 989e12, 3.35e12, 450e9, "https://www.nvidia.com/en-us/data-center/h100/", usable=0.9,
        network_bandwidth=50e9,
    ),
    "a100": Chip(
        84987740160, 312e12, 2.039e12, 300e9, "https://www.nvidia.com/en-us/data-center/a100/", usable=0.9,
        network_bandwidth=25e9,
    ),
    # Of 24 GB; the link is PCIe 4.0 with 16 lanes.
    "rtx4090": Chip(
        25757220864, 165e12, 1.008e12, 32e9,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf", usable=0.9,
        network_bandwidth=25e9,
    ),
    "l4": Chip(
        24152899584, 121e12, 300e9, 32e9, "https://www.nvidia.com/en-us/data-center/l4/", usable=0.9,
        network_bandwidth=12.5e9,
    ),
}  # fmt: skip


# How JAX calls devices of these chips; the first that fits counts. An H200 computes as an H100, and has more memory; an
# H100 on a PCIe card, or a GPU of a laptop, is slower than those of the table.
KINDS = {
    r"H100 \d+GB HBM3\b|H200\b": "h100", r"A100\b": "a100", r"RTX 4090$": "rtx4090", r"L4$": "l4",
    r"TPU v5 lite|TPU v5e": "v5e", r"TPU v5": "v5p", r"TPU v6": "v6e",
}  # fmt: skip


def named(kind: str) -> Chip | None:
    """The chip of a device by `jax.Device.device_kind`; None for one that is not in the table."""
    return next((CHIPS[name] for pattern, name in KINDS.items() if re.search(rf"\b(?:{pattern})", kind)), None)


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """The chip and the shape of a topology such as "v5e:4x4", "h100:8" or "h100:2x8".

    Raises:
      UserError: for a name of another form, or a chip that is not in the table.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    chip, shape = found.groups() if found else ("", "")
    sizes = tuple(map(int, shape.split("x"))) if shape else ()
    if chip and chip not in CHIPS:
        raise unknown("chip", chip, CHIPS)
    if not chip or len(sizes) not in ((2, 3) if CHIPS[chip].is_tpu else (1, 2)) or 0 in sizes:
        raise UserError(
            f"--topology is {topology!r}; give a chip and a shape, such as v5e:4x4 or v5p:2x2x2, or for GPUs h100:8 or "
            "h100:2x8 (hosts x GPUs of each)"
        )
    return chip, sizes


def find(topology: str) -> Chip:
    """The chip of a topology. Between several hosts of GPUs the network is the link, for all exchanges alike."""
    name, sizes = parse(topology)
    chip = CHIPS[name]
    # One host: its own links are all that is used.
    if chip.network_bandwidth is None or math.prod(sizes[:-1]) == 1:
        return chip
    return dataclasses.replace(chip, link_bandwidth=chip.network_bandwidth)


def devices(topology: str) -> Sequence[Any]:
    """Devices to compile for, which are not there.

    Raises:
      UserError: for a topology that does not exist, or if the compiler for it is not installed.
    """
    chip, sizes = parse(topology)
    accelerator = CHIPS[chip].accelerator
    if accelerator is None:
        if lacks := gpus.missing():
            raise UserError(f"planning for {topology}: {lacks} was not found; {gpus.HELP}")
        *hosts, each = sizes
        return gpus.devices(chip, hosts=math.prod(hosts), each=each)
    count = math.prod(sizes)
    # A host has four chips, unless it has the only one.
    alone = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
    try:
        return tpus(topology, f"{accelerator}-{count}", **alone)
    except UserError:
        raise
    except Exception as e:  # the plugin raises its own kinds
        raise UserError(
            f"--topology {topology} is not one that the TPU compiler knows: {str(e).splitlines()[0]}"
        ) from e


def tpus(name: str, accelerator: str, **options: Any) -> Sequence[Any]:
    """TPUs to compile for, which are not there.

    Args:
      name: of the topology, as libtpu has it.
      accelerator: the accelerator type that libtpu is told, so that it looks for none.
      options: of `jax.experimental.topologies.get_topology_desc`.

    Raises:
      UserError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        needs = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
        wanted = needs[0].split(";")[0].strip() if needs else "libtpu"
        raise UserError(
            f"planning for {name} needs the TPU compiler, which also runs on machines without a TPU: "
            f"pip install '{wanted}' --no-deps"
        )
    # Says that this process is no TPU worker, so that nothing looks for one.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": accelerator, "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    for key, value in settings.items():
        # What the user has set holds.
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
