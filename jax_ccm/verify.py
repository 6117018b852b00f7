"""``python -m jax_ccm.verify CONFIG.yaml [--adapter PATH]``: parallel equals recurrent, on your own machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, open_experiment
from jax_ccm.config.schema import Config, save_config
from jax_ccm.errors import UserError, require_least
from jax_ccm.evals import parity
from jax_ccm.records import output, paths
from jax_ccm.records.paths import Folder

COMMAND = "jax_ccm.verify"


@dataclasses.dataclass(frozen=True)
class Options:
    """Checks that the parallel forward (training, evaluation) and the recurrence (chat, streaming) are one function.

    Runs the same sessions both ways, in float32, and compares the logits at every text token, by time step, and the
    gradients of the adapter. Passes if no logit differs by more than 1e-5 times the largest logit (at least 1), and the
    gradients by no more than 1e-4 of their norm; exits 1 otherwise. Also says how far the logits move when the memory
    is hidden: a check without a memory that matters would prove nothing.
    """

    adapter: Folder | None = None
    """Folder or name of a trained adapter, or ORG/NAME[@REVISION] on the hub; without one, that of
    the config (adapter.load), or a random one."""
    random_lora_b: bool = True
    """Without a trained adapter, give the LoRA a random B (seeded): a fresh one is zero, which hides every mistake of
    the gate."""
    examples: int = 3
    """Sessions, of different numbers of chunks, run together as rows of one batch."""
    steps: int = 4
    """Most chunks of context in a session."""
    random_tokens: bool = False
    """Use random tokens even if the config's data can be read."""
    gradients: bool = True
    """Compare the gradients of the adapter as well; the slower half of the check."""
    seed: int = 0
    """Of random tokens and of a random B."""
    workdir: Folder | None = None
    """Where results.json, metrics.jsonl, summary.json and config.yaml go, if wanted."""


def main() -> int:
    options, config = cli.parse(Options, command=COMMAND)
    return 0 if verify(config, options, command=output.command_line(COMMAND))["passed"] else 1


def verify(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the check, prints and optionally writes what it found.

    Args:
      config: the config; computed in float32 whatever ``model.precision`` says.
      options: of the command.
      command: the command line, for the record.

    Returns:
      "passed", "steps" (a dict for each time step), "gradient" and how they were made.

    Raises:
      UserError: for a missing model or adapter, or a method that has no parallel form.
    """
    require_least(options, "--", examples=1, steps=1, seed=0)
    if config.model.precision != "float32":
        print(f"model.precision is {config.model.precision}; the check runs in float32, where rounding hides nothing")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision="float32"))
    with open_experiment(config, adapter=options.adapter) as experiment, jax.default_matmul_precision("highest"):
        result = {"command": command} | _verify(experiment, options)
    parity.print_table(result, sees_memory=experiment.method.remembers)
    if options.workdir is not None:
        _write(config, options.workdir, result)
    return result


def _verify(experiment: Experiment, options: Options) -> dict[str, Any]:
    """What is found, and in which sessions."""
    config, method = experiment.config, experiment.method
    if method.rope == "cache":
        way_out = "; check it with --method.streaming False" if config.method.options().get("streaming") else ""
        raise UserError(
            f"method {method.name!r} takes indices in the cache as positions: it has no parallel form to compare "
            f"with{way_out}"
        )
    if method.recurrent_only:
        raise UserError(
            f"method {method.name!r} selects what it keeps from what was read before: it has no parallel form to "
            "compare with, and no adapter to verify"
        )
    model, adapter = parity.with_adapter(
        experiment.model, options.adapter or config.adapter.load, random_b=options.random_lora_b, seed=options.seed
    )
    examples, source = parity.sessions(
        config.data, experiment.tokenizer, method, experiment.model_config.vocab_size, examples=options.examples,
        steps=options.steps, random_tokens=options.random_tokens, seed=options.seed,
    )  # fmt: skip
    # All text tokens are compared, not only those that training scores.
    examples = [parity.everything_scored(example) for example in examples]
    print(f"{method.name}, {adapter}; {len(examples)} sessions of {source}")
    parallel = parity.parallel_logits(model, method, examples)
    recurrent = parity.recurrent_logits(model, method, examples)
    # How far the memory moves logits at all: without it the check would say nothing.
    bare = parity.parallel_logits(model, method, examples, with_memory=False)
    steps = parity.differences(parallel, recurrent, bare, parity.target_steps(method, examples))
    result = {"method": method.name, "adapter": adapter, "sessions": source, "steps": steps}
    passed = all(row["passed"] for row in steps)
    # Without an adapter there is nothing to take gradients of.
    if options.gradients and jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        loss, ours = parity.parallel_gradients(model, method, examples)
        other, theirs = parity.recurrent_gradients(model, method, examples)
        # In float64: squares of small gradients would be rounded away.
        norm = float(np.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.tree.leaves(ours))))
        gap = parity.gradient_gap(ours, theirs)
        fine = bool(gap <= parity.GRADIENT_TOLERANCE)
        result["gradient"] = {"relative_gap": gap, "norm": norm, "losses": [loss, other], "passed": fine}
        passed = passed and fine
    return result | {"passed": passed}


def _write(config: Config, workdir: Path, result: dict[str, Any]) -> None:
    paths.usable(workdir)
    save_config(config, workdir / "config.yaml")
    output.write_lines(workdir / "metrics.jsonl", result["steps"])
    output.write_json(workdir / "results.json", result)
    summary = {"status": "passed" if result["passed"] else "failed", "gap": max(row["gap"] for row in result["steps"])}
    output.write_json(workdir / "summary.json", summary)


if __name__ == "__main__":
    cli.run(main)
