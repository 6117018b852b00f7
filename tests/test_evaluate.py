"""``python -m jax_ccm.evaluate``: its files, its numbers and its messages."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from jax_ccm import evaluate
from jax_ccm.config import cli
from jax_ccm.config.loading import load_experiment
from jax_ccm.config.schema import load_config
from jax_ccm.data import exchanging
from jax_ccm.data.sources import open_sources
from jax_ccm.evals import report
from jax_ccm.evaluate import Options
from jax_ccm.methods import build
from jax_ccm.weights.adapters import Adapter
from tests.data import support as data

pytestmark = pytest.mark.once

SCRATCH = {"layers": 1, "hidden": 16, "intermediate": 16, "heads": 2, "kv_heads": 1}


def write(path, **sections) -> str:
    """A config of a tiny model; sections are merged into it."""
    tree = {
        "model": {"precision": "float32", "scratch": SCRATCH | {"vocab_size": 101}},
        "method": {"name": "ccm_concat", "comp_tokens": 1},
        "adapter": {"rank": 2},
        "data": {"format": "recall", "test": ["generated:recall?split=test&size=6"]},
        "eval": {"steps": [1, 3], "batch_size": 4},
    }
    path.write_text(yaml.safe_dump(tree | sections))
    return str(path)


def with_random_b(model):
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    adapter = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.3, adapter)
    return nnx.merge(graphdef, adapter, base)


def run(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    """Runs the command; its exit code, output and errors."""
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(evaluate.main)
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_everything_is_written(tmp_path, monkeypatch, capsys):
    config = load_config(write(tmp_path / "c.yaml"))
    experiment = load_experiment(config)
    adapter = Adapter.of(with_random_b(experiment.model), method=experiment.method, base="from scratch").write(
        tmp_path / "adapter"
    )
    plain = load_experiment(load_config(write(tmp_path / "full.yaml", method={"name": "full"})))
    full = Adapter.of(with_random_b(plain.model), method=build("full"), base="from scratch").write(tmp_path / "full")
    out = tmp_path / "out"
    code, printed, err = run(monkeypatch, capsys, tmp_path / "c.yaml", "--workdir", out,
                             "--adapter", adapter, "--full_adapter", full, "--eval.max_examples", 4,
                             "--store", tmp_path / "store")  # fmt: skip
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("python -m jax_ccm.evaluate ") and str(adapter) in results["command"]
    assert results["config"]["eval"]["max_examples"] == 4
    assert results["versions"]["jax"] == jax.__version__
    assert len(results["adapter"]["fingerprint"]) == 16 and results["adapter"]["path"] == str(adapter)
    assert results["base"]["fingerprint"] and results["data"]["split"] == "test"
    assert set(results["systems"]) == {"none", "full", "memory", "full_lora"}
    assert [row["step"] for row in results["steps"]] == [1, 3, "all"]
    for row in results["steps"]:
        assert row["examples"] == 4 * (2 if row["step"] == "all" else 1)
        assert row["tokens"] == 4 * {1: 1, 3: 3, "all": 4}[row["step"]]
        for name, cell in row["systems"].items():
            assert cell["perplexity"]["value"] == pytest.approx(np.exp(cell["nll"]["value"]), rel=1e-4)
            assert {"value", "error", "ci95"} == set(cell["nll"])
            assert ("wrong" in cell) == (name != "none")
        assert {"gap_closed", "content_share", "gap_closed_to_full_lora", "content_share_to_full_lora"} <= set(row)
        # The two full contexts are different models of the same size.
        nll = {name: cell["nll"]["value"] for name, cell in row["systems"].items()}
        assert len(set(nll.values())) == 4
        assert row["systems"]["full"]["kv_bytes"] == row["systems"]["full_lora"]["kv_bytes"]
    # One slot of 2 (keys, values) x 1 layer x 1 head x 8 x 4 bytes a chunk; a fact is two tokens, and there is a start.
    assert results["kv_bytes_per_slot"] == 64
    third = results["steps"][1]["systems"]
    assert (third["none"]["kv_bytes"], third["memory"]["kv_bytes"], third["full"]["kv_bytes"]) == (0, 3 * 64, 7 * 64)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG") and (out / "plot.png").stat().st_size > 10_000
    assert load_config(out / "config.yaml").eval.max_examples == 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {(line["step"], line["system"]) for line in lines} >= {(1, "none"), ("all", "full_lora")}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and set(summary["perplexity"]) == set(results["systems"])
    header, rows = report.table_rows(results)
    assert len(rows) == 3 and all(len(row) == len(header) == len(set(header)) for row in rows)
    table = (out / "table.md").read_text()
    assert all(f" {column} |" in table for column in header) and results["command"] in table
    assert "content share" in printed and "ccm_concat (1 token)" in printed
    # Another adapter on the same base: the baselines are not run again, the memory is.
    code, printed, _ = run(monkeypatch, capsys, tmp_path / "c.yaml", "--workdir", tmp_path / "again",
                           "--eval.max_examples", 4, "--store", tmp_path / "store")  # fmt: skip
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert printed.count("scored before") == 2
    for name in ("none", "full", "memory"):
        same = again["steps"][0]["systems"][name] == results["steps"][0]["systems"][name]
        assert same == (name != "memory")


def test_a_memory_of_constant_size(tmp_path, monkeypatch, capsys):
    """What is measured is what is served: with room for two slots the oldest of three are forgotten."""
    write(tmp_path / "c.yaml", cache={"memory_capacity": 2, "overflow": "evict"})
    write(tmp_path / "growing.yaml")
    found = {}
    for file in ("c", "growing"):
        code, printed, err = run(monkeypatch, capsys, tmp_path / f"{file}.yaml", "--workdir", tmp_path / file,
                                 "--eval.max_examples", 4, "--store", tmp_path / "store")  # fmt: skip
        assert code == 0, err
        found[file] = json.loads((tmp_path / file / "results.json").read_text())
    constant, growing = (
        [row["systems"]["memory"] for row in found[file]["steps"] if row["step"] != "all"] for file in ("c", "growing")
    )
    assert [cell["kv_slots"] for cell in constant] == [1, 2] and [cell["kv_slots"] for cell in growing] == [1, 3]
    losses = [[cell["nll"]["value"] for cell in cells] for cells in (constant, growing)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5) and abs(losses[0][1] - losses[1][1]) > 1e-4
    assert "the newest 2 slots of memory" in found["c"]["systems"]["memory"]
    assert "newest" not in found["growing"]["systems"]["memory"]
    # The baselines have no such room.
    for name in ("none", "full"):
        assert found["c"]["steps"][1]["systems"][name] == found["growing"]["steps"][1]["systems"][name]
    # Room that holds no chunk is refused before anything is computed, and what writes no memory has none to forget.
    code, printed, err = run(monkeypatch, capsys, tmp_path / "c.yaml", "--workdir", tmp_path / "small",
                             "--method.comp_tokens", 3)  # fmt: skip
    assert code == 2 and "memory_capacity is 2, but method 'ccm_concat' writes 3" in err and "examples" not in printed
    code, printed, err = run(monkeypatch, capsys, tmp_path / "c.yaml", "--workdir", tmp_path / "window",
                             "--method.name", "window", "--method.size", 8, "--method.comp_tokens", None,
                             "--eval.max_examples", 4)  # fmt: skip
    assert code == 0 and "newest" not in printed, err


def test_choices(tmp_path, monkeypatch, capsys):
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["one", "two", "six"]
    records = [
        {"contexts": [f"the {w} of {i}", "on"], "query": "in", "target": w, "choices": words}
        for i, w in enumerate(words * 2)
    ]
    model = {"scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")}
    source = {"format": "online", "test": [data.write(tmp_path / "r.jsonl", records)]}
    config = write(tmp_path / "c.yaml", model=model, data=source, eval={"steps": [2], "methods": ["full", "memory"]})
    code, printed, err = run(monkeypatch, capsys, config, "--workdir", tmp_path / "out")
    assert code == 0, err
    assert "untrained adapter" in printed and "full right" in printed
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    for cell in (*row["systems"].values(), row["systems"]["memory"]["wrong"]):
        assert set(cell["accuracy"]) == {"sum", "mean", "calibrated"}
        assert 0 <= cell["accuracy"]["mean"]["value"] <= 1
    # Perplexity is that of the right answers.
    assert row["tokens"] == sum(len(data.ids(" " + record["target"])) for record in records)
    assert "gap_closed" not in row and "content_share" in row


def test_questions_by_age(tmp_path, monkeypatch, capsys):
    questions = {
        "format": "online", "test": ["generated:chat_questions?split=test&size=8&turns=8,10&age=1,3"],
        "max_turn_tokens": 999, "max_tokens_evaluation": 9999, "train": [], "validation": [],
    }  # fmt: skip
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"precision": "float32", "scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")}
    config = write(tmp_path / "c.yaml", model=model, data=questions, eval={"by": "age", "steps": [1, 3, 5]})
    asked = ("--eval.reply_tokens", 3)
    code, out, err = run(monkeypatch, capsys, config, "--workdir", str(tmp_path / "out"), *asked)
    assert code == 0, err
    assert "age 3: 4 of test" in out and "no record is of age 5, which is left out" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["step"] for row in results["steps"]] == [1, 3, "all"]
    assert all("accuracy" in row["systems"]["memory"] for row in results["steps"])
    # Conversations of two lengths: where in them memory forgets.
    counts = {(cell["age"], cell["chunks"][0]): cell["examples"] for cell in results["recall"]}
    assert (
        {age for age, _ in counts} == {1, 3}
        and {chunks for _, chunks in counts} <= {6, 8}
        and sum(counts.values()) == 8
    )
    assert (tmp_path / "out" / "recall.png").exists() == (len({chunks for _, chunks in counts}) > 1)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("| age |") and "| age | replies | exact | F1 | contains |" in table
    # Every question and every control is answered, and what was said is there to be read.
    lines = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    said = [(line["step"], line["system"], line["context"]) for line in lines]
    sides = [("none", "right"), ("full", "right"), ("full", "wrong"), ("memory", "right"), ("memory", "wrong")]
    assert {key: said.count(key) for key in set(said)} == {(age, *side): 4 for age in (1, 3) for side in sides}
    # As the records have them, without what the template puts around a turn.
    (source,) = open_sources(questions["test"], "online")
    asked = {(record["query"], record["target"]) for record in map(source.__getitem__, range(8))}
    assert {(line["query"], line["target"]) for line in lines} == asked
    for row in results["steps"][:2]:
        for name, cell in row["systems"].items():
            own = [x["f1"] for x in lines if (x["step"], x["system"], x["context"]) == (row["step"], name, "right")]
            assert cell["replies"]["f1"]["value"] == pytest.approx(np.mean(own), abs=1e-5)
            assert set(cell["replies"]) == {"exact", "f1", "contains", "tokens", "cut"}
            shown = set() if name == "none" else {"minus_wrong", "minus_none"}
            assert set(cell.get("differences", {}).get("f1", {})) == shown
            assert ("wrong" in cell) == ("minus_wrong" in shown) and cell.get("wrong", cell)["replies"]["tokens"] <= 3
    assert run(monkeypatch, capsys, config, "--workdir", str(tmp_path / "out"))[0] == 0
    assert not (tmp_path / "out" / "replies.jsonl").exists(), "replies of another run stand beside these numbers"
    code, _, err = run(monkeypatch, capsys, config, "--workdir", str(tmp_path / "none"), "--eval.steps", "7")
    assert code == 2 and "no record is of an age among eval.steps [7]" in err


@pytest.mark.parametrize("unit", ["turn", "exchange"])
def test_the_control_is_the_same_conversation_told_otherwise(tmp_path, monkeypatch, capsys, unit):
    """What stands in brackets is what a run on the exchanged conversations has in front of them."""
    options = "split=test&size=6&turns=8&age=1"
    (source,) = open_sources([f"generated:chat_questions?{options}"], "online")
    records = [source[number] for number in range(6)]
    # And one whose answer nobody said.
    lost = records[0] | {"contexts": ["hello", "hi"], "age": 1}
    told = [exchanging.exchanged(record) for record in records]
    assert all(told)
    otherwise = [record | {"contexts": contexts} for record, contexts in zip(records, told, strict=True)]
    sizes = {"format": "online", "max_turn_tokens": 999, "max_tokens_evaluation": 9999, "unit_of_memory": unit}
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"precision": "float32", "scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")}
    found = {}
    for name, given, control in (("a", [*records, lost], "exchanged"), ("b", otherwise, "another")):
        source = sizes | {"test": [data.write(tmp_path / f"{name}.jsonl", given)]}
        config = write(tmp_path / "c.yaml", model=model, data=source, eval={"by": "age", "steps": [1]})
        code, out, err = run(monkeypatch, capsys, config, "--workdir", tmp_path / name, "--eval.control", control)
        assert code == 0, err
        found[name] = json.loads((tmp_path / name / "results.json").read_text())["steps"][0]
        exchanged = control == "exchanged"
        assert ("age 1: 6 of test, with their answers exchanged as control; 1 are not told" in out) == exchanged
        assert ("its own context with what is asked for told otherwise" in out) == exchanged
    for name in ("full", "memory"):
        ours, theirs = found["a"]["systems"][name]["wrong"], found["b"]["systems"][name]
        for key in ("nll", "accuracy"):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours[key], theirs[key])
        assert ours["nll"] != found["a"]["systems"][name]["nll"]
    for wrong, message in (
        (("--data.test", data.write(tmp_path / "l.jsonl", [lost])), "no context says its answer word for word"),
        (("--eval.by", "text"), "eval.control is 'exchanged', and eval.by 'text' asks no questions"),
    ):
        given = (config, "--workdir", tmp_path / "bad", "--eval.control", "exchanged", *wrong)
        code, _, err = run(monkeypatch, capsys, *given)
        assert code == 2 and message in err and "Traceback" not in err, err


def test_questions_by_task(tmp_path, monkeypatch, capsys):
    """Each behind its whole context, however long, so that what is asked for was told; those of no task apart."""
    lengths = {"niah": (1, 2, 5), "qa": (3, 4), "": (2, 1)}
    records = [
        {"contexts": [f"{task} {n} {k}" for k in range(n)], "query": "what?", "target": f"it is {n}"}
        | ({"task": task} if task else {})
        for task, counts in lengths.items()
        for n in counts
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    questions = {"format": "online", "test": [str(file)], "max_turn_tokens": 99, "train": [], "validation": []}
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"precision": "float32", "scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")}
    config = write(tmp_path / "c.yaml", model=model, data=questions, eval={"by": "task", "steps": []})
    code, out, err = run(monkeypatch, capsys, config, "--workdir", str(tmp_path / "out"))
    assert code == 0, err
    assert "task niah: 3 of test, with wrong-memory control" in out and "left out" not in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["step"]: row for row in results["steps"]}
    assert {name: row["examples"] for name, row in rows.items()} == {"niah": 3, "qa": 2, "questions": 2, "all": 7}
    slots = {name: row["systems"]["memory"]["kv_slots"] for name, row in rows.items()}
    each = slots["qa"] / 3.5
    assert slots["niah"] == pytest.approx(each * 8 / 3) and slots["questions"] == pytest.approx(each * 1.5)
    assert (tmp_path / "out" / "table.md").read_text().startswith("| task |")
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    # At a time step the same records are cut, or left out.
    code, out, _ = run(
        monkeypatch, capsys, config, "--workdir", str(tmp_path / "t"), "--eval.by", "step", "--eval.steps", 4
    )
    assert code == 0 and "t=4: 2 of test" in out


def test_bad_input(tmp_path, monkeypatch, capsys):
    config = write(tmp_path / "c.yaml")
    out = tmp_path / "out"

    def fails(text, *argv, workdir=out):
        code, _, err = run(monkeypatch, capsys, *argv, "--workdir", workdir)
        assert code == 2 and text in err and "Traceback" not in err, err

    fails("is not there", config, "--adapter", tmp_path / "nothing")
    fails("data.validation is empty", config, "--split", "validation")
    fails("no record has as many as 9", config, "--eval.steps", 9)
    fails("eval.steps is [0, 1]", config, "--eval.steps", 0, 1)
    fails("eval.steps is [2, 2]", config, "--eval.steps", 2, 2)
    fails("did you mean 'memory'", config, "--eval.methods", "memry")
    fails("asks nothing that a reply could answer", config, "--eval.reply_tokens", 8)
    fails("it must be at least 0", config, "--eval.reply_tokens", -1)
    (tmp_path / "empty.jsonl").write_text("")
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")}
    empty = {"format": "dialogue", "test": [str(tmp_path / "empty.jsonl")]}
    fails("empty", write(tmp_path / "e.yaml", model=model, data=empty))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    fails("holds a training run", config, workdir=tmp_path / "run")
    (tmp_path / "file").write_text("")
    fails("cannot be used", config, workdir=tmp_path / "file")
    fails("cannot be used", config, "--store", tmp_path / "file")
    assert not (out / "results.json").exists()


def test_an_adapter_of_another_method_is_refused(tmp_path):
    config = load_config(write(tmp_path / "c.yaml"))
    plain = load_experiment(load_config(write(tmp_path / "full.yaml", method={"name": "full"})))
    path = Adapter.of(plain.model, method=build("full"), base="from scratch").write(tmp_path / "full")
    with pytest.raises(ValueError, match="full"):
        evaluate.evaluate(config, Options(tmp_path / "out", adapter=path))
