"""``python -m jax_ccm.report``: one page of what other commands wrote, that needs nothing from outside."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from jax_ccm import report
from jax_ccm.config import cli
from jax_ccm.records import output
from jax_ccm.reports.charts import INK

pytestmark = pytest.mark.once

RESULTS = Path(__file__).parents[1] / "results"
VOID = {"meta", "br", "path", "use", "rect", "image"}


class Read(html.parser.HTMLParser):
    """A page, checked while it is read: tags close in their order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.said = [], Counter(), [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def run(monkeypatch, capsys, *argv) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["report", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(report.main)
    return stopped.value.code, *capsys.readouterr()


def evaluation(folder: Path, **changes) -> Path:
    """An evaluation of the same questions in conversations of two lengths, with replies."""
    results = json.loads((RESULTS / "recipe/chat_answers/results.json").read_text())
    estimate = lambda value: {"value": value, "error": 0.1, "ci95": [value - 0.1, value + 0.1]}
    said = {"exact": estimate(0.125), "f1": estimate(0.25), "contains": estimate(0.5), "tokens": 9.5, "cut": 0.0}
    for row in results["steps"]:
        for name, cell in row["systems"].items():
            cell["replies"] = said
            if name != "none":
                cell["wrong"]["replies"] = said
                # At age 16 full context does no better behind the right context.
                difference = estimate(0.05 if row["step"] == 16 else 0.4)
                cell["differences"] = {"contains": {"minus_wrong": difference}, "accuracy": {"minus_wrong": difference}}
    cells = [dict(row) for row in results["steps"][:-1]]
    results["recall"] = [{"age": row["step"], "chunks": [length, length], **row} for row in cells for length in (8, 17)]
    results["config"]["eval"]["reply_tokens"] = 24
    results |= changes
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    line = {
        "step": 1,
        "query": "Who is <b>Ann</b> & co?",
        "target": "A friend.",
        "exact": 0.0,
        "f1": 0.5,
        "contains": 1.0,
    }
    lines = [
        line
        | {"system": name, "context": context, "record": "r", "reply": f"{name} {context} <script>alert(1)</script>"}
        for name in ("none", "full", "memory")
        for context in ("right", "wrong")
    ]
    (folder / "replies.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def trained(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(RESULTS / "recipe/arms/rank16_attention.jsonl", folder / "metrics.jsonl")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 460, "lo')  # killed while it was written
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    facts = evaluation(folder / "runs" / "facts")
    given = [
        RESULTS / "dialog/concat",
        RESULTS / "dialog/merge",
        RESULTS / "dialog/eviction",
        RESULTS / "bench/smollm2",
    ]
    argv = [
        *map(str, given),
        f"a <name>={facts}",
        str(trained(folder / "runs" / "own")),
        "--workdir",
        str(folder / "out"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report", *argv])
        with pytest.raises(SystemExit) as stopped:
            cli.run(report.main)
    assert stopped.value.code == 0
    text = (folder / "out" / "report.html").read_text()
    return folder / "out", text, Read(text)


def test_nothing_comes_from_outside(made):
    _, text, page = made
    assert not page.tags["script"] and not page.tags["link"] and not page.tags["img"] and not page.values("src")
    # The scale of a grid is an image in the page.
    assert all(re.match("#|data:image/png;base64,", link) for link in page.values("href") + page.values("xlink:href"))
    assert not set(re.findall(r"https?://[^\"' <]+", text)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text)) and "@import" not in text


def test_what_is_referred_to_is_there_once(made):
    _, text, page = made
    ids = Counter(page.values("id"))
    assert ids and set(ids.values()) == {1}
    links = page.values("href") + page.values("xlink:href")
    named = [link[1:] for link in links if link[0] == "#"] + re.findall(r"url\(#([^)]*)\)", text)
    assert set(named) <= set(ids)


def test_pictures(made):
    folder, text, page = made
    # Three of quality, two groups of questions and a comparison, a grid, losses and speed.
    assert page.tags["figure"] == page.tags["svg"] == len(list(folder.glob("*.png"))) == 9
    assert all((folder / file).stat().st_size > 10_000 for file in folder.glob("*.png"))
    # Letters and axes take the colour of the page, by day and by night.
    assert INK not in text and text.count("var(--ink)") > 100 and "prefers-color-scheme: dark" in text
    assert all(label for tag, name, label in page.attributes if (tag, name) == ("svg", "aria-label"))
    assert "n=24" in {said.strip() for said in page.said}


def test_numbers_and_intervals(made):
    _, _, page = made
    results = json.loads((RESULTS / "dialog/concat/results.json").read_text())
    for row in results["steps"]:
        cell = row["systems"]["memory"]
        value, (low, high) = cell["perplexity"]["value"], cell["perplexity"]["ci95"]
        shown = f"{value:.2f} [{low:.2f}, {high:.2f}]"
        (found,) = [cells for cells in page.rows if shown in cells]
        assert found[1] == "memory" and f"{cell['wrong']['perplexity']['value']:.2f} [" in " ".join(found)
    header = next(cells for cells in page.rows if "accuracy" in cells and "perplexity" in cells)
    assert header[0] == "age" and header.count("right - wrong") == 1
    (row,) = [cells for cells in page.rows if cells[-1] == "+0.05 [-0.05, +0.15]" and cells[1] == "memory"]
    assert row[3:5] == ["0.12 [0.02, 0.23]"] * 2 and row[7:9] == ["0.50 [0.40, 0.60]"] * 2  # exact, contains


def test_what_cannot_tell_memories_apart_is_marked(made):
    _, text, page = made
    steps = [cells[0] for cells in page.rows if len(cells) > 2 and cells[1] == "none" and cells[0]]
    assert steps.count("16 †") == 2 and "8" in steps and not any("†" in step for step in steps if step != "16 †")
    assert text.count('class="part weak"') == 2 and "cannot tell memories apart" in text
    assert sum("†" in said and "0." in said for said in page.said) == 3 * 2 + 2  # full, memory, none, the control


def test_texts_are_texts(made):
    _, text, page = made
    assert any("memory right <script>alert(1)</script>" in cell for cells in page.rows for cell in cells)
    assert "<script" not in text and "<b>Ann" not in text and "a <name>" in "".join(page.said)


def test_losses(made):
    _, _, page = made
    (found,) = [cells for cells in page.rows if cells[0] == "runs/own" and len(cells) == 8]
    assert found[2] == "450" and found[5].endswith(" at 450")


def test_bad_input(tmp_path, monkeypatch, capsys):
    out = ("--workdir", tmp_path / "out")

    def fails(text, *argv):
        code, _, err = run(monkeypatch, capsys, *argv, *out)
        assert code == 2 and text in err and "Traceback" not in err, err
        assert not (tmp_path / "out" / "report.html").exists()

    write = lambda name, file, text: (
        (tmp_path / name).mkdir(), (tmp_path / name / file).write_text(text), tmp_path / name
    )[2]  # fmt: skip
    (tmp_path / "empty").mkdir()
    fails("there is nothing to report")
    fails("is no folder; give working directories", tmp_path / "absent")
    fails("is no folder", f"x={tmp_path / 'absent'}")
    fails("holds none of results.json, comparison.json, bench.json, metrics.jsonl", tmp_path / "empty")
    fails("results.json", write("cut", "results.json", '{"steps": ['))
    fails("holds a JSON list", write("list", "results.json", "[]"))
    fails("lacks title, config, base", write("part", "results.json", '{"steps": [{}]}'))
    newer = evaluation(tmp_path / "newer", schema=output.SCHEMA + 1)
    fails(f"is of schema {output.SCHEMA + 1}, and this version of jax_ccm reads 1 to {output.SCHEMA}", newer)
    fails("is of schema 'x'", evaluation(tmp_path / "odd", schema="x"))
    fails("lacks something that its command writes (KeyError", evaluation(tmp_path / "less", steps=[{"step": 1}]))
    fails("line 1", write("lines", "metrics.jsonl", '{"step": 1, "loss"\n{"step": 2, "loss": 1}\n'))
    fails("holds no losses by step", write("other", "metrics.jsonl", '{"step": 1, "system": "full"}\n'))
