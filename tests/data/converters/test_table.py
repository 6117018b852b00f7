"""What is read by name is listed, documented and can be given as it is listed."""

from __future__ import annotations

from pathlib import Path

from jax_ccm import prepare
from jax_ccm.data.converters.table import CONVERTERS
from jax_ccm.data.sources import FIELDS

PAGE = (Path(__file__).parents[3] / "docs" / "sources.md").read_text()


def test_the_page_has_every_format_with_its_options():
    for name, kind in CONVERTERS.items():
        assert kind.format in FIELDS
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}:PATH")]
        assert all(f"{option}={default}" in PAGE for option, default in kind.options.items()), name
        assert f"`{kind.format}`" in row
        if kind.citation:
            assert f"| {kind.licence} | {kind.citation} | {kind.splits} | {'yes' if kind.seen else 'never'} |" in row


def test_listed(capsys):
    prepare.main(["list"])
    said = capsys.readouterr().out
    for name, kind in CONVERTERS.items():
        assert f"  {name}:PATH" in said and kind.about in said
