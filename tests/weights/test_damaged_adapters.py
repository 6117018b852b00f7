"""Descriptions of adapters that somebody has changed: whatever stands in them, they load or are refused in words."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jax_ccm.config.schema import CardConfig
from jax_ccm.errors import UserError
from jax_ccm.evals.card import model_card
from jax_ccm.methods import build
from jax_ccm.weights import peft
from jax_ccm.weights.adapters import Adapter, load_adapter
from tests import cases

MODEL = cases.model(tokens=2)
METHOD = build("ccm_concat", comp_tokens=2)
RUN = {"steps": 1, "tokens": 9, "scored_tokens": 3, "seconds": 1.5, "seed": 0, "precision": "float32",
       "hardware": "a CPU", "versions": {"jax": "0"}}  # fmt: skip
VALUES = [None, -1, 0, 10**30, "x", [], {}, float("nan"), True, ["a"], [{}]]
DROP = object()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same adapter in two formats."""
    folder = tmp_path_factory.mktemp("adapters")
    made = Adapter.of(MODEL, method=METHOD, base="tiny", extra={"runs": [RUN], "trained_base": "../model"})
    return {format: made.write(folder / format, format=format) for format in ("own", "peft")}


def places(tree, path=()):
    """Every place of a tree of JSON values; of a list and of what is told of many arrays, some."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:1]):
        yield (*path, key)
        if isinstance(value, dict | list):
            inside = dict([*value.items()][-2:]) if key in ("sample", "config", "sees") else value
            yield from places(inside, (*path, key))


def changed(tree, path, value):
    """A copy with another value at a place, or without it."""
    new = json.loads(json.dumps(tree))
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    if value is DROP:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return new


def outcome(folder) -> str:
    """What becomes of a folder: anything but an adapter or a refusal is raised."""
    try:
        adapter = Adapter.read(folder)
        model_card("adapter", adapter, recipe={}, said=CardConfig())
        load_adapter(folder, MODEL, method=METHOD)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.once
def test_our_own(whole, tmp_path):
    told = json.loads((whole["own"] / "adapter.json").read_text())
    assert outcome(whole["own"]) == ""
    shutil.copytree(whole["own"], tmp_path / "a")
    said = {}
    for path in places(told):
        for value in (*VALUES, DROP):
            (tmp_path / "a" / "adapter.json").write_text(json.dumps(changed(told, path, value)))
            said[path, str(value)] = outcome(tmp_path / "a")
    assert "of its method it says recent 'x'" in said[("method", "recent"), "x"]
    assert "its base has sample" in next(
        text
        for (path, value), text in said.items()
        if path[:2] == ("base", "sample") and len(path) > 2 and value == "x"
    )
    assert "its extra has runs" in said[("extra", "runs", 0, "steps"), "x"]
    assert "alpha nan" in said[("adapter", "alpha"), "nan"] and "not say of what shape" in said[("adapter",), "x"]
    assert said[("method", "closes", 0, "kind"), "x"] and said[("method", "sees", "TEXT sees TEXT", 0), "[]"]


@pytest.mark.once
def test_pefts(whole, tmp_path):
    """Also in what we keep with the arrays, where PEFT has no field."""
    shutil.copytree(whole["peft"], tmp_path / "a")
    config, arrays = tmp_path / "a" / peft.CONFIG_FILE, tmp_path / "a" / peft.TENSOR_FILE
    told, tensors = json.loads(config.read_text()), load_file(arrays)
    for path in places(told):
        for value in (*VALUES, DROP):
            config.write_text(json.dumps(changed(told, path, value)))
            outcome(tmp_path / "a")
    config.write_text(json.dumps(told))
    with safe_open(arrays, framework="numpy") as file:
        metadata = file.metadata()
    kept = json.loads(metadata[peft.METADATA])
    for path in [("method",), ("base",), ("extra",), ("method", "sees"), ("base", "config"), ("extra", "runs")]:
        for value in (*VALUES, DROP):
            inside = {peft.METADATA: json.dumps(changed(kept, path, value))}
            save_file(tensors, arrays, metadata=metadata | inside)
            outcome(tmp_path / "a")
    for content in ("", "[]", "null", "3", "{"):
        save_file(tensors, arrays, metadata=metadata | {peft.METADATA: content})
        assert "metadata 'jax_ccm'" in outcome(tmp_path / "a")
