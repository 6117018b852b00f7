"""The training step with the smallest and the largest micro-batches that fit."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_ccm.config.loading import build_method
from jax_ccm.config.schema import Config
from jax_ccm.distributed import sharding
from jax_ccm.nn import ModelConfig
from jax_ccm.planning import chips, costs, measure, programs
from jax_ccm.planning.report import say
from jax_ccm.rules.rows import require_parallel
from jax_ccm.training.step import check_spread


def micro_batches(
    config: Config, shape: ModelConfig, devices: Any, chip: chips.Chip, *, find_largest: bool
) -> dict[str, Any]:
    """The training step in the config's micro-batches, and in the largest that fit and make up the same global batch.

    Raises:
      UserError: for what `jax_ccm.train` refuses on such a mesh, too.
    """
    method = build_method(config)
    require_parallel(method)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices)
    sharding.check(mesh, shape)
    # What training refuses is refused before anything is compiled.
    check_spread(config.data, mesh)
    shares, smallest = sharding.row_shares(mesh), config.data.batch_size
    batch = smallest * config.optimizer.accumulation
    print(f"training: {sharding.describe(mesh)}, global batch {batch}")

    def entry(rows: int, found: measure.Need) -> dict[str, Any]:
        count = batch // rows
        one = programs.abstract_batch(config, shape, method, rows)
        cost = costs.training_cost(config, shape, one, count, mesh.shape["tensor"])
        seconds = cost.times(chip, mesh.size, found) if found.fits else {}
        made = {"rows": rows, "accumulation": count, "tokens": config.data.tokens, "mesh": dict(mesh.shape)}
        return made | found.to_json() | {"flops": cost.flops, "seconds": seconds}

    def needs(rows: int) -> measure.Need:
        program = programs.training_step(config, shape, method, mesh, rows, max(batch // rows, 1))
        found = measure.need(program, chip)
        say(f"training step of {rows} rows: {found.bytes / 2**30:.2f} GiB, {'fits' if found.fits else 'does not fit'}")
        return found

    first = needs(smallest)
    made = {"step": entry(smallest, first)}
    if find_largest and first.fits:
        known = {smallest: first}
        # Micro-batches that divide the global batch.
        sizes = [rows for rows in range(shares, batch + 1, shares) if batch % rows == 0 and rows > smallest]
        while sizes:
            middle = sizes[len(sizes) // 2]
            known[middle] = needs(middle)
            # Bytes grow with the rows: halving finds the last size that fits.
            sizes = [n for n in sizes if (n > middle if known[middle].fits else n < middle)]
        most = max(rows for rows, found in known.items() if found.fits)
        made["largest_micro_batch"] = entry(most, known[most])
    return made
