"""Sizes of the kernels' blocks: what fills whole vectors, fits on the chip, and is refused."""

from __future__ import annotations

import dataclasses
import math

from jax_ccm.attention.shared import Refused

LANES = 128
# The smallest block of rows: one tile of bfloat16.
ROWS = 16
# What a kernel may use without asking for more, on every TPU from v4 on; the rest is left for the compiler's own.
VMEM_BYTES = 14 * 2**20
# Of the 1 MiB of scalar memory; two integers a pair of blocks.
SCALAR_BYTES = 768 * 2**10
HEAD_SIZES = (64, 96, 128, 256)
# Sizes of blocks of queries and keys, best first by `cost.analytic` on long rows; shorter rows take smaller ones.
LONG, SHORT = (256, 512), (128, 128)
LONG_ROW = 2048


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


def choose(
    batch: int, length: int, keys: tuple[int, ...], heads: int, kv_heads: int, size: int, itemsize: int, short: bool
) -> Sizes:
    """Sizes for a call on a TPU.

    Args:
      batch, length: B and T.
      keys: entries of each source.
      heads, kv_heads, size: N, K and H.
      itemsize: bytes of a number.
      short: a few queries against long sources (decoding): all key heads in one step.

    Raises:
      Refused: for what the kernel does not take.
    """
    # A few queries leave room for all heads, and one large read of the cache is quicker than many small ones.
    every = [(kv_heads, heads // kv_heads)] if short else []
    wish = LONG if short or max(length, *keys) >= LONG_ROW else SHORT
    tried = []
    for some, group in (*every, _heads(heads, kv_heads, size)):
        for shrink in (1, 2, 4):
            q = _block(length, max(wish[0] // shrink, LANES))
            k = tuple(_block(n, max(wish[1] // shrink, LANES)) for n in keys)
            tried.append(Sizes(q, k, some, group))
    sizes = next((s for s in tried if vmem_bytes(s, size, itemsize) <= VMEM_BYTES), None)
    if sizes is None:
        least = min(vmem_bytes(s, size, itemsize) for s in tried)
        raise Refused(f"{heads} query and {kv_heads} key heads of {size} need {least / 2**20:.0f} MiB of VMEM a step")
    if pair_bytes(batch, length, keys, sizes) > SCALAR_BYTES:
        raise Refused(f"the list of pairs of {batch} x {length} queries and {keys} keys does not fit scalar memory")
    return sizes


def _heads(heads: int, kv_heads: int, size: int) -> tuple[int, int]:
    """Key heads of a step and query heads of each: neighbours that fill whole vectors, or all of them."""
    group = heads // kv_heads
    some = math.lcm(size, LANES) // size
    if kv_heads % some:
        return kv_heads, group
    if some > 1:
        return some, group
    # Large groups are split over the grid.
    return 1, max(part for part in range(1, group + 1) if group % part == 0 and part * size <= 1024)


def _block(length: int, wish: int) -> int:
    """The size of a block: ``wish``, or all of a shorter row, in whole tiles."""
    tile = ROWS if length < LANES else LANES
    return min(wish, -(-length // tile) * tile)


def vmem_bytes(sizes: Sizes, size: int, itemsize: int) -> int:
    """An estimate of the VMEM that the hungriest of the three kernels uses. Inputs and outputs are double-buffered."""
    queries = sizes.q * sizes.kv_heads * sizes.group * size
    keys = [k * sizes.kv_heads * size for k in sizes.k]
    scores = 5 * 4 * sizes.q * max(sizes.k)
    # Queries, output, its gradient and the result; keys and values of all sources; the float32 sum.
    d_q = 2 * itemsize * (4 * queries + 2 * sum(keys)) + 4 * queries
    # Queries and the output's gradient; keys, values and both results; two float32 sums.
    d_kv = 2 * itemsize * (2 * queries + 4 * max(keys)) + 2 * 4 * max(keys)
    return max(d_q, d_kv) + scores


def pair_bytes(batch: int, length: int, keys: tuple[int, ...], sizes: Sizes) -> int:
    """Scalar memory of the longest list of pairs that there may be."""
    rows = -(-length // sizes.q)
    columns = sum(-(-n // k) for n, k in zip(keys, sizes.k, strict=True))
    # Two int32 a pair, and one spare pair.
    return 8 * (batch * rows * (columns + 1) + 1)
