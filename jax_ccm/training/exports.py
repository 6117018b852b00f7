"""What a run has learned, as files that other commands load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_ccm.benchmarks.report import machine
from jax_ccm.config import adapters
from jax_ccm.config.loading import TRAINED_BASE, Experiment
from jax_ccm.config.schema import to_yaml
from jax_ccm.distributed import processes
from jax_ccm.evals import report
from jax_ccm.evals.card import FILE, model_card
from jax_ccm.nn.transformer import Transformer
from jax_ccm.records import folders, output


def export(
    workdir: Path, model: Transformer, experiment: Experiment, *, run: dict[str, Any], suffix: str = ""
) -> Path | None:
    """Writes the adapter in our own format with its config and model card, and the base as well if it was trained.

    In a run of several processes all call it, and the first writes.

    Args:
      workdir: gets ``adapter`` and ``model``.
      model: what was trained.
      experiment: what it was trained for.
      run: "steps", "tokens", "scored_tokens" and "seconds" of the run so far, kept with the adapter; behind those of
        earlier runs where it started from an adapter that knows them.
      suffix: for the names of the folders.

    Returns:
      The folder of the adapter; None if the model has none.
    """
    from jax_ccm.weights import save_hf
    from jax_ccm.weights.adapters import Adapter

    config, loaded = experiment.config, experiment.loaded
    earlier = [] if loaded is None else loaded.extra.get("runs", [])
    begun = {"started_from": config.adapter.load} if loaded is not None else {}
    about = {"seed": config.train.seed, "precision": config.model.precision, "hardware": machine(experiment.mesh)}
    extra: dict[str, Any] = {
        "step": run["steps"], "runs": [*earlier, run | about | begun | {"versions": output.versions(report.PACKAGES)}],
    }  # fmt: skip
    if config.train.trainable == "all":
        folder = workdir / f"model{suffix}"
        # The parameters are whole in each process (`Run._export` gathers them), so that one can write without the
        # others.
        if processes.is_first():
            folders.replace(folder, lambda new: save_hf(model, new))
        # Relative to the adapter's folder, so that a run's folder may be moved or copied as a whole.
        extra[TRAINED_BASE] = f"../{folder.name}"
    shape = experiment.adapter_config
    # Full training of a method without tokens of its own has learned nothing but the base.
    if not (shape.rank or shape.tokens):
        return None
    path = workdir / f"adapter{suffix}"
    adapter = Adapter.of(model, method=experiment.method, base=experiment.base_name, extra=extra)
    kept = adapters.portable(config)
    card = model_card(str(path), adapter, recipe=adapters.chosen(kept), said=kept.card)
    beside = {adapters.FILE: to_yaml(kept).encode(), FILE: card.encode()}
    return adapter.write(path, beside=beside)
