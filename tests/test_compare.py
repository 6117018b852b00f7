"""Whole texts by ``jax_ccm.evaluate``, and evaluations side by side by ``jax_ccm.compare``."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jax_ccm import compare
from jax_ccm.config import cli
from jax_ccm.config.loading import load_experiment
from jax_ccm.config.schema import load_config
from jax_ccm.data.questions import Evaluation
from jax_ccm.evals.slots import held_slots
from jax_ccm.evals.systems import DEFAULT
from jax_ccm.memory import repetition, steps
from jax_ccm.memory.cache import init_cache
from jax_ccm.methods import build
from jax_ccm.rules.rows import arrange, chunk, closed
from jax_ccm.weights.adapters import Adapter
from tests.data import support as data
from tests.test_evaluate import SCRATCH, run, with_random_b, write

pytestmark = pytest.mark.once


def text_config(tmp_path, name="c.yaml", method=None, **fields) -> str:
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    records = [{"text": "the hen on the inner then " * n} for n in (3, 5, 4)]
    source = {"format": "text", "test": [data.write(tmp_path / "r.jsonl", records)], "chunk": 4, "bos": False}
    return write(
        tmp_path / name,
        model={"scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")},
        method=method or {"name": "sentinel"},
        data=source | {"max_chunks": 5, "tokens": 96, "scored": 64} | fields,
        eval={"by": "text", "batch_size": 2},
    )


def test_the_same_tokens_for_every_ratio(tmp_path, monkeypatch, capsys):
    """And the share of slots that was asked for; without an adapter's LoRA (B = 0) "uncompressed" is full context."""
    found = {}
    for ratio in (0.3, 0.6):
        out = tmp_path / f"out{ratio}"
        config = text_config(tmp_path, ratio=ratio)
        code, printed, err = run(monkeypatch, capsys, config, "--workdir", out, "--store", tmp_path / "store")
        assert code == 0, err
        found[ratio] = json.loads((out / "results.json").read_text())["steps"]
        assert (out / "plot.png").stat().st_size > 10_000 and "whole texts" in printed
    for ratio, (row,) in found.items():
        systems = row["systems"]
        assert set(systems) == {"full", "uncompressed", "memory"} and row["step"] is None
        assert systems["full"]["nll"] == systems["uncompressed"]["nll"] == found[0.3][0]["systems"]["full"]["nll"]
        assert systems["memory"]["nll"] != systems["full"]["nll"]
        share = systems["memory"]["kv_slots"] / systems["full"]["kv_slots"]
        assert share == pytest.approx(1 - ratio, abs=0.05)
        assert row["tokens"] == found[0.3][0]["tokens"]
    assert printed.count("scored before") == 2


@pytest.mark.parametrize(
    ("method", "fields", "share"),
    [
        (dict(name="local", hidden=0.25), {}, 0.75),
        (dict(name="full"), {}, 1.0),
        (dict(name="scattered"), dict(ratio=0.5, hide="tokens"), None),
    ],
)
def test_slots_that_are_held(tmp_path, method, fields, share):
    config = load_config(text_config(tmp_path, method=method, **fields))
    experiment = load_experiment(config)
    for example in Evaluation.open(config.data, experiment.tokenizer).texts():
        segments = arrange(experiment.method, example)
        count = sum(len(segment.tokens) for segment in segments)
        held = held_slots(experiment.method, example)
        if share is None:
            assert held == segments[0].kept.sum() + 1
        else:
            assert held == count - int(count * (1 - share))


