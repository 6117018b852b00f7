"""``python -m jax_ccm.evaluate CONFIG.yaml --workdir DIR [--adapter PATH]``: quality by time step, side by side."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

from jax_ccm.config import cli
from jax_ccm.config.adapters import chosen, config_beside
from jax_ccm.config.loading import Experiment, base_source, open_experiment
from jax_ccm.config.schema import Config, save_config, to_mapping
from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError, unknown
from jax_ccm.records import output, paths
from jax_ccm.records.paths import Folder
from jax_ccm.rules.describe import describe_method, label

COMMAND = "jax_ccm.evaluate"


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluates no context, full context and the compressed memory side by side, by time step.

    Perplexity of the target, accuracy where the records have choices, replies (`--eval.reply_tokens 32`) and bytes of
    the cache; beside each the control with the memory of another conversation. No context and full context are the base
    model with the adapter's LoRA off. Writes results.json, table.md, plot.png, recall.png, replies.jsonl or
    continuations.jsonl, metrics.jsonl, summary.json and config.yaml into the working directory, and of a trained
    adapter the model card, README.md. Any key of the config can be overridden, as in `--eval.max_examples 100`.
    """

    workdir: Folder
    """Where all output goes."""
    adapter: Folder | None = None
    """Folder or name of the trained adapter, or ORG/NAME[@REVISION] on the hub; without one, that of
    the config (adapter.load), or an untrained one."""
    full_adapter: Folder | None = None
    """Folder of a plain LoRA trained on full context: the fair ceiling, a fourth system."""
    store: Folder | None = None
    """Folder in which scores are kept: given again, baselines (or an interrupted evaluation) are not run again."""
    split: Literal["test", "validation"] = "test"
    """Which sources of the config's data to evaluate on. Choose settings on validation, report on test."""


def main() -> None:
    options, config = cli.parse(Options, command=COMMAND)
    evaluate(config, options, command=output.command_line(COMMAND))


def evaluate(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the evaluation and writes its files.

    Args:
      config: the config.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``results.json``.

    Raises:
      UserError: for a missing adapter, empty data, a working directory that belongs to a training run.
    """
    start = time.perf_counter()
    _check(config, options)
    with open_experiment(config, adapter=options.adapter) as experiment:
        sharding.check_rows(experiment.mesh, "eval.batch_size", config.eval.batch_size)
        return _evaluate(experiment, options, command, start)


def _evaluate(experiment: Experiment, options: Options, command: str, start: float) -> dict[str, Any]:
    from jax_ccm.data.questions import Evaluation
    from jax_ccm.evals import attended, card, continuations, perplexity, recall, report, streaming
    from jax_ccm.evals.replies import Asking
    from jax_ccm.evals.scoring import Store
    from jax_ccm.evals.systems import DEFAULT, ask, fingerprint, make_system, measure
    from jax_ccm.weights.identity import describe_base

    config, model, method, said = experiment.config, experiment.model, experiment.method, experiment.config.eval
    evaluation = Evaluation.open(config.data, experiment.tokenizer, options.split)
    print(f"{options.split} data: {evaluation.report}")
    choices = said.by == "age" or (said.by in ("step", "task") and evaluation.has_choices)
    how = {"by": said.by, "most": said.max_examples, "choices": choices}
    shown = {"split": options.split, "tokens": said.reply_tokens, "control": said.control}
    questions, missing = ask(evaluation, method, said.steps, **shown, **how)
    base, adapter = describe_base(model, experiment.base_name), options.adapter or config.adapter.load
    systems = {
        name: make_system(
            name, model, method, base=base, source=base_source(config), adapter=adapter, capacity=config.cache.newest,
            full_adapter=options.full_adapter, accept_quantised_base=config.adapter.accept_quantised_base,
        )
        for name in [*(said.methods or DEFAULT[said.by]), *(["full_lora"] if options.full_adapter else [])]
    }  # fmt: skip
    asking = Asking.of(config.data, experiment.tokenizer, experiment.template, experiment.reply_ends, said.reply_tokens)
    if said.by == "continuation" and asking is not None:
        asking = continuations.Continuing.of(asking, said, model=model, tokenizer=experiment.tokenizer, base=base)
    sizes = (said.window, getattr(config.data, "chunk", 0), config.cache.memory_capacity, method)
    budget = streaming.Budget(*sizes) if said.by == "stream" else None
    work = {"rows": said.batch_size, "store": Store(options.store) if options.store else None, "log": report.say}
    measured = {
        name: measure(system, evaluation, questions, asking=asking, budget=budget, **how, **work)
        for name, system in systems.items()
    }
    results = report.about(
        to_mapping(config), command, base=base, memory=label(describe_method(method)), split=options.split,
        adapter={"path": str(adapter), "fingerprint": fingerprint(model)} if adapter else None,
        full_adapter=options.full_adapter, systems={name: system.description for name, system in systems.items()},
    )  # fmt: skip
    results["data"] |= {"report": str(evaluation.report), "steps_without_records": missing}
    results["kv_bytes_per_slot"] = slot_bytes = experiment.model_config.kv_bytes_per_slot(model.dtype.itemsize)
    # A longer stream holds the shorter one.
    rows = perplexity.summarise(questions, measured, slot_bytes, pooled=budget is None)
    results["steps"] = perplexity.to_json(streaming.compared(rows, measured) if budget else rows)
    if said.by == "age" and (cells := recall.grid(questions, measured, slot_bytes)):
        results["recall"] = cells
    if isinstance(asking, continuations.Continuing):
        results["reference"] = continuations.reference(questions, asking, **work)
    if said.attention:
        asked = questions[-1:] if said.by == "step" else questions
        held = {"rows": said.batch_size, "capacity": config.cache.newest}
        results["attention"] = attended.of(asked, model, method, most=said.attention, **held)
    results["seconds"] = round(time.perf_counter() - start, 1)
    save_config(config, options.workdir / "config.yaml")
    report.write(options.workdir, results, asking and perplexity.reply_lines(questions, measured, asking.texts))
    if adapter and experiment.loaded is not None:
        trained = config_beside(adapter)
        recipe, told = (None, config.card) if trained is None else (chosen(trained), trained.card)
        card.write(options.workdir, str(adapter), experiment.loaded, recipe=recipe, said=told, results=[results])
    return results


def _check(config: Config, options: Options) -> None:
    from jax_ccm.evals.systems import SYSTEMS

    for name in config.eval.methods:
        if name not in SYSTEMS[config.eval.by]:
            raise unknown(f"entry of eval.methods (by {config.eval.by})", name, SYSTEMS[config.eval.by])
    if not getattr(config.data, options.split):
        raise UserError(f"data.{options.split} is empty; name at least one source to evaluate on")
    paths.usable_beside_training(options.workdir)


if __name__ == "__main__":
    cli.run(main)
