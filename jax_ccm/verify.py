"""``python -m jax_ccm.verify CONFIG.yaml [--adapter PATH]``: parallel equals recurrent, on your own machine."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, load_experiment
from jax_ccm.config.schema import Config, save_config
from jax_ccm.distributed import processes, sharding
from jax_ccm.errors import UserError
from jax_ccm.nn import Transformer
from jax_ccm.records.paths import Folder
from jax_ccm.rules.examples import Example, Segment

COMMAND = "jax_ccm.verify"
LOGIT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Large enough that a wrong gate shows, small enough that the model stays itself.
RANDOM_B = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
    """Checks that the parallel forward (training, evaluation) and the recurrence (chat, streaming) are one function.

    Runs the same sessions both ways, in float32, and compares the logits at every text token, by time step, and the
    gradients of the adapter. Passes if no logit differs by more than 1e-5 times the largest logit (at least 1), and the
    gradients by no more than 1e-4 of their norm; exits 1 otherwise. Also says how far the logits move when the memory
    is hidden: a check without a memory that matters would prove nothing.
    """

    adapter: Folder | None = None
    """Folder of a trained adapter, or ORG/NAME[@REVISION] on the hub; without one, that of
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
    options, config, _ = cli.parse(Options, command=COMMAND)
    return 0 if verify(config, options, command=shlex.join(["python", "-m", COMMAND, *sys.argv[1:]]))["passed"] else 1


