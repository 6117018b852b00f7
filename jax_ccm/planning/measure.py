"""Compiles a program and reads off what it needs; finds the largest size that fits."""

from __future__ import annotations

import dataclasses
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from jax_ccm.planning import hlo
from jax_ccm.planning.chips import Chip
from jax_ccm.planning.programs import Program, device_bytes

# Sizes are found to this share of themselves.
PRECISION = 0.02
# The two ways in which the TPU compiler says how much it would have needed.
_NEEDED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM|[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")


@dataclasses.dataclass(frozen=True)
class Need:
    """What a compiled program takes of each device.

    Attributes:
      fits: whether the compiler found room for it, within what a program may have.
      bytes: arguments, results that do not take the place of arguments, temporaries and the program.
      kinds: the same by kind: those of `Program.kinds`, "temporaries" and "other".
      collectives: of the program; empty if it does not fit.
      seconds: that lowering and compiling took.
    """

    fits: bool
    bytes: int
    kinds: dict[str, int]
    collectives: list[hlo.Collective]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the collectives as lines."""
        return {
            "fits": self.fits,
            "hbm_bytes": self.bytes,
            "hbm_bytes_by_kind": self.kinds,
            "collectives": hlo.lines(self.collectives),
            "collective_bytes_sent": int(sum(c.sent for c in self.collectives)),
            "compile_seconds": round(self.seconds, 1),
        }


def need(program: Program, chip: Chip) -> Need:
    """Compiles a program for the devices of its mesh."""
    start = time.perf_counter()
    kinds = {name: device_bytes(tree) for name, tree in program.kinds.items()}
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        needed = _NEEDED.search(str(e))
        # Where a compiler does not say, just more than there is.
        total = _number(*(needed.group(1, 2) if needed[1] else needed.group(3, 4))) if needed else chip.usable_bytes + 1
        kinds["temporaries"] = max(total - sum(kinds.values()), 0)
        return Need(False, total, kinds, [], time.perf_counter() - start)
    stats = compiled.memory_analysis()
    kinds["temporaries"] = stats.temp_size_in_bytes
    # Results that take the place of donated arguments are counted with these.
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + results + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    # Padding of arrays to the tiles of the hardware, results, and the program itself.
    kinds["other"] = total - sum(kinds.values())
    found = hlo.collectives(compiled.as_text())
    return Need(total <= chip.usable_bytes, total, kinds, found, time.perf_counter() - start)


def largest(needs: Callable[[int], Need], *, step: int, guess: int, limit: int) -> tuple[int, dict[int, Need]]:
    """The largest multiple of ``step`` that fits, to `PRECISION`, by bisection along a straight line.

    Args:
      needs: compiles for a size; bytes grow with it.
      step: sizes are multiples of this.
      guess: where to begin.
      limit: bytes of a device, for the line; what fits is decided by the compiler.

    Returns:
      The size, 0 if not even one step fits, and all that was compiled.
    """
    tried: dict[int, Need] = {}
    low, high = 0, None
    size = max(step, guess // step * step)
    while True:
        found = tried[size] = needs(size)
        low, high = (max(low, size), high) if found.fits else (low, size if high is None else min(high, size))
        margin = max(step, int(low * PRECISION) // step * step)
        if high is not None and high - low <= margin:
            return low, tried
        size = _next(tried, low, high, margin, step, limit)


def _next(tried: dict[int, Need], low: int, high: int | None, margin: int, step: int, limit: int) -> int:
    """Where the straight line through the two last sizes meets the limit, kept inside what is open."""
    *_, last = tried
    if len(tried) > 1:
        before = list(tried)[-2]
        slope = (tried[last].bytes - tried[before].bytes) / (last - before)
        aim = last + (limit - tried[last].bytes) / slope if slope > 0 else 2 * last
    else:
        aim = last * limit / tried[last].bytes
    # A little below the line, so that it is rather a size that fits.
    aim = int(aim * (1 - PRECISION / 4)) // step * step
    if high is None:
        return aim if aim > low else low + margin
    # The line is trusted for the first steps; after them halving ends the search in any case.
    if low < aim < high and len(tried) < 6:
        return aim
    if low <= aim <= low + margin and len(tried) < 6:
        return low + margin
    # Bytes are no straight line here.
    return max((low + high) // 2 // step * step, low + step)


def host_bytes() -> int:
    """The most memory that this process has had."""
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _number(digits: str, unit: str) -> int:
    return int(float(digits) * 1024 ** " KMGT".index(unit or " "))
