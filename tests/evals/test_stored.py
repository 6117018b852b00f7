"""Results of earlier versions: read as this one writes them, and shown as they were."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jax_ccm.errors import UserError
from jax_ccm.evals import card, comparison, report, stored
from jax_ccm.records import output
from jax_ccm.reports import folders, tables

RESULTS = Path(__file__).parents[2] / "results"
WHOLE = RESULTS / "text/loma/c2_rate_5e-4.json"


def put(folder: Path, name: str, content) -> Path:
    folder.mkdir()
    output.write_json(folder / name, content)
    return folder


def changed(**changes) -> dict:
    return json.loads(WHOLE.read_text()) | changes


def test_whole_texts_were_a_time_step(tmp_path):
    """Of an evaluation; it goes side by side with one of this version, and a comparison that is written is the same."""
    old = put(tmp_path / "old", "results.json", changed())
    found = comparison.load(old)
    assert [row["step"] for row in found["steps"]] == [None] and "schema" not in found
    assert found | {"steps": None} == changed(steps=None)
    new = put(tmp_path / "new", "results.json", found | {"schema": output.SCHEMA})
    joined = comparison.side_by_side({"old": [found], "new": [comparison.load(new)]})
    both = put(tmp_path / "both", "comparison.json", joined)
    assert stored.read(both / "comparison.json") == joined and joined["steps"][0]["step"] is None
    table = comparison.markdown(joined).splitlines()
    assert table[0].startswith("| system | slots | KiB | of full | perplexity |")
    assert "- perplexity of whole texts; slots and KiB of a session, mean at its end" in table
    assert report.table_rows(found)[1][0][0] == "whole texts" and "| whole texts |" in report.markdown(found)
    assert card.read_results(old / "results.json") == found
    shown = [tables.quality(one.content)[1] for one in folders.find([str(old), str(new)])]
    assert shown[0] == shown[1] and shown[0][0][0] == "whole texts"


def test_the_cells_of_a_comparison_had_the_names_of_steps():
    for path in (RESULTS / "text/loma", RESULTS / "dialog/eviction"):
        before, (found,) = json.loads((path / "comparison.json").read_text()), folders.find([str(path)])
        steps = [str(row["step"]) for row in before["steps"]]
        for name, runs in before["systems"].items():
            for run, now in zip(runs, found.content["systems"][name], strict=True):
                assert dict(zip(steps, now["steps"], strict=True)) == run["steps"]
        assert len(tables.comparison(found.content)[1]) == sum(map(len, before["systems"].values()))


def test_a_task_may_have_that_name(tmp_path):
    config = changed()["config"]
    config["eval"]["by"] = "task"
    found = comparison.load(put(tmp_path / "task", "results.json", changed(config=config)))
    assert found["steps"][0]["step"] == "text" and report.table_rows(found)[0][0] == "task"
    assert "perplexity of the target" in comparison.markdown(comparison.side_by_side({"x": [found]}))


@pytest.mark.parametrize("read", [comparison.load, lambda folder: card.read_results(folder / "results.json")])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": output.SCHEMA + 1}, f"is of schema {output.SCHEMA + 1}, and this version of jax_ccm reads 1 to "),
        ({"schema": True}, "is of schema True"),
        ({"steps": [3]}, "lacks something that its command writes"),
        ({"steps": [{}]}, "lacks something that its command writes (KeyError('step'))"),
        ({"config": {"eval": []}}, "lacks something that its command writes"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, read, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(put(tmp_path / "bad", "results.json", changed(**changes)))
