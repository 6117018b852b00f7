"""What the README and the pages of the docs show is what the code draws, prints and has measured."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

from jax_ccm.draw import draw
from jax_ccm.evals import report
from jax_ccm.methods import METHODS, build

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
RESULTS = sorted((ROOT / "results").rglob("table.md"))


def test_example():
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 8 and result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_masks_are_drawn_by_the_code(page):
    drawn = re.findall(r"<!-- draw: (.*?) -->\n```text\n(.*?)\n```", page.read_text(), re.DOTALL)
    assert len(drawn) == page.read_text().count("<!-- draw:")
    for expression, picture in drawn:
        assert eval(f"draw({expression})", {"draw": draw, "build": build}) == picture


def test_every_method_has_a_page_and_a_line():
    pages = "".join(page.read_text() for page in PAGES)
    for name in METHODS:
        assert f"`{name}`" in pages and f"`{name}`" in README.read_text(), name


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.parent.relative_to(ROOT / "results")))
def test_tables_are_made_of_the_numbers(path):
    results = json.loads((path.parent / "results.json").read_text())
    assert report.markdown(results) == path.read_text()


def test_readme_shows_the_tables():
    shown = re.findall(r"<!-- table: (\S+) -->\n((?:\|.*\n)+)", README.read_text())
    assert shown, "README shows no results"
    for name, table in shown:
        assert rows(table) == rows((ROOT / name).read_text()), f"README's copy of {name} is old"
