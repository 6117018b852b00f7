"""``python -m jax_ccm.evaluate CONFIG.yaml --workdir DIR [--adapter PATH]``: quality by time step, side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, base_source, load_experiment
from jax_ccm.config.schema import Config, save_config, to_mapping
from jax_ccm.distributed import processes, sharding
from jax_ccm.errors import UserError, unknown
from jax_ccm.methods import build
from jax_ccm.nn import Transformer, abstract_transformer
from jax_ccm.records import paths
from jax_ccm.records.paths import Folder
from jax_ccm.rules.describe import describe_method, label

COMMAND = "jax_ccm.evaluate"
SYSTEMS = {"step": ("none", "full", "uncompressed", "memory"), "text": ("full", "uncompressed", "memory")}
DEFAULT = {"step": ("none", "full", "memory"), "text": ("full", "uncompressed", "memory")}
PACKAGES = ("jax_ccm", "jax", "jaxlib", "flax", "numpy", "transformers")


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluates no context, full context and the compressed memory side by side, by time step.

    Perplexity of the target, accuracy where the records have choices, and bytes of the cache; beside each the control
    with the memory of another conversation. No context and full context are the base model with the adapter's LoRA
    off. Writes results.json, table.md, plot.png, metrics.jsonl, summary.json and config.yaml into the working
    directory. Any key of the config can be overridden, as in `--eval.max_examples 100`.
    """

    workdir: Folder
    """Where all output goes."""
    adapter: Folder | None = None
    """Folder of the trained adapter, or ORG/NAME[@REVISION] on the hub; without one, that of
    the config (adapter.load), or an untrained one."""
    full_adapter: Folder | None = None
    """Folder of a plain LoRA trained on full context: the fair ceiling, a fourth system."""
    store: Folder | None = None
    """Folder in which scores are kept: given again, baselines (or an interrupted evaluation) are not run again."""
    split: Literal["test", "validation"] = "test"
    """Which sources of the config's data to evaluate on. Choose settings on validation, report on test."""


def main() -> None:
    options, config, _ = cli.parse(Options, command=COMMAND)
    evaluate(config, options, command=shlex.join(["python", "-m", COMMAND, *sys.argv[1:]]))


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
    processes.refuse_several(devices=True)
    experiment = load_experiment(config, adapter=options.adapter)
    sharding.check_rows(experiment.mesh, "eval.batch_size", config.eval.batch_size)
    with sharding.use(experiment.mesh):
        return _evaluate(experiment, options, command, start)


def _evaluate(experiment: Experiment, options: Options, command: str, start: float) -> dict[str, Any]:
    from jax_ccm.data.questions import Evaluation
    from jax_ccm.evals import perplexity, texts
    from jax_ccm.evals.scoring import Store

    config = experiment.config
    evaluation = Evaluation.open(config.data, experiment.tokenizer, options.split)
    print(f"{options.split} data: {evaluation.report}")
    choices = config.eval.by == "step" and evaluation.has_choices
    if config.eval.by == "text":
        questions = texts.windows(evaluation, experiment.method, config.eval.max_examples)
        print(f"{len(questions[0].right):,} windows of {options.split}")
    else:
        questions = perplexity.stages(evaluation, config.eval.steps, most=config.eval.max_examples, choices=choices)
        for stage in questions:
            control = f"no wrong-memory control ({stage.note})" if stage.note else "with wrong-memory control"
            print(f"t={stage.step}: {len(stage.right):,} of {options.split}, {control}")
    missing = sorted(set(config.eval.steps) - {stage.step for stage in questions}) if config.eval.by == "step" else []
    for step in missing:
        print(f"no record has {step} chunks of context: time step {step} is left out")
    store = Store(options.store) if options.store else None
    measured, systems, again = {}, {}, None
    work = dict(rows=config.eval.batch_size, store=store, log=_say)
    for name in [*(config.eval.methods or DEFAULT[config.eval.by]), *(["full_lora"] if options.full_adapter else [])]:
        system = _system(name, experiment, options)
        systems[name] = system.description
        if config.eval.by == "text":
            asked = texts.windows(evaluation, system.method, config.eval.max_examples)
            measured[name] = texts.measure(system, asked, **work)
            if name == "memory" and system.method.repeat is not None:
                again = texts.repetition(system, asked, **work)
        else:
            answer = evaluation.answer if choices else None
            measured[name] = perplexity.measure(system, questions, answer=answer, **work)
    itemsize = jnp.dtype(config.model.dtype).itemsize
    slot_bytes = experiment.model_config.kv_bytes_per_slot(itemsize)
    results = _results(config, options, experiment, command, systems)
    results["data"] |= {"report": str(evaluation.report), "steps_without_records": missing}
    results["kv_bytes_per_slot"] = slot_bytes
    results["steps"] = perplexity.to_json(perplexity.compare(questions, measured, slot_bytes))
    if again is not None:
        results["steps"][0]["systems"]["memory"]["repetition"] = again
    results["seconds"] = round(time.perf_counter() - start, 1)
    _write(config, options.workdir, results)
    return results


def _check(config: Config, options: Options) -> None:
    for name in config.eval.methods:
        if name not in SYSTEMS[config.eval.by]:
            raise unknown(f"entry of eval.methods (by {config.eval.by})", name, SYSTEMS[config.eval.by])
    steps = config.eval.steps
    if config.eval.by == "step" and (not steps or min(steps) < 1 or len(set(steps)) < len(steps)):
        raise UserError(f"eval.steps is {list(steps)}; give different numbers from 1, such as [1, 2, 4]")
    if not getattr(config.data, options.split):
        raise UserError(f"data.{options.split} is empty; name at least one source to evaluate on")
    if (options.workdir / "checkpoints").exists():
        raise UserError(
            f"--workdir {options.workdir} holds a training run, whose files would be overwritten; give another, such "
            f"as {options.workdir / 'evaluation'}"
        )
    paths.usable(options.workdir)


