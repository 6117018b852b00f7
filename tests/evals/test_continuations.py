"""Texts that are continued from a compressed beginning."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import Any

import numpy as np
import pytest

from jax_ccm.evals.continuations import Continuing, Judge, compare, cut, distinct, sentence_embedder
from jax_ccm.evals.replies import Asking, continued, prompt
from jax_ccm.evals.scoring import Store, score
from jax_ccm.evals.slots import held_slots
from jax_ccm.memory.generation import Sampling
from jax_ccm.methods import build
from jax_ccm.rules.examples import Example, Segment, concat
from tests import cases
from tests.test_compare import compared, text_config
from tests.test_evaluate import run
from tests.test_report import Read
from tests.test_report import run as report

ASKING = Asking(3, (), "", cases.VOCAB, lambda ids: " ".join(map(str, ids)))


def window(*lengths: int, kept: bool = False) -> Example:
    """Segments of so many tokens, numbered through; every other token of each is kept."""
    numbers = np.split(np.arange(10, 10 + sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])
    marks = [np.arange(len(x)) % 2 == 0 if kept else None for x in numbers]
    pieces = tuple(Segment(x, np.ones(len(x), bool), mark) for x, mark in zip(numbers, marks, strict=True))
    return Example(np.array([1], np.int32), np.zeros(0, np.int32), pieces, "r.jsonl, line 1")


@pytest.mark.parametrize(
    "lengths, closed, tail",
    [
        # What ends with the prompt stays open: its last token predicts the first of what comes.
        ((4, 4, 4, 3), [4, 4], [4, 3]),
        ((4, 4, 5), [4, 4], [2, 3]),
        ((6, 2, 1), [], [6, 3]),
    ],
)
def test_a_window_is_cut_into_a_prompt_and_what_comes(lengths, closed, tail):
    example = window(*lengths)
    found = cut(example, 3, build("ccm_concat"))
    *context, last = found.segments
    assert [len(segment.tokens) for segment in context] == closed and not any(s.scored.any() for s in context)
    assert last.scored.tolist() == [False] * tail[0] + [True] * tail[1]
    assert concat(*found.segments).tokens.tolist() == concat(*example.segments).tokens.tolist()
    assert len(prompt(found).segments[-1].tokens) == tail[0] and last.kept is None


def test_what_is_kept_of_a_window_that_is_cut():
    # A span that is cut is never closed, so that its text is seen as what was never compressed is.
    *context, last = cut(window(6, 4, 3, kept=True), 3, build("sentinel")).segments
    assert [np.asarray(s.kept).tolist() for s in context] == [[True, False] * 3] and np.asarray(last.kept).all()
    # Tokens that are hidden for good stay hidden, and nothing of what comes is.
    hidden, last = cut(window(8, kept=True), 3, build("scattered")).segments
    assert np.asarray(hidden.kept).tolist() == [True, False, True, False] and not hidden.scored.any()
    assert last.scored.tolist() == [False, True, True, True] and last.kept is None


def test_what_is_hidden_of_a_prompt_is_not_seen():
    """A tail is seen as a whole, so that a prompt in it would be full context."""
    method, model = build("scattered"), cases.model()
    example = cut(window(12, kept=True), 3, method)
    # What is hidden from the rest: every second token of the context.
    tokens = example.segments[0].tokens.copy()
    tokens[1::2] = 5
    other = dataclasses.replace(
        example, segments=(dataclasses.replace(example.segments[0], tokens=tokens), example.segments[1])
    )
    ours, theirs = score(model, method, [example, other])
    assert np.allclose(ours.nll, theirs.nll, atol=1e-5)
    assert held_slots(method, prompt(example)) == 1 + 4 + 1
    prompts = [prompt(x) for x in (example, other)]
    drawn = continued(model, method, prompts, max_tokens=4, stops=(), vocabulary=90, rows=2)
    assert drawn[0].tolist() == drawn[1].tolist() and len(drawn[0]) == 4
    # And what the data keep is seen.
    tokens[0] = 5
    assert not np.allclose(ours.nll, score(model, method, [other])[0].nll, atol=1e-3)


def test_measures_are_those_of_their_packages():
    said = ["the hen sat on the mat", "a dog ran", "the hen sat on the mat", "the hen the hen the hen"]
    targets = ["the hens sat on the mat"] * 2 + ["quite another thing"] * 2
    judge = Judge("judge", cases.model(), lambda text: [11], "judge")
    found = compare(said, targets, Continuing(ASKING, 2, Sampling(), 0, judge))
    assert set(found) == {"rouge1", "rouge2", "rougeL", "bleu", "distinct2", "self_bleu"}
    # With stems a hen is hens; to BLEU, which has none, it is not.
    assert found["rouge1"][0] == found["rougeL"][0] == 1 and 0.4 < found["bleu"][0] < 0.9
    assert found["rouge1"][[1, 2]].tolist() == [0, 0] and found["bleu"][2] == 0
    assert found["distinct2"].tolist() == [1, 1, 1, 0.4] and distinct("one") == 1
    # Beside the other continuation of its own prompt alone.
    assert found["self_bleu"][0] < 0.1 and found["self_bleu"][2] > 0.05
    # Vectors of an embedder, by their cosine.
    vectors = {text: np.array([np.cos(n), np.sin(n)]) for n, text in enumerate(dict.fromkeys([*said, *targets]))}
    embed = lambda texts: np.stack([vectors[text] for text in texts])
    similar = compare(said, targets, Continuing(ASKING, 1, Sampling(), 0, judge, embed))
    angles = [0 - 3, 1 - 3, 0 - 4, 2 - 4]
    np.testing.assert_allclose(similar["similarity"], np.cos(angles), atol=1e-12)
    assert "self_bleu" not in similar


def test_a_judge_reads_the_prompt_and_scores_what_follows(tmp_path):
    model = cases.model()
    judge = Judge("judge", model, lambda text: [int(x) for x in text.split()], "judge")
    work: dict[str, Any] = dict(rows=2, store=Store(tmp_path), log=print, name="memory")
    prompts, said = ["11 12", "11 12", "", "13"], ["14 15", "", "14 15", "14 15"]
    totals, counts = judge.losses(prompts, said, **work)
    # Behind no prompt nothing predicts the first token.
    assert counts.tolist() == [2, 0, 1, 2] and totals[1] == 0 and (totals[[0, 2, 3]] > 0).all()
    # Of the base: an adapter changes nothing, and the text before changes everything.
    again, _ = Judge("judge", model.with_adapter(None), judge.encode, "base").losses(prompts, said, **work)
    np.testing.assert_allclose(again, totals, rtol=1e-6)
    assert abs(totals[0] - totals[3]) > 1e-3


def test_an_embedder_that_cannot_be_had(monkeypatch):
    assert sentence_embedder("") is None
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        Exception, match=r"eval.embedder is 'mini', .*not installed: pip install 'jax_ccm\[similarity\]'"
    ):
        sentence_embedder("mini")

    class Refusing:
        def __init__(self, name, device):
            raise OSError("no such folder")

    fake = types.ModuleType("sentence_transformers")
    fake.SentenceTransformer = Refusing  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    with pytest.raises(Exception, match="eval.embedder 'mini' cannot be read: no such folder"):
        sentence_embedder("mini")


@pytest.mark.once
def test_the_command(tmp_path, monkeypatch, capsys):
    """Every system goes on with the same prompts; a second run makes nothing anew."""
    config = text_config(tmp_path, ratio=0.5, chunk=2, max_chunks=15, tokens=128)
    asked = ("--eval.by", "continuation", "--eval.reply_tokens", 5, "--eval.samples", 2, "--store", tmp_path / "store")
    found = []
    for out in ("one", "two"):
        code, printed, err = run(monkeypatch, capsys, config, *asked, "--workdir", tmp_path / out)
        assert code == 0, err
        found.append(json.loads((tmp_path / out / "results.json").read_text()))
    assert found[0]["steps"] == found[1]["steps"] and found[0]["reference"] == found[1]["reference"]
    assert printed.count("continuations, made before") == 3 and "what really comes" in printed
    assert "the evaluated base itself" in printed and "self-BLEU" in printed
    (row,) = found[0]["steps"]
    assert list(row["systems"]) == ["none", "full", "memory"] and row["step"] is None
    slots = {name: cell["kv_slots"] for name, cell in row["systems"].items()}
    assert slots["memory"] < 0.8 * slots["full"]
    lines = [json.loads(line) for line in (tmp_path / "one" / "continuations.jsonl").read_text().splitlines()]
    windows = row["examples"]
    assert len(lines) == 3 * 2 * windows
    for name in row["systems"]:
        own = [line for line in lines if line["system"] == name]
        # The same prompts and ends, and texts of its own.
        assert [line["prompt"] for line in own[::2]] == [line["prompt"] for line in own[1::2]]
        assert {line["target"] for line in own} == {line["target"] for line in lines}
        assert any(a["reply"] != b["reply"] for a, b in zip(own[::2], own[1::2], strict=True))
        mean = np.mean([line["rougeL"] for line in own])
        assert row["systems"][name]["continuations"]["rougeL"]["value"] == pytest.approx(mean, abs=1e-5)
    assert "| continued by |" in (tmp_path / "one" / "table.md").read_text()
    assert not (tmp_path / "one" / "replies.jsonl").exists()
    code, _, err = report(monkeypatch, capsys, tmp_path / "one", "--workdir", tmp_path / "page")
    assert code == 0, err
    page = Read((tmp_path / "page" / "report.html").read_text())
    assert {"self-BLEU", "what really comes", "continuation"} <= {cell for row in page.rows for cell in row}
    # Beside another method and another drawing.
    local = ("--method.name", "local", "--method.hidden", 0.5, "--data.ratio", "None", "--eval.methods", "memory")
    for out, options in (("local", local), ("seed", ("--eval.seed", 5))):
        code, _, err = run(monkeypatch, capsys, config, *asked, *options, "--workdir", tmp_path / out)
        assert code == 0, err
    both = (f"Sentinel={tmp_path / 'one'}", f"local={tmp_path / 'local'}", "--workdir", tmp_path / "both")
    code, printed, err = compared(monkeypatch, capsys, *both)
    assert code == 0, err
    second = printed.split("| continued by |")[1]
    order = [
        second.index(f"| {name} |") for name in ("no context", "full context", "Sentinel", "local", "what really comes")
    ]
    assert order == sorted(order) and "nucleus of" in second
    theirs = json.loads((tmp_path / "local" / "results.json").read_text())["steps"][0]["systems"]["memory"][
        "continuations"
    ]
    assert f"| {theirs['distinct2']['value']:.3f} ± {theirs['distinct2']['error']:.3f} |" in second
    code, _, err = compared(monkeypatch, capsys, both[0], f"other={tmp_path / 'seed'}", "--workdir", tmp_path / "bad")
    assert code == 2 and "different continuations" in err, err
    for wrong, message in (
        (("--eval.reply_tokens", 0), "eval.by is 'continuation', and eval.reply_tokens 0"),
        (("--eval.reply_tokens", 40), "no window of text has 80 tokens"),
        (("--eval.top_p", 0), "eval.top_p is 0.0; it must lie in"),
        (("--eval.judge", tmp_path / "nobody"), "nobody"),
    ):
        code, printed, err = run(monkeypatch, capsys, config, *asked, *wrong, "--workdir", tmp_path / "bad")
        assert code == 2 and message in err and "Traceback" not in err, err
