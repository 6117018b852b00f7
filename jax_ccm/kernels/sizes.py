"""Sizes of the kernels' blocks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a kernel's blocks.

    Attributes:
      q: queries of a block.
      k: keys of a block, for each source.
      kv_heads: key heads of a step.
      group: query heads of each of them in a step, a divisor of G; all of G if a step has several key heads.
    """

    q: int
    k: tuple[int, ...]
    kv_heads: int
    group: int
