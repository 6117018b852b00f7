"""Memory files: what is written is read, whole or not at all, and nothing in a file is believed."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, safe_open, save_file

from jax_ccm.errors import UserError
from jax_ccm.memory import files, steps
from jax_ccm.memory.cache import init_cache
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, Transformer
from jax_ccm.rules.types import Chunk
from tests import cases

MODEL = cases.model(tokens=2)
CONCAT, MERGE = build("ccm_concat", comp_tokens=2, sink=True), build("ccm_merge", comp_tokens=2, sink=True)
NAMES = dict(fingerprint="model+adapter", method=CONCAT)


def sessions(model=MODEL, method=CONCAT):
    """Two sessions that have closed a chunk."""
    cache = init_cache(model, method, 2, memory_capacity=6, raw_capacity=8)
    chunk = Chunk(np.arange(10, 18, dtype=np.int32).reshape(2, 4), np.ones((2, 4), bool))
    return jax.jit(steps.compress_step, static_argnames="method")(model, cache, chunk, method=method)


@pytest.fixture(scope="module")
def state():
    return sessions()


@pytest.fixture
def path(state, tmp_path):
    files.save(state, tmp_path / "sessions", **NAMES)
    return tmp_path / "sessions"


def change(path, arrays=None, **meta):
    """Rewrites a file with other arrays (None leaves one out) and metadata."""
    with safe_open(path, framework="numpy") as file:
        found = json.loads(file.metadata()["jax_ccm"])
    held = load_file(path) | (arrays or {})
    save_file({name: x for name, x in held.items() if x is not None}, path, {"jax_ccm": json.dumps(found | meta)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", [CONCAT, MERGE], ids=lambda method: method.name)
def test_files(tmp_path, dtype, method):
    """Every array comes back, the float32 mixture of a bfloat16 model with the rest."""
    model = Transformer(jax.random.key(0), cases.CONFIG, AdapterConfig(tokens=2), dtype)
    state = sessions(model, method)
    files.save(state, tmp_path / "m", fingerprint="x", method=method)
    loaded = files.load(tmp_path / "m", model, fingerprint="x", method=method)
    chex.assert_trees_all_equal(state, loaded)
    assert (loaded.mixed_k is None) == (method is CONCAT)


def test_of_another_model_or_method(path):
    with pytest.raises(UserError, match="'model[+]adapter'.*'other'"):
        files.load(path, MODEL, fingerprint="other", method=CONCAT)
    with pytest.raises(UserError, match="written with method .*ccm_concat.* They differ in"):
        files.load(path, MODEL, fingerprint="model+adapter", method=MERGE)
    with pytest.raises(UserError, match="cannot be read"):
        files.load(path.with_name("missing"), MODEL, **NAMES)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read"):
        files.load(path, MODEL, **NAMES)


@pytest.mark.parametrize(
    "arrays, meta, message",
    [
        (dict(k=np.zeros((3, 2, 15, 2, 4), np.float32)), {}, r"\[3, 2, 15, 2, 4\] as 'k'; .* \[3, 2, 15, 2, 8\]"),
        (dict(v=np.zeros((3, 2, 15, 2, 8), np.float16)), {}, "float16 .* as 'v'"),
        (dict(chunks=np.zeros(3, np.int32)), {}, "as 'chunks'"),
        (dict(logits=None), {}, "holds nothing as 'logits'"),
        (dict(more=np.zeros(3, np.int32)), {}, "as 'more'; this model and method have nothing"),
        (dict(tokens=None), {}, "does not say how many sessions"),
        ({}, dict(memory_capacity="6"), "does not say how many sessions"),
        ({}, dict(memory_capacity=14), "raw_capacity is 0"),
        ({}, dict(overflow="drop"), "overflow is 'drop'"),
        ({}, dict(method=None), "does not say which method"),
        ({}, dict(format="jax_ccm.memory/9"), "not a memory file of this library"),
        ({"slots.kind": np.full((2, 15), -7, np.int32)}, {}, "slots are none that this library writes"),
        ({"slots.kind": np.eye(2, 15, 1, np.int32)}, {}, "slots are none that this library writes"),
    ],
)  # fmt: skip
def test_nothing_in_a_file_is_believed(path, arrays, meta, message):
    change(path, arrays, **meta)
    with pytest.raises(UserError, match=message):
        files.load(path, MODEL, **NAMES)


def test_of_another_type(path):
    """A file of float32 sessions is not taken for those of a bfloat16 model."""
    with pytest.raises(UserError, match="float32 .* as 'k'; this model and method have bfloat16"):
        files.load(path, cases.CONFIG, **NAMES, dtype=jnp.bfloat16)


def test_a_file_is_whole_or_as_it_was(state, path, monkeypatch):
    """What fails in the middle of writing leaves the file that was there, and nothing beside it."""
    before = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fails)
        with pytest.raises(UserError, match="sessions cannot be written: .*No space left"):
            files.save(state, path, **NAMES)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["sessions"]
    with pytest.raises(UserError, match="cannot be written"):
        files.save(state, path / "below", **NAMES)


def test_invalid_sessions_are_not_written(state, tmp_path):
    for changes in (dict(lost=state.lost + 1), dict(spoiled=~state.spoiled)):
        with pytest.raises(UserError, match=r"sessions \[0, 1\]"):
            files.save(dataclasses.replace(state, **changes), tmp_path / "never", **NAMES)
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_nested_too_deep(path):
    save_file(load_file(path), path, {"jax_ccm": "[" * 100_000})
    with pytest.raises(UserError, match="nested too deep"):
        files.load(path, MODEL, **NAMES)
