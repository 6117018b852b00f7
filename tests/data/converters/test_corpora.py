"""Small files in the formats of corpora become texts."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError

WIKI = (
    " \n = Robert Boulter = \n \n He acts . \n \n = = Career = = \n \n = 5 = is no title \n = 7 = \n More . \n \n"
    " = Du Fu = \n \n A poet . \n"
)


def texts(source: str) -> list[str]:
    (opened,) = open_sources([source], "text")
    return [record["text"] for record in opened]


def test_wikitext(tmp_path):
    """An article begins at a title that stands between empty lines; sections are no titles."""
    path = tmp_path / "wiki.test.raw"
    path.write_text(WIKI, encoding="utf-8")
    first, second = texts(f"wikitext:{path}")
    assert first.startswith("= Robert Boulter = \n") and first.endswith(" = 7 = \n More .")
    assert second == "= Du Fu = \n \n A poet ."
    rows = [{"text": f"{line}\n" if line.strip() else ""} for line in WIKI.split("\n")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    found = texts(f"wikitext:{tmp_path / 'test.parquet'}")
    assert [text.split() for text in found] == [first.split(), second.split()]
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="nothing of it can be used"):
        texts(f"wikitext:{path}")


def test_pg19(tmp_path):
    with pytest.raises(UserError, match=r"is a folder without \.txt files"):
        texts(f"pg19:{tmp_path}")
    (tmp_path / "2.txt").write_bytes("\ufeffTwo\r\nlines\r\n".encode())
    (tmp_path / "10.txt").write_text("Ten", encoding="utf-8")
    assert texts(f"pg19:{tmp_path}") == ["Ten", "Two\nlines"]
    assert texts(f"pg19:{tmp_path / '2.txt'}") == ["Two\nlines"]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "A book"}]), tmp_path / "test.parquet")
    assert texts(f"pg19:{tmp_path / 'test.parquet'}") == ["A book"]


def test_c4(tmp_path):
    lines = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in ("one\ntwo", "three")).encode()
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    path.write_bytes(gzip.compress(lines))
    (tmp_path / "c4.json").write_bytes(lines)
    assert texts(f"c4:{path}") == texts(f"c4:{tmp_path / 'c4.json'}") == ["one\ntwo", "three"]
    path.write_bytes(gzip.compress(b'{"text": 5}\n'))
    with pytest.raises(UserError, match=r"json\.gz:1: field 'text' must be a string, it is 5"):
        texts(f"c4:{path}")
    for content in (gzip.compress(lines)[:-12], b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"json\.gz cannot be read: .*; get it again"):
            texts(f"c4:{path}")
