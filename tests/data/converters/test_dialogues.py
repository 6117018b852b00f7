"""Small files in the formats of conversations of two people become dialogues."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError


def opened(source: str):
    (found,) = open_sources([source], "dialogue")
    return found


def turns(source: str) -> list[list[str]]:
    return [record["turns"] for record in opened(source)]


def test_dailydialog(tmp_path):
    path = tmp_path / "dialogues_test.txt"
    path.write_text("Hey man . __eou__ What 's  up ? __eou__ Not much . __eou__\n\nAlone __eou__\n", encoding="utf-8")
    source = opened(f"dailydialog:{path}")
    assert [record["turns"] for record in source] == [["Hey man .", "What 's up ?", "Not much ."]]
    assert source.where(0) == f"{path}:1" and source.dropped == [("with fewer than two turns", f"{path}:3")]
    parquet.write_table(pyarrow.Table.from_pylist([{"dialog": ["a ", " b"]}]), tmp_path / "test.parquet")
    assert turns(f"dailydialog:{tmp_path / 'test.parquet'}") == [["a", "b"]]
    path.write_bytes(b"good __eou__ day __eou__\nbad \xff __eou__")
    with pytest.raises(UserError, match=r"dialogues_test\.txt:2: not UTF-8 text"):
        turns(f"dailydialog:{path}")


def test_soda(tmp_path):
    path = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"dialogue": ["Hi.", "Hello."], "speakers": ["A", "B"]}]), path)
    assert turns(f"soda:{path}") == [["Hi.", "Hello."]]
    parquet.write_table(pyarrow.Table.from_pylist([{"speakers": ["A", "B"]}]), path)
    with pytest.raises(UserError, match=r"test\.parquet\[0\]: there is no field 'dialogue' \(the fields: speakers\)"):
        turns(f"soda:{path}")


def test_msc(tmp_path):
    said = lambda *texts: [{"text": text, "id": f"Speaker {n % 2 + 1}"} for n, text in enumerate(texts)]
    row = {"previous_dialogs": [{"dialog": said("one", "two"), "time_back": "2 days ago"}, {"dialog": said("three")}],
           "dialog": said("four", "five"), "personas": [["I ski."], []]}  # fmt: skip
    path = tmp_path / "train.txt"
    path.write_text("".join(json.dumps(each) + "\n" for each in (row, {"dialog": said("a", "b")})), encoding="utf-8")
    assert turns(f"msc:{path}") == [["one", "two", "three", "four", "five"], ["a", "b"]]
    source = opened(f"msc:{path}?turns=2")
    assert [record["turns"] for record in source] == [["one", "two"], ["three", "four"], ["a", "b"]]
    assert source.where(1) == f"{path}:1 from turn 3" and source.changed == {
        "without a last turn that was left alone": 1
    }
    path.write_text(json.dumps({"dialog": [{"said": "x"}]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.txt:1: dialog\[0\]: there is no field 'text'"):
        turns(f"msc:{path}")
    with pytest.raises(UserError, match="turns=-1 of a source must be at least 0"):
        turns(f"msc:{path}?turns=-1")


def test_realtalk(tmp_path):
    said = lambda *pairs: [{"speaker": who, "clean_text": text, "date_time": "29.12.2023"} for who, text in pairs]
    talk = {"name": {"speaker_1": "Ann", "speaker_2": "Bob"}, "session_10": said(("Ann", "late")),
            "session_2": said(("Ann", "Hi"), ("Ann", "you\nthere?"), ("Bob", " "), ("Bob", "Yes.")),
            "events_session_2": {}, "session_2_date_time": "29.12.2023", "qa": []}  # fmt: skip
    path = tmp_path / "Chat_1.json"
    path.write_text(json.dumps(talk), encoding="utf-8")
    source = opened(f"realtalk:{path}")
    assert source[0]["turns"] == ["Hi you there?", "Yes.", "late"]
    assert source.changed == {"messages joined to the one before": 1, "messages without text left out": 1}
    path.write_text(json.dumps({"qa": []}), encoding="utf-8")
    with pytest.raises(UserError, match=r"Chat_1\.json\[0\]: there is no session"):
        turns(f"realtalk:{path}")