@pytest.mark.parametrize("by", ["placeholders", "text"])
def test_what_is_repeated(tmp_path, monkeypatch, capsys, by):
    """Token and exact accuracy of the command are those of `repeat` on the recurrence."""
    method = {"name": "loma", "ratio": 2, "memory_tokens": 2, "repeat_by": by}
    config = text_config(tmp_path, method=method)
    experiment = load_experiment(load_config(config))
    model = with_random_b(experiment.model)
    adapter = Adapter.of(model, method=experiment.method, base="from scratch").write(tmp_path / "adapter")
    given = (config, "--workdir", tmp_path / "out", "--adapter", adapter, "--store", tmp_path / "scores")
    code, printed, err = run(monkeypatch, capsys, *given)
    assert code == 0 and "repeated" in printed and "before" not in printed, err
    first = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    code, printed, err = run(monkeypatch, capsys, *given)
    assert code == 0 and "repetition" in printed and "before" in printed.split("repetition")[1], err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["steps"] == first
    said = json.loads((tmp_path / "out" / "results.json").read_text())["steps"][0]["systems"]["memory"]["repetition"]
    read = jax.jit(steps.compress_step, static_argnames="method")
    repeat = jax.jit(repetition.repeat, static_argnames=("method", "length", "back"))
    right, exact, tokens, chunks = 0, 0, 0, 0
    for example in Evaluation.open(load_config(config).data, experiment.tokenizer).texts():
        cache = init_cache(model, experiment.method, 1, memory_capacity=64, raw_capacity=4)
        for segment in closed(experiment.method, arrange(experiment.method, example)):
            cache = read(model, cache, chunk([segment.tokens], 4, model.config.vocab_size), method=experiment.method)
            hits = np.asarray(repeat(model, cache, length=4, method=experiment.method))[0].argmax(-1) == segment.tokens
            right, exact, tokens, chunks = right + hits.sum(), exact + hits.all(), tokens + 4, chunks + 1
    assert (said["tokens"], said["chunks"]) == (tokens, chunks) and tokens > 60
    assert said["token"]["value"] == pytest.approx(right / tokens, abs=1e-6)
    assert said["exact"]["value"] == pytest.approx(exact / chunks, abs=1e-6)


def compared(monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["compare", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(compare.main)
    return stopped.value.code, *capsys.readouterr()


def test_side_by_side(tmp_path, monkeypatch, capsys):
    """Trained, evicted and two sizes of it, on the recall task; what does not go together is refused."""
    config = write(tmp_path / "c.yaml")
    evict = write(tmp_path / "e.yaml", method={"name": "evict", "slots": 1}, adapter={"rank": 0})
    most = ("--eval.max_examples", 4)
    assert run(monkeypatch, capsys, config, "--workdir", tmp_path / "a", *most)[0] == 0
    for slots in (1, 2):
        options = ("--method.slots", slots, "--eval.methods", "memory", *most)
        assert run(monkeypatch, capsys, evict, "--workdir", tmp_path / f"e{slots}", *options)[0] == 0
    runs = [f"concat={tmp_path / 'a'}", f"H2O={tmp_path / 'e1'}", f"H2O={tmp_path / 'e2'}"]
    code, printed, err = compared(monkeypatch, capsys, *runs, "--workdir", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(found["systems"]) == ["no context", "full context", "concat", "H2O"]
    cells = [run["steps"][-1] for run in found["systems"]["H2O"]]
    assert [round(cell["kv_slots"], 3) for cell in cells] == [3.0, 5.0]  # (1 + 3) / 2 chunks of 1 or 2, and the sink
    theirs = json.loads((tmp_path / "a" / "results.json").read_text())["steps"][-1]
    assert found["systems"]["concat"][0]["steps"][-1]["content_share"] == theirs["content_share"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in printed and table.count("| H2O |") == 2 and "(control)" in table
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000

    other = ("--eval.steps", 1, "--eval.max_examples", 4, "--eval.methods", "memory")
    assert run(monkeypatch, capsys, config, "--workdir", tmp_path / "b", *other)[0] == 0
    for text, *argv in [
        ("different questions", *runs, f"other={tmp_path / 'b'}"),
        ("'nothing' is not NAME=DIR", "nothing"),
        ("cannot be read", f"x={tmp_path / 'none'}"),
        ("there is nothing to compare",),
    ]:
        code, _, err = compared(monkeypatch, capsys, *argv, "--workdir", tmp_path / "no")
        assert code == 2 and text in err and "Traceback" not in err, err
    assert not (tmp_path / "no").exists()


def test_bad_input(tmp_path, monkeypatch, capsys):
    config = text_config(tmp_path, ratio=0.5)
    out = ("--workdir", tmp_path / "out")
    for text, *argv in [
        ("score whole texts (eval.by: text)", config, "--eval.by", "step"),
        ("whole texts are scored with data.format 'text'", write(tmp_path / "r.yaml"), "--eval.by", "text"),
        ("by text", config, "--eval.methods", "none"),
    ]:
        code, _, err = run(monkeypatch, capsys, *argv, *out)
        assert code == 2 and text in err and "Traceback" not in err, err
    assert DEFAULT["text"] and build("sentinel").keeps_text
