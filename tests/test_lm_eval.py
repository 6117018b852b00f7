"""``python -m jax_ccm.lm_eval``: several systems on the same documents, its files and its messages."""

from __future__ import annotations

import json
import sys

import pytest

from jax_ccm import lm_eval
from jax_ccm.config import cli
from tests.harness import support

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a base, an adapter whose B is not zero, its config and a task."""
    folder = tmp_path_factory.mktemp("harness")
    support.trained(folder)
    support.choices(folder)
    return folder


def run(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    """Runs the command; its exit code, output and errors."""
    monkeypatch.setattr("sys.argv", ["lm_eval", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lm_eval.main)
    return stopped.value.code, *capsys.readouterr()


def test_systems_side_by_side(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="no lm-evaluation-harness: pip install '.[lm-eval]'")
    systems = ["none", "full", "memory", "wrong"]
    code, printed, err = run(
        monkeypatch, capsys, folder / "mine.yaml", "--adapter", folder / "adapter", "--workdir", tmp_path / "out",
        "--tasks", "colours", "--include_path", folder, "--systems", *systems, "--limit", 4, "--chunk", 24,
        "--num_fewshot", 1,
    )  # fmt: skip
    assert code == 0, err
    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())
    assert found["command"].startswith("python -m jax_ccm.lm_eval ") and found["config"]["adapter"]["rank"] == 2
    assert list(found["systems"]) == systems
    table = (out / "table.md").read_text()
    assert table in printed and (out / "config.yaml").exists()
    assert table.splitlines()[0] == "| task | metric | none | full | memory | wrong memory |"
    (row,) = (line for line in table.splitlines() if line.startswith("| colours | acc |"))
    for cell, result in zip(row.split("|")[3:-1], found["systems"].values(), strict=True):
        metrics = result["results"]["colours"]
        assert cell.strip() == f"{metrics['acc,none']:.4g} ± {metrics['acc_stderr,none']:.2g}"
    about = {name: result["config"] for name, result in found["systems"].items()}
    assert {name: about[name]["requests"] for name in systems} == dict.fromkeys(systems, 4 * 3)
    # Equal contexts, of which memory holds two slots a chunk, full context all and none nothing.
    slots = {name: about[name]["context_slots"] / about["full"]["context_tokens"] for name in systems}
    assert slots["none"] == 0 and slots["full"] == 1 and 0 < slots["memory"] == slots["wrong"] < 0.5
    held = about["memory"]
    text = f"memory: of {held['context_tokens'] / 12:,.1f} tokens of context {held['context_slots'] / 12:,.1f} slots"
    assert text in table
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(line["system"], line["doc_id"]) for line in lines] == [(name, i) for name in systems for i in range(4)]
    prompts = {(line["doc_id"], json.dumps(line["arguments"])) for line in lines}
    assert len(prompts) == 4 and len({json.dumps(line["resps"]) for line in lines}) == 16


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--tasks"),
        (["--tasks"], "--tasks names no task"),
        (["--systems", "ful"], "unknown system 'ful'; did you mean 'full'?"),
        (["--systems", "full", "full"], "--systems is ['full', 'full']"),
        (["--fewshot_as_multiturn", "True"], "writes messages; give --apply_chat_template, too"),
        (["--tail", "0"], "tail is 0; give a whole number from 1 on"),
        (["--limit", "0"], "--limit is 0; give 1 or more documents"),
    ],
)
def test_what_cannot_be(folder, tmp_path, monkeypatch, capsys, argv, message):
    """Said before anything is loaded."""
    named = ["--workdir", tmp_path / "x", *(["--tasks", "colours"] if "--tasks" not in argv else [])]
    given = [folder / "mine.yaml", *(named if argv else []), *argv]
    code, _, err = run(monkeypatch, capsys, *given)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_without_the_harness(folder, tmp_path, monkeypatch, capsys):
    """The command says how it is installed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("jax_ccm.harness")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = run(monkeypatch, capsys, folder / "mine.yaml", "--workdir", tmp_path / "x", "--tasks", "colours")
    assert code == 2 and "not installed here; pip install 'jax_ccm[lm-eval]'" in err and "Traceback" not in err