def _system(name: str, experiment: Experiment, options: Options) -> Any:
    """One of the systems, as `jax_ccm.evals.perplexity.System`."""
    from jax_ccm.evals.perplexity import System
    from jax_ccm.evals.scoring import base_only
    from jax_ccm.weights.identity import describe_base

    config, model = experiment.config, experiment.model
    base = describe_base(model, experiment.base_name)
    identity = f"{base['name']}|{base['fingerprint']}|{config.model.dtype}|{jax.default_backend()}"
    if name == "none":
        return System(name, model, base_only(build("none")), f"{base['name']}, no context", identity)
    if name == "full":
        return System(name, model, base_only(build("full")), f"{base['name']}, full context", identity)
    if name == "uncompressed":
        text = f"{base['name']}, full context, the adapter on all text"
        return System(name, model, build("full"), text, f"{identity}|{_fingerprint(model)}")
    if name == "full_lora":
        from jax_ccm.weights.adapters import load_adapter

        assert options.full_adapter is not None
        accept = config.adapter.accept_quantised_base
        model = load_adapter(
            options.full_adapter,
            _bare(model),
            method=build("full"),
            base=base_source(config),
            accept_quantised_base=accept,
        )
        text = f"{base['name']}, full context through the LoRA of {options.full_adapter}"
        return System(name, model, build("full"), text, f"{identity}|{_fingerprint(model)}")
    adapter = options.adapter or config.adapter.load
    if experiment.method.keep is not None:
        text = f"{base['name']} with {label(describe_method(experiment.method))}, nothing trained"
        return System(name, _bare(model), experiment.method, text, identity)
    if not adapter:
        print("note: no --adapter and no adapter.load: the memory is that of an untrained adapter")
    trained = f"the adapter of {adapter}" if adapter else "an untrained adapter"
    text = f"{base['name']} with {label(describe_method(experiment.method))}, {trained}"
    return System(name, model, experiment.method, text, f"{identity}|{_fingerprint(model)}")


def _bare(model: Transformer) -> Transformer:
    """The base model alone, sharing its arrays."""
    from jax_ccm.weights.hf import base_parameters, parameters

    target = abstract_transformer(model.config, None)
    arrays = base_parameters(model)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in parameters(target)])


def _results(
    config: Config, options: Options, experiment: Experiment, command: str, systems: dict[str, str]
) -> dict[str, Any]:
    """What is known besides the numbers."""
    from jax_ccm.weights.identity import describe_base

    base = describe_base(experiment.model, experiment.base_name)
    memory = label(describe_method(experiment.method))
    adapter = options.adapter or config.adapter.load
    device = jax.devices()[0]
    return {
        "command": command,
        "title": f"{base['name'].rsplit('/', 1)[-1]}: {memory}",
        "config": to_mapping(config),
        "versions": _versions(),
        "device": f"{device.platform} ({device.device_kind})",
        "base": {"name": base["name"], "fingerprint": base["fingerprint"], "dtype": config.model.dtype},
        "adapter": {"path": str(adapter), "fingerprint": _fingerprint(experiment.model)} if adapter else None,
        "full_adapter": str(options.full_adapter) if options.full_adapter else None,
        "data": {"split": options.split, "sources": list(getattr(config.data, options.split))},
        "systems": systems,
        "memory": memory,
        "units": {
            "nll": "nats a token",
            "kv_bytes": "bytes of a session between context and tail, mean",
            "ci95": "bootstrap over dialogues",
            "error": "bootstrap standard error",
        },
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _fingerprint(model: Transformer) -> str:
    """A digest of the adapter: its scale and its numbers."""
    from jax_ccm.weights.hf import is_adapter, parameters

    digest = hashlib.sha256(repr(model.adapter and model.adapter.scale).encode())
    for path, array in sorted(parameters(model).items()):
        if is_adapter(path):
            digest.update(path.encode() + np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def _write(config: Config, workdir: Path, results: dict[str, Any]) -> None:
    from jax_ccm.evals import report

    save_config(config, workdir / "config.yaml")
    with (workdir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for row in results["steps"]:
            for name, cell in row["systems"].items():
                line = {"step": row["step"], "system": name, "nll": cell["nll"]["value"], "kv_bytes": cell["kv_bytes"]}
                line["perplexity"] = cell["perplexity"]["value"]
                if "wrong" in cell:
                    line["wrong_nll"] = cell["wrong"]["nll"]["value"]
                file.write(json.dumps(line) + "\n")
    (workdir / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (workdir / "table.md").write_text(report.markdown(results), encoding="utf-8")
    report.plot(results, workdir / "plot.png")
    last = results["steps"][-1]
    summary = {
        "status": "finished",
        "command": results["command"],
        "step": last["step"],
        "perplexity": {name: cell["perplexity"]["value"] for name, cell in last["systems"].items()},
        "shares": {name: last[name]["value"] for name in report.SHARES if name in last},
        "seconds": results["seconds"],
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report.print_table(results)
    print(f"results in {workdir / 'results.json'}, table in table.md, picture in plot.png; {results['seconds']:.0f} s")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