def verify(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the check, prints and optionally writes what it found.

    Args:
      config: the config; computed in float32 whatever ``model.dtype`` says.
      options: of the command.
      command: the command line, for the record.

    Returns:
      "passed", "steps" (a dict for each time step), "gradient" and how they were made.

    Raises:
      UserError: for a missing model or adapter, or a method that has no parallel form.
    """
    from jax_ccm.evals import parity

    _check(config, options)
    if config.model.dtype != "float32":
        print(f"model.dtype is {config.model.dtype}; the check runs in float32, where rounding hides nothing")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    processes.refuse_several(devices=True)
    experiment = load_experiment(config, adapter=options.adapter)
    method = experiment.method
    if method.rope == "cache":
        way_out = "; check it with --method.streaming False" if config.method.options().get("streaming") else ""
        raise UserError(
            f"method {method.name!r} takes places in the cache as positions: it has no parallel form to compare "
            f"with{way_out}"
        )
    if method.recurrent_only:
        raise UserError(
            f"method {method.name!r} selects what it keeps from what was read before: it has no parallel form to "
            "compare with, and no adapter to verify"
        )
    model, adapter = _with_adapter(experiment, options)
    examples, source = sessions(experiment, options)
    examples = [parity.everything_scored(example) for example in examples]
    print(f"{method.name}, {adapter}; {len(examples)} sessions of {source}")
    with sharding.use(experiment.mesh), jax.default_matmul_precision("highest"):
        parallel = parity.parallel_logits(model, method, examples)
        recurrent = parity.recurrent_logits(model, method, examples)
        bare = parity.parallel_logits(model, method, examples, with_memory=False)
    steps = compare(parallel, recurrent, bare, parity.target_steps(method, examples))
    result = {"command": command, "method": method.name, "adapter": adapter, "sessions": source, "steps": steps}
    passed = all(row["passed"] for row in steps)
    if options.gradients and jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        with sharding.use(experiment.mesh), jax.default_matmul_precision("highest"):
            loss, ours = parity.parallel_gradients(model, method, examples)
            other, theirs = parity.recurrent_gradients(model, method, examples)
        norm = float(np.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.tree.leaves(ours))))
        gap = parity.gradient_gap(ours, theirs)
        fine = bool(gap <= GRADIENT_TOLERANCE)
        result["gradient"] = {"relative_gap": gap, "norm": norm, "losses": [loss, other], "passed": fine}
        passed = passed and fine
    result["passed"] = passed
    _print(result, sees_memory=method.remembers)
    if options.workdir is not None:
        _write(config, options.workdir, result)
    return result


def compare(
    parallel: Sequence[np.ndarray],
    recurrent: Sequence[np.ndarray],
    bare: Sequence[np.ndarray],
    steps: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """Differences by time step.

    Args:
      parallel, recurrent: logits ``[q, V]`` of each session by both roads.
      bare: the same with the memory hidden.
      steps: ``int32 [q]``, chunks closed before each token.

    Returns:
      For each time step "step", "tokens", "gap" (largest difference), "largest" (logit), "allowed", "memory" (largest
      move when the memory is hidden) and "passed".
    """
    rows = []
    for step in range(max(int(row.max(initial=0)) for row in steps) + 1):
        # A session of few tokens may have none at a step.
        pick = lambda rows, step=step: [x[s == step] for x, s in zip(rows, steps, strict=True) if (s == step).any()]
        ours, theirs, without = pick(parallel), pick(recurrent), pick(bare)
        if not ours:
            continue
        difference = lambda a, b: max(float(np.max(np.abs(x - y))) for x, y in zip(a, b, strict=True))
        largest = max(float(np.max(np.abs(x))) for x in ours)
        gap, allowed = difference(ours, theirs), LOGIT_TOLERANCE * max(1.0, largest)
        row = {"step": step, "tokens": sum(len(x) for x in ours), "gap": gap, "largest": largest, "allowed": allowed}
        # Comparing this way round, a NaN does not pass.
        rows.append(row | {"memory": difference(ours, without), "passed": bool(gap <= allowed)})
    return rows


def sessions(experiment: Experiment, options: Options) -> tuple[list[Example], str]:
    """Sessions to run: of the config's data if it can be read, else of random tokens.

    Returns:
      Examples with different numbers of chunks, and what they are.
    """
    counts = np.linspace(options.steps, 1, options.examples).round().astype(int)
    reason = "random tokens are asked for"
    if not options.random_tokens:
        try:
            return _from_data(experiment, [int(count) for count in counts])
        except UserError as error:
            reason = f"the config's data cannot be used: {error}"
    print(f"random tokens ({reason})")
    rng = np.random.default_rng(options.seed)
    vocab = experiment.model_config.vocab_size
    text = lambda low, high: rng.integers(0, vocab, int(rng.integers(low, high))).astype(np.int32)
    unscored = lambda tokens: Segment(tokens, np.zeros(len(tokens), bool))
    start, separator = text(1, 2), text(2, 3)
    made = [
        Example(start, separator, tuple(unscored(text(3, 12)) for _ in range(count + 1)), f"random session {number}")
        for number, count in enumerate(counts)
    ]
    return made, "random tokens"


def _from_data(experiment: Experiment, counts: Sequence[int]) -> tuple[list[Example], str]:
    from jax_ccm.data.questions import Evaluation

    data = experiment.config.data
    split = next((name for name in ("validation", "test") if getattr(data, name)), None)
    if split is None:
        raise UserError("data.validation and data.test are empty")
    evaluation = Evaluation.open(data, experiment.tokenizer, split)
    if data.ratio is not None:
        # Windows with their spans, up to as many of them as are wanted.
        texts = evaluation.texts(marked=experiment.method.heeds_marks)
        windows = [texts[number % len(texts)] for number in range(len(counts))]
        shorter = lambda example, count: dataclasses.replace(example, segments=example.segments[: count + 1])
        return list(map(shorter, windows, counts)), f"windows of data.{split}"
    found = []
    for number, count in enumerate(counts):
        # The longest context that there is, up to the one wanted.
        for step in range(count, 0, -1):
            examples = evaluation.examples(step)
            if examples:
                found.append(examples[number % len(examples)])
                break
    if not found:
        raise UserError(f"data.{split} has no record with a chunk of context")
    return found, f"data.{split}"


def _with_adapter(experiment: Experiment, options: Options) -> tuple[Transformer, str]:
    """The model to check, and what its adapter is called."""
    path = options.adapter or experiment.config.adapter.load
    if path:
        return experiment.model, f"the adapter of {path}"
    if not options.random_lora_b or not experiment.adapter_config.rank:
        return experiment.model, "an untrained adapter (its LoRA does nothing)"
    graphdef, adapter, base = nnx.split(experiment.model, nnx.LoRAParam, ...)
    leaves, tree = jax.tree_util.tree_flatten_with_path(adapter)
    keys = jax.random.split(jax.random.key(options.seed), len(leaves))
    drawn = [
        RANDOM_B * jax.random.normal(key, leaf.shape, leaf.dtype) if "lora_b" in jax.tree_util.keystr(path) else leaf
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    adapter = jax.tree.unflatten(tree, drawn)
    described = f"a random adapter: no trained one was given, and its B is drawn with deviation {RANDOM_B}"
    return nnx.merge(graphdef, adapter, base), f"{described} (seed {options.seed})"


def _check(config: Config, options: Options) -> None:
    for name in ("examples", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; it must be at least 0")


def _print(result: dict[str, Any], sees_memory: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("time step", "tokens", "largest logit", "parallel - recurrent", "allowed", "without memory", ""):
        table.add_column(column, justify="right")
    verdict = lambda passed: "ok" if passed else "FAILED"
    for row in result["steps"]:
        table.add_row(str(row["step"]), str(row["tokens"]), f"{row['largest']:.2f}", f"{row['gap']:.2e}",
                      f"{row['allowed']:.2e}", f"{row['memory']:.2e}", verdict(row["passed"]))  # fmt: skip
    Console(width=100).print(table)
    if "gradient" in result:
        gradient = result["gradient"]
        print(
            f"adapter gradient: |parallel - recurrent| / |parallel| = {gradient['relative_gap']:.2e} "
            f"(allowed {GRADIENT_TOLERANCE:.0e}, norm {gradient['norm']:.3g}) {verdict(gradient['passed'])}"
        )
    moved = max(row["memory"] for row in result["steps"])
    if sees_memory and moved < 1e-3:
        print(f"note: hiding the memory moves logits by {moved:.1e} at most; with this adapter the check says little")
    print("passed: parallel and recurrent agree" if result["passed"] else "FAILED: parallel and recurrent differ")


def _write(config: Config, workdir: Path, result: dict[str, Any]) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir {workdir} cannot be used: {e}") from e
    save_config(config, workdir / "config.yaml")
    lines = [json.dumps(row) for row in result["steps"]]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (workdir / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    summary = {"status": "passed" if result["passed"] else "failed", "gap": max(row["gap"] for row in result["steps"])}
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
