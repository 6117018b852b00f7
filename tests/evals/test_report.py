"""Pictures of quality."""

import json
from pathlib import Path

import pytest

from jax_ccm.evals import report
from jax_ccm.evals.cells import value
from jax_ccm.records import paths

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("folder", ["recipe/chat_mixture", "dialog/concat"])
def test_each_control_is_seen(folder, monkeypatch, tmp_path):
    """Also where there is a single time step, through which no line can be drawn."""
    figures = []
    monkeypatch.setattr(paths, "save_figure", lambda figure, *_, **__: figures.append(figure))
    results = json.loads((RESULTS / folder / "results.json").read_text())
    report.plot(results, tmp_path / "plot.png")
    kind, steps = report.quality(results), [row for row in results["steps"] if row["step"] != "all"]
    drawn = [list(line.get_ydata()) for line in figures[0].axes[0].lines if line.get_marker() == "o"]
    sides = [side for cell in steps[0]["systems"].values() for side in (cell, cell.get("wrong")) if side is not None]
    assert sorted(heights[0] for heights in drawn) == sorted(value(side, kind) for side in sides)


def test_what_is_undefined_is_a_dash(tmp_path):
    """A system whose likelihoods are no numbers costs nobody the table and the picture of the others."""
    results = json.loads((RESULTS / "dialog/concat" / "results.json").read_text())
    header, before = report.table_rows(results)
    memory = results["steps"][0]["systems"]["memory"]
    for cell in (memory, memory["wrong"]):
        cell["perplexity"] = {"value": None, "error": None, "ci95": [None, None]}
    assert memory["nll"]["value"] is not None
    expected = list(before[0])
    expected[header.index(report.STYLE["memory"][1])] = "- (-)"
    assert report.table_rows(results)[1] == [expected, *before[1:]]
    report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
