"""Task definitions of the harness on data in the same folder, as its own are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from jax_ccm.config.loading import load_experiment
from jax_ccm.config.schema import Config, save_config
from jax_ccm.weights.adapters import Adapter
from tests import cases, pretrained

PEOPLE = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay")
COLOURS = ("red", "blue", "green")


def trained(folder: Path) -> Config:
    """Writes a base, an adapter whose B is not zero and its config, and gives the config."""
    pretrained.make_base(folder / "base")
    config = pretrained.config(folder)
    fresh = load_experiment(config)
    model = cases.model(tokens=2, rank=2, vocab_size=fresh.model_config.vocab_size)
    Adapter.of(model, method=fresh.method, base=str(folder / "base")).write(folder / "adapter")
    save_config(config, folder / "mine.yaml")
    return config


def choices(folder: Path) -> None:
    """``colours``: which of three colours somebody likes, told two paragraphs before, with examples in front."""
    records = [
        {
            "passage": f"{name} likes {COLOURS[i % 3]}.\n\n{PEOPLE[i - 1]} is at home.",
            "name": name,
            "label": i % 3,
        }
        for i, name in enumerate(PEOPLE)
    ]
    _write(folder, "colours", records, {
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}\n\nWhat does {{name}} like?",
        "doc_to_choice": list(COLOURS),
        "doc_to_target": "label",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    })  # fmt: skip


def generation(folder: Path, **options) -> None:
    """``saying``: goes on with a text up to a full stop."""
    records = [{"text": f"{name} was here.\n\n{name} said", "answer": "yes"} for name in PEOPLE]
    _write(folder, "saying", records, {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 24} | options,
        "metric_list": [_mean("exact_match")],
    })  # fmt: skip


def texts(folder: Path) -> None:
    """``novel``: whole texts, each longer than the base's positions in the tests."""
    records = [{"text": f"{name} went out. " * 3 + f"{name} came home." * i} for i, name in enumerate(PEOPLE)]
    _write(folder, "novel", records, {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False}
            for name, how in (("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
        ],
    })  # fmt: skip


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _write(folder: Path, name: str, records, definition) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    about = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(about | definition))
