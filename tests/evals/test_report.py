"""Pictures of quality."""

import json
from pathlib import Path

import pytest

from jax_ccm.benchmarks import report as bench
from jax_ccm.benchmarks import serving
from jax_ccm.evals import comparison, report
from jax_ccm.evals.cells import value
from jax_ccm.records import figures

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("folder", ["recipe/chat_mixture", "dialog/concat"])
def test_each_control_is_seen(folder, monkeypatch, tmp_path):
    """Also where there is a single time step, through which no line can be drawn."""
    drawn_figures = []
    monkeypatch.setattr(figures, "save", lambda figure, *_, **__: drawn_figures.append(figure))
    results = json.loads((RESULTS / folder / "results.json").read_text())
    report.plot(results, tmp_path / "plot.png")
    kind, steps = report.quality(results), [row for row in results["steps"] if row["step"] != "all"]
    drawn = [list(line.get_ydata()) for line in drawn_figures[0].axes[0].lines if line.get_marker() == "o"]
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


LONG = " as it was called by somebody who had much time and a good deal of paper" * 2


def drawn_whole(results, module):
    figure = module.figure_of(results)
    figure.draw_without_rendering()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


@pytest.mark.parametrize(
    ("module", "file"),
    [
        (report, "dialog/spread/results.json"),
        (report, "text/stream/results.json"),
        (bench, "bench/smollm2/bench.json"),
        (serving, "serving/smollm2/serving.json"),
    ],
)
def test_nothing_of_a_picture_is_cut(module, file):
    """However long title and labels are."""
    results = json.loads((RESULTS / file).read_text())
    results["title"] += LONG
    assert drawn_whole(results, module)


def test_nothing_of_a_comparison_is_cut():
    run = json.loads((RESULTS / "dialog/spread/results.json").read_text())
    compared = comparison.side_by_side({f"{number}{LONG[:90]}": [run] for number in "ab"})
    assert drawn_whole(compared, comparison)
