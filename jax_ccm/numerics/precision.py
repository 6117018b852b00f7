"""In which types weights are kept, products are made, and activations stand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy then knows bfloat16
import numpy as np

from jax_ccm.errors import UserError

TYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy of three types, with the words of the library `jmp`.

    Attributes:
      params: the weights of the base are kept in it; an adapter is always float32.
      compute: operands of products are rounded to it; sums are float32.
      output: results of products, and so all activations and the entries of a cache, stand in it.
    """

    params: str = "float32"
    compute: str = "float32"
    output: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) not in TYPES:
                raise UserError(f"model.precision: {field.name} is {value!r}; allowed: {', '.join(TYPES)}")

    @classmethod
    def of(cls, text: Any) -> Precision:
        """Reads a policy: a name of `NAMED`, ``params=T,compute=T,output=T`` with each of `TYPES`, or one type for all.

        Raises:
          UserError: for anything else.
        """
        if isinstance(text, Precision):
            return text
        text = text if isinstance(text, str) else np.dtype(text).name
        if text in NAMED:
            return NAMED[text]
        found = re.fullmatch(r"params=(\w+),compute=(\w+),output=(\w+)", text)
        if found is None:
            raise UserError(
                f"model.precision is {text!r}; allowed: auto, {', '.join(NAMED)}, or "
                "params=T,compute=T,output=T with each T float32 or bfloat16"
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        name = next((name for name, known in NAMED.items() if known == self), None)
        return name or f"params={self.params},compute={self.compute},output={self.output}"


NAMED = {
    "float32": Precision(),
    "bfloat16": Precision("bfloat16", "bfloat16", "bfloat16"),
    # Weights take half the bytes, products run on the units for bfloat16, and nothing is rounded in between.
    "mixed": Precision("bfloat16", "bfloat16", "float32"),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A line of the table of what is fastest where.

    Attributes:
      platform: as JAX names it.
      flags: the processor has one of these, by the names of Linux; () for any processor.
      name: the policy, of `NAMED`.
      reason: why, for people.
    """

    platform: str
    flags: tuple[str, ...]
    name: str
    reason: str


# The first line that fits holds.
TABLE = (
    Choice("tpu", (), "bfloat16", "matrix units multiply bfloat16, and memory holds twice as many weights and slots"),
    Choice("gpu", (), "bfloat16", "tensor cores multiply bfloat16, and memory holds twice as many weights and slots"),
    Choice(
        "cpu",
        # One of a list is enough: AMX and AVX512-BF16 both multiply bfloat16 and add up in float32.
        ("amx_bf16", "avx512_bf16"),
        "mixed",
        "the processor has instructions for products of bfloat16 that are summed in float32",
    ),
    Choice("cpu", (), "float32", "the processor has no instructions for bfloat16"),
)


def automatic(platform: str, flags: frozenset[str] | None = None) -> Choice:
    """The policy that is fastest on a platform.

    Args:
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu".
      flags: what the processor can do, by the names of Linux; None for those of this one. Only a CPU's matter.

    Returns:
      The line of `TABLE`.
    """
    # A GPU that is present is called "gpu"; one that is only compiled for, by its vendor's name.
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    for choice in TABLE:
        if choice.platform != platform:
            continue
        if not choice.flags or set(choice.flags) & (processor_flags() if flags is None else flags):
            return choice
    return Choice(platform, (), "float32", f"nothing was measured on {platform}")


def resolved(precision: str | Precision, platform: str) -> tuple[Precision, str]:
    """A policy, and why it was chosen: the words are empty unless it was "auto".

    Raises:
      UserError: for what is no policy.
    """
    if precision != "auto":
        return Precision.of(precision), ""
    choice = automatic(platform)
    return NAMED[choice.name], f"auto on {choice.platform}: {choice.reason}"


def processor_flags() -> frozenset[str]:
    """What this machine's processor can do, by the names of Linux ("avx512_bf16"); empty where it is not said."""
    # Only Linux has this file; elsewhere a CPU counts as one without instructions for bfloat16.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    # "flags" on x86, "Features" on ARM.
    # The first processor speaks for all of the machine.
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(found.partition(":")[2].split())
