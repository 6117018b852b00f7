"""``python -m jax_ccm.bench CONFIG.yaml --workdir DIR``: speed and memory side by side, against the machine's rates."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.benchmarks import baselines, report
from jax_ccm.benchmarks.baselines import Baseline
from jax_ccm.benchmarks.settings import Options, check
from jax_ccm.benchmarks.steps import random_text, single_steps, training_flops
from jax_ccm.benchmarks.turns import after_turns, sessions_that_fit, weights_bytes
from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, open_experiment
from jax_ccm.config.schema import Config, save_config, to_mapping
from jax_ccm.distributed import sharding
from jax_ccm.records import output
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.rows import batch, measure
from jax_ccm.training.step import init_state, make_optimizer, make_schedule, make_step, split

COMMAND = "jax_ccm.bench"


def main() -> None:
    options, config = cli.parse(Options, command=COMMAND)
    bench(config, options, command=output.command_line(COMMAND))


def bench(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the measurements and writes their files.

    Args:
      config: the config.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``bench.json``.

    Raises:
      UserError: for sizes that cannot be, or a working directory or reference that cannot be used.
    """
    start = time.perf_counter()
    reference = check(options)
    ways = baselines.compared(
        config.method.name, config.method.options(), capacity=config.cache.memory_capacity, window=options.window
    )
    with open_experiment(config) as experiment:
        config = experiment.config
        if experiment.method.recurrent_only and options.train_rounds:
            print(f"note: training is left out; method {experiment.method.name!r} runs only as a recurrence")
            options = dataclasses.replace(options, train_rounds=0)
        if options.train_rounds:
            # Before the measurements, which take minutes, and of which training is the last.
            sharding.check_rows(experiment.mesh, "data.batch_size", config.data.batch_size)
        results = _measure(experiment, ways, options, command)
    if reference is not None:
        results["reference"] = reference
    results["seconds"] = round(time.perf_counter() - start, 1)
    save_config(config, options.workdir / "config.yaml")
    report.write(options.workdir, results)
    report.print_tables(results)
    print(f"results in {options.workdir / 'bench.json'}, picture in plot.png; {results['seconds']:.0f} s")
    return results


def _measure(experiment: Experiment, ways: list[Baseline], options: Options, command: str) -> dict[str, Any]:
    """All that is measured, and of what."""
    config = experiment.config
    results: dict[str, Any] = {
        "schema": output.SCHEMA,
        "command": command,
        "title": f"{experiment.base_name.rsplit('/', 1)[-1]}, {config.model.precision}, "
        f"{report.machine(experiment.mesh)}",
        "config": to_mapping(config),
        "options": dataclasses.asdict(options),
        "how": "each number is the median of repeated runs after warm-up; baselines take turns within a round. Turns: "
        "the cache is put into the state after so many turns and one turn is run; no 1,000 turns were talked through",
        "baselines": {baseline.name: baseline.note for baseline in ways},
        "mesh": dict(experiment.mesh.shape),
        "weights_bytes": weights_bytes(experiment.model),
        "kv_bytes_per_slot": experiment.model_config.kv_bytes_per_slot(experiment.model.dtype.itemsize),
    } | report.environment()
    # A copy of all layers: made once, and only if some program is faster with it.
    unstacked = functools.cache(experiment.model.unstacked)
    results["turns"] = [after_turns(experiment.model, unstacked, ways, options, turns) for turns in options.turns]
    results |= single_steps(
        experiment.model,
        experiment.method,
        experiment.mesh,
        unstacked,
        ways,
        options,
        lambda chunk: training_step(experiment, chunk),
    )
    if options.memory_gib:
        results["sessions"] = sessions_that_fit(experiment.model, experiment.mesh, ways, options)
    return results


def training_step(experiment: Experiment, length: int) -> tuple[Callable[[], Any], dict[str, int], float]:
    """A training step of the config on rows of about ``length`` tokens: the call, its sizes, and the FLOPs it needs."""
    config, method, shape = experiment.config, experiment.method, experiment.model_config
    turn = max(min(16, length // 4), 1)
    chunks = max(length // (turn + len(method.closes)) - 1, 1)
    row = random_text(shape.vocab_size, [turn] * (chunks + 1))
    sizes = measure(method, row)
    made = batch(method, [row] * config.data.batch_size, sizes, shape.vocab_size)
    graphdef, params, frozen = split(experiment.model, config.train.trainable)
    # Of any length: what the rate is costs nothing.
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 100))

    def init(params):
        return init_state(params, optimizer)

    shardings = sharding.parameter_shardings(experiment.mesh, jax.eval_shape(init, params), shape)
    out = (shardings, sharding.replicated(experiment.mesh))
    dropout = config.adapter.dropout > 0
    step = make_step(
        graphdef, method, optimizer, config.train, objective=config.objective, dropout=dropout, shardings=out
    )
    # [1, B, ...]: one micro-batch a step.
    batches: Batch = sharding.place(experiment.mesh, jax.tree.map(lambda x: np.asarray(x)[None], made), leading=1)
    # A copy: the step is given its state for good, and the model's arrays are still needed.
    state = [jax.tree.map(jnp.copy, jax.jit(init, out_shardings=shardings)(params))]
    key = jax.random.key(0)
    # Ahead of time, as in training: an executable cannot be compiled again while it is measured.
    compiled = step.lower(state[0], frozen, batches, key).compile()

    def run() -> Any:
        state[0], metrics = compiled(state[0], frozen, batches, key)
        return jax.block_until_ready(metrics)

    counts = {name: config.data.batch_size * count for name, count in (("rows", 1), ("tokens", sizes.tokens))}
    counts["scored"] = config.data.batch_size * sizes.scored
    return run, counts, training_flops(config, shape, method, made)


if __name__ == "__main__":
    cli.run(main)
