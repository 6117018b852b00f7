"""A resumed run stands on the base and the data that it began with, or says what changed and is told to go on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from jax_ccm.config.loading import load_experiment
from jax_ccm.config.schema import from_mapping
from jax_ccm.data.batches import prepare
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, Transformer
from jax_ccm.training import inputs
from jax_ccm.training.checkpoints import Checkpoints
from jax_ccm.training.run import Run
from jax_ccm.weights import load_tokenizer, save_hf
from jax_ccm.weights.adapters import Adapter
from tests.data import support as data

pytestmark = pytest.mark.once

METHOD = {"name": "ccm_concat", "comp_tokens": 1}


def model(seed: int, tokens: int = 0) -> Transformer:
    config = from_mapping({"model": {"scratch": {"layers": 1, "hidden": 16, "intermediate": 16, "heads": 2,
                                                 "kv_heads": 1, "vocab_size": data.VOCAB}},
                           "data": {"format": "recall"}})  # fmt: skip
    shape = load_experiment(config).model_config
    made = Transformer(jax.random.key(seed), shape, AdapterConfig(rank=2, tokens=tokens))
    lora_b = made.layers.self_attn.q_proj.lora_b
    lora_b[...] = jax.random.normal(jax.random.key(seed), lora_b.shape)
    return made


def adapter(path: Path, seed: int, tokens: int) -> None:
    """An adapter, plain without tokens, that fits any base of the shape."""
    method = build("ccm_concat", comp_tokens=tokens) if tokens else build("full")
    made = Adapter.of(model(seed, tokens), method=method, base="")
    dataclasses.replace(made, base=None).write(path)


def lines(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"turns": [text, "on", "in her", "the"]}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """Where everything is, and the config of a run of one step of two."""
    folder = tmp_path_factory.mktemp("inputs")
    save_hf(model(0), folder / "base")
    data.tokenizer().save_pretrained(folder / "tokenizer")
    lines(folder / "train.jsonl", "the", "on the", "in", "her")
    (folder / "more").mkdir()
    lines(folder / "more" / "a.jsonl", "the hen")
    lines(folder / "validation.jsonl", "tin", "then")
    adapter(folder / "one", 1, 0)
    adapter(folder / "two", 2, 1)
    config = from_mapping({
        "model": {"source": str(folder / "base"), "tokenizer": str(folder / "tokenizer")},
        "method": METHOD,
        "adapter": {"rank": 2, "merge": str(folder / "one"), "load": str(folder / "two")},
        "data": {"train": [str(folder / "train.jsonl"), str(folder / "more" / "*.jsonl")], "batch_size": 1,
                 "validation": [str(folder / "validation.jsonl")], "tokens": 40, "scored": 16},
        "train": {"steps": 1, "eval_every": 1, "eval_examples": 1},
    })  # fmt: skip
    Run(config, folder / "run").train()
    return folder, dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))


def overwrite(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def other_base(folder):
    save_hf(model(5), folder / "new")
    overwrite(folder / "new", folder / "base")


def other_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["merges"] = tree["model"]["merges"][:-1]
    path.write_text(json.dumps(tree))


def append(path, text):
    with path.open("a") as file:
        file.write(json.dumps({"turns": [text, "on", "in her", "the"]}) + "\n")


CHANGES = {
    "base overwritten": (other_base, "model.source: model.safetensors was .* bytes, .*, now "),
    "merged adapter": (lambda f: adapter(f / "one", 7, 0), "adapter.merge: .*adapter.safetensors was .*, now"),
    "loaded adapter": (lambda f: adapter(f / "two", 7, 1), "adapter.load: .*adapter.safetensors was .*, now"),
    "tokenizer": (other_tokenizer, "model.tokenizer: tokenizer.json was.*; data.train: as many records as before"),
    "data replaced": (
        lambda f: lines(f / "train.jsonl", "on", "her", "the", "in"),
        r"data.train: as many records as before \(5\), but other tokens",
    ),
    "line appended": (lambda f: append(f / "train.jsonl", "on"), "data.train: 5 records .* then, 6 records"),
    "file added": (lambda f: lines(f / "more" / "b.jsonl", "her"), "data.train: 5 records .* then, 6 records"),
    "validation data": (lambda f: lines(f / "validation.jsonl", "tin"), "data.validation: 2 records .* then, 1 record"),
}  # fmt: skip


@pytest.fixture
def put_back(began, tmp_path):
    """What a test changes is as it was afterwards."""
    folder, _ = began
    shutil.copytree(folder, tmp_path / "kept")
    yield
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)


def today(config):
    """The fingerprints that a run would compare."""
    found, tokenizer = inputs.of_files(config, config.model.source), load_tokenizer(config.model.tokenizer)
    for split in ("train", "validation"):
        source = dataclasses.replace(config.data, train=getattr(config.data, split))
        made = prepare(source, build(**METHOD), tokenizer, data.VOCAB)
        found[f"data.{split}"] = inputs.of_data(made)
    return found


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_named(began, change):
    folder, config = began
    what, message = CHANGES[change]
    with Checkpoints(folder / "run" / "checkpoints") as store:
        before = store.progress()["inputs"]
    assert inputs.require_same(before, today(config), folder, accept=False) == []
    what(folder)
    with pytest.raises(UserError, match=message) as error:
        inputs.require_same(before, today(config), folder, accept=False)
    assert "--accept_changes True" in str(error.value)


@pytest.mark.usefixtures("put_back")
def test_a_run_is_not_resumed_on_something_else(began):
    folder, config = began
    append(folder / "train.jsonl", "then")
    other_base(folder)
    with pytest.raises(UserError, match="model.source: model.safetensors was .*; data.train: 5 records .*, 6 records"):
        Run(config, folder / "run")
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == ["1"]


@pytest.mark.usefixtures("put_back")
def test_insisting_works_and_is_recorded(began, capsys):
    folder, config = began
    append(folder / "train.jsonl", "then")
    summary = Run(config, folder / "run", accept_changes=True).train()
    assert "accepted: data.train" in capsys.readouterr().out
    (accepted,) = summary["accepted_changes"]
    assert accepted["step"] == 1 and "6 records" in accepted["changes"][0]
    with Checkpoints(folder / "run" / "checkpoints") as store:
        stored = store.progress()
    assert stored["accepted"] == [accepted] and stored["inputs"]["data.train"]["records"] == 6


def test_checkpoints_of_before_are_resumed_with_a_word(began, tmp_path, capsys, monkeypatch):
    folder, config = began
    original = Checkpoints.progress
    monkeypatch.setattr(
        Checkpoints, "progress", lambda self: {k: v for k, v in original(self).items() if k != "inputs"}
    )
    shutil.copytree(folder / "run", tmp_path / "run")
    with Run(config, tmp_path / "run").checkpoints:
        assert "does not say which base and data it was trained on" in capsys.readouterr().out


def test_large_files_are_sampled_everywhere(tmp_path):
    """A change of a whole projection shows wherever it lies, also in a file that is not read whole."""
    path, size = tmp_path / "big.bin", 16 * 2**20
    path.write_bytes(bytes(size))
    before = inputs._file(path)
    for start in (0, 5 * 2**20 + 7, size - 8192):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"x" * 8192)
        after = inputs._file(path)
        assert after != before
        before = after
