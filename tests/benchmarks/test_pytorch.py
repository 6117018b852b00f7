"""``python -m jax_ccm.benchmarks.pytorch``: the same computation on both sides, and what is written about it."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

from jax_ccm.benchmarks import pytorch, pytorch_ours
from jax_ccm.config import cli
from jax_ccm.config.schema import load_config
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from tests.test_evaluate import write

pytestmark = pytest.mark.once

TINY = {"rows": 2, "tokens": 20, "chunk": 4, "steps": 1, "warm_up": 1, "threads": 1, "precisions": ("float32",)}
# A peer without torch: logits that depend on nothing, and steps that take their turns as the real ones do.
PEER = """
import sys
sys.path.insert(0, {folder!r})
from peer import serve
def fail():
    raise MemoryError("no room")
steps = {{"float32, eager": lambda: lambda: {{"loss": 1.5, "gradient": 2.0}}, "float32, compiled": fail}}
serve(lambda settings: (dict(torch="none"), steps))
"""


def test_a_mask_shows_the_peer_what_the_method_sees():
    """Drawn by hand: chunks of two and two tokens that close each, then a tail of three; a sink is seen by all."""
    method = build("ccm_concat", comp_tokens=2, sink=True)
    made = pytorch_ours.rows(method, 50, count=1, tokens=11, chunk=2)
    arrays = pytorch_ours.for_peer(made, method)
    picture = ["".join(".x"[int(cell)] for cell in row) for row in arrays["mask"][0]]
    assert picture == [
        "x..........",
        "xx.........",
        "xxx........",
        "xxxx.......",
        "x.xxx......",
        "x.xxxx.....",
        "x.xxxxx....",
        "x.xxxxxx...",
        "x.xx..xxx..",
        "x.xx..xxxx.",
        "x.xx..xxxxx",
    ]
    # The first text of a chunk is predicted by the last text before it.
    tokens, labels = arrays["tokens"][0], arrays["labels"][0]
    text = [0, 1, 4, 5, 8, 9, 10]
    expected = np.full(11, -100)
    expected[text[:-1]] = tokens[text[1:]]
    np.testing.assert_array_equal(labels, expected)


def test_both_sides_take_turns_and_what_fails_is_said(tmp_path, monkeypatch, capsys):
    peer = tmp_path / "peer"
    folder = str(next(iter(importlib.util.find_spec("jax_ccm.benchmarks").submodule_search_locations)))
    (tmp_path / "peer.py").write_text(PEER.format(folder=folder))
    peer.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'peer.py'}\n")
    peer.chmod(0o755)
    config = load_config(write(tmp_path / "c.yaml"))
    options = pytorch.Options(tmp_path / "out", peer=str(peer), comparisons=("memory",), **TINY)
    pytorch.benchmark(config, options, command="the command")
    found = json.loads((tmp_path / "out" / "pytorch.json").read_text())["comparisons"]["memory"]
    ours, theirs = (found["sides"][name]["steps"] for name in ("jax_ccm", "pytorch"))
    assert ours["float32"]["gradient"] > 0 and len(ours["float32"]["all_seconds"]) == 1
    assert theirs["float32, eager"]["loss"] == 1.5 and theirs["float32, compiled"] == {"error": "MemoryError: no room"}
    assert set(found["ours_to_pytorch"]) == {"float32", "fastest"} and (found["tokens"], found["scored"]) == (40, 32)
    assert "MemoryError: no room" in (tmp_path / "out" / "pytorch.md").read_text()


@pytest.mark.parametrize(
    ("changes", "method", "message"),
    [
        ({"steps": 0}, {}, "--steps is 0; it must be at least 1"),
        ({"tokens": 5}, {}, "--tokens is 5; a chunk that is closed and text behind it take 6"),
        ({}, {"name": "ccm_merge"}, "'ccm_merge' keeps no copies of keys and values"),
        ({"peer": "no-such-python"}, {}, "no-such-python cannot be started"),
    ],
)
def test_what_cannot_be_is_refused(changes, method, message, tmp_path):
    config = load_config(write(tmp_path / "c.yaml", method={"name": "ccm_concat", "comp_tokens": 1} | method))
    with pytest.raises(UserError, match=message):
        pytorch.benchmark(config, pytorch.Options(tmp_path / "out", **TINY | changes))


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "peft"))),
    reason="needs torch and peft: pip install 'jax_ccm[pytorch]'",
)
def test_pytorch_computes_the_same_loss_and_gradients(tmp_path):
    config = load_config(write(tmp_path / "c.yaml"))
    options = pytorch.Options(tmp_path / "out", compiled=False, peer_precisions=("float32",), **TINY)
    for kind, found in pytorch.benchmark(config, options)["comparisons"].items():
        ours, theirs = (found["sides"][name]["steps"] for name in ("jax_ccm", "pytorch"))
        ours, theirs = ours["float32"], theirs["float32, eager"]
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5, kind
        if kind == "full":  # PEFT's LoRA acts on all tokens, ours on those that close
            assert abs(ours["gradient"] / theirs["gradient"] - 1) < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="this Python has torch, and lacks nothing")
def test_a_python_without_torch_is_named(tmp_path, monkeypatch, capsys):
    config = write(tmp_path / "c.yaml")
    monkeypatch.setattr(
        "sys.argv", ["pytorch", config, "--workdir", str(tmp_path / "out"), "--tokens", "20", "--chunk", "4"]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.run(pytorch.main)
    assert stopped.value.code == 2 and "lacks torch; pip install 'jax_ccm[pytorch]'" in capsys.readouterr().err
