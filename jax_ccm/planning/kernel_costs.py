"""What a call of a kernel costs: pairs visited, arithmetic, bytes moved, and the time a roofline gives it.

Everything here is counted or computed ("analytic"), nothing is measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.attention import blocks
from jax_ccm.attention.blocks import SOURCE
from jax_ccm.attention.tpu_sizes import Sizes
from jax_ccm.planning.chips import Chip
from jax_ccm.rules.types import Rule, Slots

# Seconds of a grid step on a TPU (Pallas documentation, "Grids and BlockSpecs"), the same for all, as nothing better is
# known. A GPU's programs run side by side, so that none of them waits for the start of another.
STEP = 0.35e-6


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one kernel.

    Attributes:
      steps: of the grid; on a GPU its programs.
      visited: cells ``queries x keys`` of the visited pairs, for one head.
      flops: of the matrix products.
      bytes: read from and written to HBM by the kernel's pipeline, which skips a block that it already holds; by a
        GPU's programs, as if no cache held what another one has read.
    """

    steps: int
    visited: int
    flops: int
    bytes: int

    def seconds(self, chip: Chip) -> float:
        """The roofline: the slower of arithmetic and memory, and the overhead of each step."""
        return max(self.flops / chip.flops, self.bytes / chip.hbm_bandwidth) + self.steps * STEP * chip.is_tpu


@dataclasses.dataclass(frozen=True)
class Heads:
    """N, K and H."""

    heads: int = 32
    kv_heads: int = 8
    size: int = 128


def count(
    rule: Rule, q_slots: Slots, key_slots: Sequence[Slots], shape: Heads, sizes: Sizes, itemsize: int = 2
) -> dict[str, Cost]:
    """What the TPU kernels do on these slots: ``{"forward", "queries", "keys"}``, the last two the backward pass.

    Args:
      rule: who sees whom.
      q_slots: `Slots` of ``[B, T]``.
      key_slots: `Slots` of ``[B, S]`` of each source.
      shape: of the heads.
      sizes: of the blocks.
      itemsize: bytes of a number.
    """
    pairs, transposed = _lists(rule, q_slots, tuple(key_slots), sizes)
    heads, group = shape.heads, shape.heads // shape.kv_heads
    # A step of the grid has some of the heads; each part walks the whole list of pairs.
    parts = heads // (sizes.kv_heads * sizes.group)
    wide = sizes.kv_heads * sizes.group * shape.size * itemsize
    narrow = sizes.kv_heads * shape.size * itemsize
    # float32: one logsumexp, or one sum for the gradients, of each query and head.
    statistic = 4 * sizes.kv_heads * sizes.group
    cells, runs, loads = _walk(pairs, sizes)
    # Of each block of queries: queries, output (and its gradient, and that of the queries), statistics, slots.
    per_query = {"forward": 2 * wide + statistic + 16, "queries": 4 * wide + 2 * statistic + 16}
    # Forward: scores and output. Queries: scores again, the gradient of the weights, that of the queries.
    products = {"forward": 2, "queries": 3}
    found = {}
    for name, row in per_query.items():
        moved = runs * sizes.q * row + sum(n * k * (2 * narrow + 16) for n, k in zip(loads, sizes.k, strict=True))
        flops = 2 * products[name] * cells * heads * shape.size
        found[name] = Cost(int(pairs.count) * parts, cells, flops, parts * moved)
    total = Cost(0, 0, 0, 0)
    splits = group // sizes.group
    for pairs, k in zip(transposed, sizes.k, strict=True):
        cells, runs, loads = _walk(pairs, Sizes(k, (sizes.q,), 1, 1))
        # A split of the group changes the block of queries at every step.
        queries = (loads[0] if splits == 1 else splits * cells // (k * sizes.q)) * sizes.q
        moved = runs * k * (4 * narrow + 16) + queries * (2 * wide + 2 * statistic) + loads[0] * sizes.q * 16
        parts = shape.kv_heads // sizes.kv_heads
        total = Cost(
            total.steps + int(pairs.count) * parts * splits,
            total.visited + cells,
            # Four products: scores and the gradient of the weights again, and the gradients of keys and values.
            total.flops + 8 * cells * heads * shape.size,
            total.bytes + parts * moved,
        )
    return {**found, "keys": total}


def count_on_gpu(
    rule: Rule,
    q_slots: Slots,
    key_slots: Sequence[Slots],
    shape: Heads,
    sizes: tuple[int, tuple[int, ...]],
    itemsize: int = 2,
) -> dict[str, Cost]:
    """What the GPU kernels do, as `count`; ``sizes`` are those of `gpu.choose`.

    A program has one head, so that each head of a group reads its keys again, and the keys' gradients read queries of
    all heads of the group.
    """
    q, k = sizes
    seen = blocks.seen_blocks(rule, q_slots, key_slots, q, k)
    pairs = [int(jnp.sum(x)) for x in seen]
    cells = sum(n * q * size for n, size in zip(pairs, k, strict=True))
    head, entry = shape.size * itemsize, 4
    rows = seen[0].shape[0] * seen[0].shape[1]
    # Keys, values and slots of what is seen, and where it stands; the number of each source's blocks.
    walked = sum(n * (size * (2 * head + 16) + entry) for n, size in zip(pairs, k, strict=True)) + rows * len(k) * entry
    found = {}
    # Of each query: itself, output (or its gradient and its own), statistics, slots.
    for name, products, own in (("forward", 2, 2 * head + 4 + 16), ("queries", 3, 3 * head + 8 + 16)):
        flops = 2 * products * cells * shape.heads * shape.size
        found[name] = Cost(rows * shape.heads, cells, flops, shape.heads * (rows * q * own + walked))
    columns = [x.shape[0] * x.shape[2] for x in seen]
    own = sum(n * (size * (4 * head + 16)) for n, size in zip(columns, k, strict=True))
    lists = shape.heads * (sum(pairs) + sum(columns)) * entry
    passed = shape.heads * sum(pairs) * q * (2 * head + 8 + 16)
    flops = 8 * cells * shape.heads * shape.size
    found["keys"] = Cost(sum(columns) * shape.kv_heads, cells, flops, shape.kv_heads * own + lists + passed)
    return found


@functools.partial(jax.jit, static_argnames=("rule", "sizes"))
def _lists(rule: Rule, q_slots: Slots, key_slots: tuple[Slots, ...], sizes: Sizes):
    """The list of pairs of the queries' kernels, and that of each source's keys."""
    seen = blocks.seen_blocks(rule, q_slots, key_slots, sizes.q, sizes.k)
    return blocks.list_pairs(*seen), [blocks.list_pairs(jnp.swapaxes(x, 1, 2)) for x in seen]


def _walk(pairs: blocks.Pairs, sizes: Sizes) -> tuple[int, int, list[int]]:
    """Cells visited, runs of one row, and for each source how often a block is loaded."""
    used = int(pairs.count)
    rows, columns = np.asarray(pairs.rows)[:used], np.asarray(pairs.columns)[:used]

    def changes(x):
        return 1 + int(np.count_nonzero(x[1:] != x[:-1]))

    cells, loads = 0, []
    for source, k in enumerate(sizes.k):
        cells += int(np.count_nonzero(rows & (SOURCE << source))) * sizes.q * k
        # A block that stays the same from one step to the next is not loaded again. 16 bits of the column are this
        # source's block.
        loads.append(changes(blocks.batch_of(rows).astype(np.int64) << 16 | columns >> (16 * source) & 0xFFFF))
    # Without the flags: batch row and block of queries.
    return cells, changes(rows >> 4), loads
