"""Memories as prefixes for PyTorch: the base alone goes on from one as the conversation does, or it is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_ccm import convert
from jax_ccm.errors import UserError
from jax_ccm.evals.scoring import base_only
from jax_ccm.memory import files, prefixes, steps
from jax_ccm.memory.cache import append, init_cache
from jax_ccm.methods import build
from jax_ccm.rules.types import Chunk, Kind, Slots
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.weights import save_hf
from tests import cases
from tests.memory.test_files import change
from tests.test_chat import experiment

MODEL = cases.model(tokens=2)
READ = jax.jit(steps.read, static_argnames=("method", "query"))
STEP = jax.jit(steps.compress_step, static_argnames="method")
NAMES = dict(fingerprints={"base": "b"})
SNIPPET = Path(__file__).parents[2] / "docs" / "serving.md"


def chunk(seed, length=5):
    tokens = np.random.default_rng(seed).integers(5, 90, (1, length)).astype(np.int32)
    return Chunk(tokens, np.ones((1, length), bool))


def remembered(method, path, model=MODEL, rows=1, *, open_text=False):
    """A session that has read three chunks, and its file."""
    cache = init_cache(model, method, rows, memory_capacity=12, raw_capacity=20)
    for seed in range(3):
        given = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), chunk(seed))
        cache = STEP(model, cache, given, method=method)
    if open_text:
        cache = READ(model, cache, chunk(7, 3), method=method)[0]
    files.save(cache, path, model, **NAMES, method=method)
    return cache


def as_text(path, capacity=40):
    """The keys and values of a prefix as so much text that the base has read, from position 0 on."""
    arrays, full = load_file(path), base_only(build("full"))
    layers = range(MODEL.config.num_layers)
    k, v = (np.stack([arrays[f"{name}.{n}"].transpose(0, 2, 1, 3) for n in layers]) for name in ("keys", "values"))
    place = np.arange(k.shape[2], dtype=np.int32)[None]
    slots = Slots(np.full_like(place, Kind.TEXT), np.zeros_like(place), place, place)
    cache = append(init_cache(MODEL, full, 1, memory_capacity=0, raw_capacity=capacity), k, v, slots)
    return dataclasses.replace(cache, tokens=cache.tokens + k.shape[2]), full


@pytest.mark.parametrize("options", [
    dict(comp_tokens=2, sink=True), dict(comp_tokens=2, independent=True), dict(comp_tokens=2, recent=1),
    dict(name="ccm_merge", comp_tokens=2), dict(name="ccm_concat", comp_tokens=2, open_text=True),
], ids=str)  # fmt: skip
def test_the_base_alone_goes_on_from_it(options, tmp_path):
    """Counting positions from the number of slots, it gives the logits of the conversation; and back it is a memory."""
    options = {"name": "ccm_concat"} | options
    open_text = options.pop("open_text", False)
    method = build(**options)
    cache = remembered(method, tmp_path / "a.ccm", open_text=open_text)
    convert.main([str(tmp_path / "a.ccm"), str(tmp_path / "a.safetensors"), "--format", "dynamic_cache"])
    theirs, full = as_text(tmp_path / "a.safetensors")
    assert int(theirs.tokens[0]) == int(np.asarray(cache.slots.live).sum()) < int(cache.tokens[0])
    asked = chunk(9, 6)
    _, ours = READ(MODEL, cache, asked, method=method, query=True)
    _, found = READ(MODEL, theirs, asked, method=full, query=True)
    np.testing.assert_allclose(found, ours, atol=1e-5)

    convert.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.ccm")])
    before, after = files.read(tmp_path / "a.ccm"), files.read(tmp_path / "b.ccm")
    differ = {name for name in before.header if before.header[name] != after.header.get(name)}
    assert differ <= {"written"}
    for name, x in before.arrays.items():
        np.testing.assert_allclose(after.arrays[name], x, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method, changes, message", [
    (build("ccm_concat", comp_tokens=2), {"sliding_window": 8}, "have a sliding window"),
    (build("loma", ratio=2, memory_tokens=2), {}, "compresses every 4 tokens"),
    (build("window", size=6), {}, "a turn does not see all of it"),
], ids=lambda x: getattr(x, "name", None))  # fmt: skip
def test_what_would_be_seen_in_another_way_is_refused(method, changes, message, tmp_path):
    model = cases.model(tokens=2, **changes)
    remembered(method, tmp_path / "a.ccm", model, open_text=not method.closes)
    with pytest.raises(UserError, match=f"a.ccm cannot be a prefix for PyTorch: .*{message}"):
        prefixes.write(files.read(tmp_path / "a.ccm"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_mistakes(tmp_path):
    method = build("ccm_concat", comp_tokens=2)
    path, made = tmp_path / "a.ccm", tmp_path / "a.safetensors"
    remembered(method, tmp_path / "two.ccm", rows=2)
    files.save(init_cache(MODEL, method, 1, memory_capacity=4, raw_capacity=4), tmp_path / "none.ccm", MODEL, **NAMES,
               method=method)  # fmt: skip
    for name, message in (("two", "it holds 2 sessions"), ("none", "nothing is remembered in it")):
        with pytest.raises(UserError, match=message):
            prefixes.write(files.read(tmp_path / f"{name}.ccm"), made)
    remembered(method, path)
    prefixes.write(files.read(path), made)
    arrays = load_file(made)
    with pytest.raises(UserError, match="not a prefix"):
        prefixes.read(path)
    with pytest.raises(UserError, match="not a memory file"):
        files.read(made)
    for gone, message in (("keys.1", "keys and values of each layer"), ("memory.tokens", "it holds nothing as")):
        change(made, {gone: None})
        with pytest.raises(UserError, match=message):
            prefixes.read(made)
        change(made, {gone: arrays[gone]})
    change(made, turned=3)
    with pytest.raises(UserError, match="rotated by 3 positions"):
        prefixes.read(made)
    save_file(arrays, made)
    with pytest.raises(UserError, match="not a prefix"):
        prefixes.read(made)
    for arguments, message in (
        ([path, tmp_path / "x"], "give --format dynamic_cache"),
        ([path, path, "--format", "dynamic_cache"], "source and target are both"),
        ([path, tmp_path / "x", "--merge", path, "--format", "dynamic_cache"], "do one, and then the other"),
        ([tmp_path, tmp_path / "x", "--format", "dynamic_cache"], "dynamic_cache is a format of memories"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main(list(map(str, arguments)))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # later versions: cache=
def test_transformers_makes_the_same_tokens(tmp_path):
    """The documented lines, run as they stand: `generate` of the base goes on as the conversation does."""
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install torch")
    from transformers import LlamaForCausalLM

    (code,) = re.findall(r"```python\n(import torch\n.*?DynamicCache.*?)```", SNIPPET.read_text(), re.DOTALL)
    for number, made in enumerate((experiment(comp_tokens=2, sink=True), experiment("ccm_merge", comp_tokens=2))):
        folder = save_hf(made.model, tmp_path / f"base{number}")
        talk = Conversations(made)
        talk.tell({0: [("my name is Clara", "hello Clara"), ("i live in Lisbon", "it is warm there")]})
        talk.save(0, tmp_path / "clara.ccm")
        prefixes.write(files.read(tmp_path / "clara.ccm"), tmp_path / "clara.safetensors")
        (turn,) = turns = [talk.turn(0, "where am i", Answering(24))]
        list(talk._all(turns))
        assert len(turn.made) > 8
        question = [*talk.engine.question("where am i", first=False), *talk.engine.template.answer]
        given = {
            "model": LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
            "path": tmp_path / "clara.safetensors",
            "ids": torch.tensor([[int(x) for x in question]]),
            "tokens": 24,
        }
        exec(code, given)
        assert given["reply"].tolist()[: len(turn.made)] == turn.made.tolist()
