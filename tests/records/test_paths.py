"""Paths of commands and configs may be URLs of buckets; what cannot be read or written is refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import sys
import typing

import fsspec
import pytest

from jax_ccm import compare, convert, evaluate
from jax_ccm.config import cli
from jax_ccm.config.schema import load_config, save_config
from jax_ccm.data import sources
from jax_ccm.errors import UserError
from jax_ccm.records import paths
from jax_ccm.training.run import Run
from jax_ccm.weights.sources import locate
from tests import buckets
from tests.training.test_run import records, tiny

pytestmark = pytest.mark.once


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that is ``gs://``; and no command may make another in the working directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with buckets.use(monkeypatch, tmp_path / "gs") as given:
        yield tmp_path / "gs", given
    assert list((tmp_path / "cwd").iterdir()) == []


def test_local_paths_are_those_of_pathlib(tmp_path):
    assert type(paths.of(str(tmp_path))) is type(tmp_path) and paths.local(tmp_path) == tmp_path
    for source in ("package:llm/x.gguf", "org/name", "a:b", "./x"):
        assert isinstance(paths.of(source), pathlib.Path)


@pytest.mark.parametrize(
    ("path", "message"),
    [("hdfs://host/run", "paths of hdfs:// are not supported .*gs:// and s3://"), ("https://x/y", "https://"),
     ("hf://org/name", "hf://"), (pathlib.Path("gs://bucket/run"), "write 'gs://bucket/run'")],
)  # fmt: skip
def test_other_urls_are_refused_by_name(path, message):
    for use in (paths.of, lambda path: Run(tiny(), path), paths.local, locate, load_config):
        with pytest.raises(UserError, match=message):
            use(path)
    with pytest.raises(UserError, match=message):
        sources.open_sources([str(path)], "dialogue")


def test_a_bucket_without_its_package(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'s3://bucket/run' needs the package s3fs; pip install s3fs"):
        paths.of("s3://bucket/run")


@pytest.mark.parametrize("command", ["train", "evaluate", "verify", "bench", "plan", "chat", "convert"])
def test_every_path_option_takes_urls(command):
    """`pathlib.Path` as the type of an option would turn gs:// into gs:/ in silence."""
    options = importlib.import_module(f"jax_ccm.{command}").Options
    hints = typing.get_type_hints(options, include_extras=True)
    assert not [name for name, hint in hints.items() if is_plain(hint)]


def is_plain(hint) -> bool:
    """Whether a type hint holds a `pathlib.Path` that tyro would make by itself."""
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return is_plain(kinds[0]) and not any(isinstance(mark, paths.PrimitiveConstructorSpec) for mark in kinds[1:])
    return hint is pathlib.Path or any(map(is_plain, kinds))


def run(monkeypatch, main, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 0


def test_runs_and_their_results_in_a_bucket(bucket, monkeypatch, capsys):
    """Training, resumption, evaluation, comparison and conversion, with every path in a bucket."""
    root, given = bucket
    short = {"steps": 2, "eval_every": 2, "log_every": 1, "checkpoint_every": 1}
    sections = {"optimizer": {"accumulation": 1}, "eval": {"steps": [1], "batch_size": 2}}
    sections["data"] = {"test": ["generated:recall?split=test&facts=3&names=10&things=10&size=4"]}
    assert Run(tiny(train=short, **sections), "gs://bucket/run").train()["status"] == "finished"
    assert given == ["gs://bucket/run/checkpoints"]
    assert "in a bucket, which cannot be locked" in capsys.readouterr().out
    folder = root / "bucket" / "run"
    assert [line["step"] for line in records(folder)] == [1, 2, 2]
    assert list((folder / "tensorboard").glob("events*")) and (folder / "model" / "model.safetensors").exists()
    longer = tiny(train={**short, "steps": 3}, **sections)
    summary = Run(longer, "gs://bucket/run").train()
    assert "resuming from the checkpoint of step 2 in gs://bucket/run" in capsys.readouterr().out
    assert summary == json.loads((folder / "summary.json").read_text()) and summary["step"] == 3
    assert [line["step"] for line in records(folder)] == [1, 2, 2, 3, 3]
    # The config of the run, its adapter and, beside that, its base.
    save_config(dataclasses.replace(longer), "gs://bucket/c.yaml")
    assert load_config("gs://bucket/c.yaml") == longer == load_config("gs://bucket/run/config.yaml")
    quality = ["gs://bucket/c.yaml", "--workdir", "gs://bucket/quality", "--adapter", "gs://bucket/run/adapter"]
    run(monkeypatch, evaluate.main, *quality, "--store", "gs://bucket/store")
    run(monkeypatch, evaluate.main, *quality, "--store", "gs://bucket/store")
    assert capsys.readouterr().out.count("scored before (gs://bucket/store/") == 3
    results = json.loads((root / "bucket" / "quality" / "results.json").read_text())
    assert results["adapter"]["path"] == "gs://bucket/run/adapter"
    assert (root / "bucket" / "quality" / "plot.png").read_bytes().startswith(b"\x89PNG")
    run(monkeypatch, compare.main, "a=gs://bucket/quality", "--workdir", "gs://bucket/side")
    assert (root / "bucket" / "side" / "comparison.json").exists()
    run(monkeypatch, convert.main, "gs://bucket/run/adapter", "gs://bucket/peft", "--format", "peft")
    assert (root / "bucket" / "peft" / "adapter_config.json").exists()


def test_data_and_models_in_a_bucket(bucket):
    root, _ = bucket
    (root / "bucket" / "texts").mkdir(parents=True)
    for name in ("a", "b"):
        (root / "bucket" / f"{name}.jsonl").write_text(json.dumps({"turns": [name, "b", "c"]}) + "\n")
        (root / "bucket" / "texts" / f"{name}.txt").write_text(name)
    texts = lambda source, format: [record for x in sources.open_sources([source], format) for record in x]
    assert texts("gs://bucket/a.jsonl", "dialogue") == [{"turns": ["a", "b", "c"]}]
    assert [x["turns"][0] for x in texts("gs://bucket/*.jsonl", "dialogue")] == ["a", "b"]
    assert texts("gs://bucket/texts", "text") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UserError, match="no file matches the data source 'gs://bucket/none"):
        sources.open_sources(["gs://bucket/none*.jsonl"], "dialogue")
    model = root / "bucket" / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "other.bin"):
        (model / name).write_text(name)
    here = locate("gs://bucket/model")
    assert sorted(path.name for path in here.iterdir()) == ["config.json", "model.safetensors"]
    # What has changed is copied again.
    (model / "config.json").write_text("changed config")
    assert (locate("gs://bucket/model") / "config.json").read_text() == "changed config"
    with pytest.raises(UserError, match="there is no folder 'gs://bucket/none'"):
        locate("gs://bucket/none")
