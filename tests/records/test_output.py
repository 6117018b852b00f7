"""What commands write: JSON that can be read again, and tables that Markdown draws."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from jax_ccm.records import output


def test_a_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "a b.yaml", "--data.separator", "\nA:"])
    assert output.command_line("jax_ccm.train") == "python -m jax_ccm.train 'a b.yaml' --data.separator '\nA:'"


def test_json(tmp_path):
    """Characters stay readable; paths become text, since JSON has no type for them."""
    output.write_json(tmp_path / "a.json", {"é": (1, 2), "folder": Path("runs/x")})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, 2], "folder": "runs/x"} and "é" in text and text.endswith("}\n")
    # The name of a file need not be UTF-8.
    output.write_json(tmp_path / "c.json", {"folder": os.fsdecode(b"runs/\xff")})
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == {"folder": os.fsdecode(b"runs/\xff")}
    output.write_lines(tmp_path / "b.jsonl", [{"step": 1}, {"step": 2}])
    assert (tmp_path / "b.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("left", "rule"), [(None, "| --- | --- |"), (1, "| --- | ---: |"), (0, "| ---: | ---: |")], ids=str
)
def test_table(left, rule):
    assert output.table(["a", "b"], [["1", "2"]], left=left) == f"| a | b |\n{rule}\n| 1 | 2 |"
