"""Evaluations in kvpress's layout: made from its columns, by the commands."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from jax_ccm import evaluate, report
from jax_ccm.config import cli
from jax_ccm.reports.kvpress import ruler
from tests.data import support as data
from tests.test_evaluate import SCRATCH, write

pytestmark = pytest.mark.once


def run(command, monkeypatch, capsys, *argv) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["command", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(command.main)
    out, err = capsys.readouterr()
    return stopped.value.code, out + err


def test_rulers_score():
    rows = [
        ({"task": "niah_multikey_1", "answer": ["Seven", "8"]}, "It is seven, not 9."),
        ({"task": "niah_multikey_1", "answer": ["5"]}, "5"),
        ({"task": "qa_1", "answer": ["New York", "NY"]}, "In NY."),
        ({"task": "qa_1", "answer": "Rome"}, "In NY."),
    ]
    assert ruler(rows) == {"niah_multikey_1": {"string_match": 75.0}, "qa_1": {"string_match": 50.0}}


def test_an_evaluation_becomes_its_results(tmp_path, monkeypatch, capsys):
    rows = [
        {"context": "The hen is on. " * n + f"The number is {n}.", "question": "Which?", "answer_prefix": " It is",
         "answer": [str(n)], "max_new_tokens": 16, "task": ("niah_single_1", "qa_1")[n % 2]}
        for n in range(1, 6)
    ]  # fmt: skip
    file = tmp_path / "ruler.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"precision": "float32", "scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")}
    source = f"kvpress:{file}?words=4"
    asked = {"format": "online", "test": [source], "max_turn_tokens": 99, "train": [], "validation": []}
    config = write(tmp_path / "c.yaml", model=model, data=asked, eval={"by": "task", "reply_tokens": 3})
    done = tmp_path / "done"
    code, said = run(evaluate, monkeypatch, capsys, config, "--workdir", done)
    assert code == 0, said
    code, said = run(report, monkeypatch, capsys, done, "--workdir", tmp_path / "page", "--kvpress", "ruler:4096")
    assert code == 0, said
    results = json.loads((done / "results.json").read_text())
    systems = results["steps"][-1]["systems"]
    ratio = 1 - systems["memory"]["kv_slots"] / systems["full"]["kv_slots"]
    names = {folder.name: folder for folder in (tmp_path / "page" / "kvpress").iterdir()}
    model = results["base"]["name"].replace("/", "--")
    memory, full = f"ruler__4096__{model}__ccm_concat__{ratio:.2f}", f"ruler__4096__{model}__no_press__0.00"
    assert set(names) == {memory, full} and 0 < ratio < 1
    replies = [json.loads(line) for line in (done / "replies.jsonl").read_text().splitlines()]
    for name, system in ((memory, "memory"), (full, "full")):
        with (names[name] / "predictions.csv").open(newline="") as found:
            lines = list(csv.DictReader(found))
        own = {x["record"]: x["reply"] for x in replies if (x["system"], x["context"]) == (system, "right")}
        assert len(lines) == 5 and set(rows[0]) - {"context"} < set(lines[0]) and "context" not in lines[0]
        # Each reply stands beside the answer to its own question.
        for line in lines:
            number = int(line["answer"].strip("['] "))
            assert line["predicted_answer"] == own[f"{file}:{number}"] and line["task"] == rows[number - 1]["task"]
        scores = json.loads((names[name] / "metrics.json").read_text())
        assert set(scores) == {"niah_single_1", "qa_1"} and all(set(own) == {"string_match"} for own in scores.values())
        told = yaml.safe_load((names[name] / "config.yaml").read_text())
        assert (told["dataset"], told["data_dir"], told["fraction"], told["max_new_tokens"]) == (
            "ruler",
            "4096",
            1.0,
            3,
        )
    # Nothing is written over, and what cannot be exported is said.
    again = ("--workdir", tmp_path / "page", "--kvpress", "ruler:4096")
    code, said = run(report, monkeypatch, capsys, done, *again)
    assert code == 2 and "exists already; remove it" in said
    file.write_text(json.dumps(rows[0]) + "\n")
    code, said = run(report, monkeypatch, capsys, done, "--workdir", tmp_path / "other", "--kvpress", "ruler")
    assert code == 2 and "they have changed; evaluate again" in said
    file.unlink()
    code, said = run(report, monkeypatch, capsys, done, "--workdir", tmp_path / "other", "--kvpress", "ruler")
    assert code == 2 and "run it where it is" in said
    tree = json.loads((done / "results.json").read_text())
    tree["config"]["eval"]["by"] = "step"
    (done / "results.json").write_text(json.dumps(tree))
    code, said = run(report, monkeypatch, capsys, done, "--workdir", tmp_path / "other", "--kvpress", "ruler")
    assert code == 2 and "there is nothing to export" in said and "--eval.by task" in said
