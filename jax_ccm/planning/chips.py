"""Chips and topologies that programs are planned for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from jax_ccm.errors import UserError, unknown

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by the maker's numbers.

    Attributes:
      hbm_bytes: memory, as the maker states it; a compiler may keep some of it for itself.
      flops: peak of dense bfloat16 products, FLOP/s.
      hbm_bandwidth: bytes/s.
      link_bandwidth: to the other chips of the slice, bytes/s, one direction, all links together.
      accelerator: prefix of the accelerator type that libtpu is told.
      source: where the numbers are from.
    """

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    accelerator: str
    source: str


CHIPS: dict[str, Chip] = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, "v5litepod", "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, "v5p", "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(32 * GIB, 918e12, 1600e9, 400e9, "v6e", "https://cloud.google.com/tpu/docs/v6e"),
}


def parse(topology: str) -> tuple[str, int]:
    """The chip and the number of chips of a topology such as "v5e:4x4".

    Raises:
      UserError: for a name of another form, or a chip that is not in the table.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", topology)
    if found is None:
        raise UserError(f"--topology is {topology!r}; give a chip and a shape, such as v5e:4x4 or v5p:2x2x2")
    chip, shape = found.groups()
    if chip not in CHIPS:
        raise unknown("chip", chip, CHIPS)
    count = 1
    for size in shape.split("x"):
        count *= int(size)
    return chip, count


def devices(topology: str) -> Sequence[Any]:
    """Devices to compile for, which are not there.

    Raises:
      UserError: for a topology that does not exist, or if the TPU compiler is not installed.
    """
    chip, count = parse(topology)
    if importlib.util.find_spec("libtpu") is None:
        needs = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
        wanted = needs[0].split(";")[0].strip() if needs else "libtpu"
        raise UserError(
            f"planning for {topology} needs the TPU compiler, which also runs on machines without a TPU: "
            f"pip install '{wanted}' --no-deps"
        )
    # Says that this process is no TPU worker, so that nothing looks for one.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": f"{CHIPS[chip].accelerator}-{count}",
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # A host has four chips, unless it has the only one.
    alone = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu", **alone).devices
    except Exception as e:  # the plugin raises its own kinds
        raise UserError(
            f"--topology {topology} is not one that the TPU compiler knows: {str(e).splitlines()[0]}"
        ) from e
