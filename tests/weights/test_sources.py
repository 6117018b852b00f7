"""Models and adapters of the hub, from a cache laid out as the hub's: refs, snapshots, blobs; no network."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from jax_ccm.config import schema as configs
from jax_ccm.config.loading import load_experiment
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.training.inputs import of_files
from jax_ccm.weights import load_model, read_config
from jax_ccm.weights.adapters import Adapter, load_adapter
from jax_ccm.weights.sources import locate, locate_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache that holds two commits of a model, a tag, and an adapter; the hub itself is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(name, commit, files, *refs):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        for path in files:
            blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = folder / "snapshots" / commit / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path("../../blobs") / blob.name)
        for ref in refs:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / ref).write_text(commit)

    def ending(name, *ids):
        path = tmp_path / name / "generation_config.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"eos_token_id": ids}))
        return path

    model = lambda name: [GOLDEN / "hf" / name / file for file in ("config.json", "model.safetensors")]
    add("org/model", OLD, [*model("llama_gqa"), ending("old", 3, 5)], "v1.0")
    add("org/model", NEW, [*model("qwen2"), ending("new", 7)], "main")
    add("org/adapter", OLD, [*(GOLDEN / "formats" / "adapter_four_samples").iterdir()], "main", "v1.0")
    add("org/lora", NEW, [*(GOLDEN / "peft" / "mlp").iterdir()], "main")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    assert read_config("org/model").family == read_config(f"org/model@{NEW}").family == "qwen2"
    assert read_config("org/model@v1.0").family == read_config(f"org/model@{OLD}").family == "llama"
    with pytest.raises(UserError, match="'org/model' is no local folder, and could not be had .* at revision 'v2.0'"):
        locate("org/model@v2.0")
    for wrong in ("org/model@", "org/model@a b", "org/model@-x", "a/b/c@main"):
        with pytest.raises(UserError, match="there is no folder"):
            locate(wrong)


def test_adapters_of_the_hub(hub):
    own, there = (Adapter.read(x) for x in ("org/adapter", GOLDEN / "formats" / "adapter_four_samples"))
    assert own.config == there.config
    for path, x in there.arrays.items():
        np.testing.assert_array_equal(own.arrays[path], x)
    load_adapter("org/adapter@v1.0", load_model("org/model@v1.0"), method=build("ccm_concat", comp_tokens=1))
    assert Adapter.read(f"org/lora@{NEW}").config.targets == ("gate_proj", "up_proj", "down_proj")
    with pytest.raises(UserError, match="'org/lora' is no local folder, .* at revision 'v1.0'"):
        Adapter.read("org/lora@v1.0")
    for wrong in ("org", "nowhere/at/all", "org/lora@"):
        with pytest.raises(UserError, match=f"adapter '{wrong}' is not there; give the folder .* ORG/NAME@REVISION"):
            locate_adapter(wrong)


def test_a_local_folder_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model@v1.0").symlink_to(GOLDEN / "hf" / "qwen3")
    assert read_config("org/model@v1.0").family == "qwen3"


def test_a_config_pins_its_base_and_its_adapter(hub):
    tree = {
        "model": {"source": "org/model", "revision": "v1.0"},
        "adapter": {"load": "org/adapter@v1.0", "rank": 1, "targets": ["q_proj", "v_proj"]},
        "method": {"name": "ccm_concat", "comp_tokens": 1},
        "data": {"format": "recall", "tokens": 128},
    }
    config = configs.from_mapping(tree)
    configs.check(config)
    experiment = load_experiment(config)
    assert experiment.model_config.family == "llama" and experiment.base_name == "org/model@v1.0"
    assert experiment.ends == (3, 5), "of the same revision"
    found = of_files(config, experiment.source)
    assert set(found["adapter.load"]) == {"adapter.json", "adapter.safetensors"}
    for source in ("", "org/model@v1.0"):
        with pytest.raises(UserError, match="model.revision is 'v1.0'.* is given once"):
            configs.check(configs.from_mapping({"model": {"source": source, "revision": "v1.0"}}))


def test_a_model_whose_writer_was_killed(tmp_path):
    """Between two renames it is under no name of its own: whoever looks for it puts it back."""
    (tmp_path / ".model_best.old").mkdir()
    assert locate(tmp_path / "model_best") == tmp_path / "model_best" and (tmp_path / "model_best").is_dir()
