"""Conversations of OpenAI's and ShareGPT's kind become dialogues, or say what is wrong and where."""

from __future__ import annotations

import json

import pytest

from jax_ccm.data.config import DialogueConfig
from jax_ccm.data.documents import build
from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError
from tests.data.support import tokenizer, write


def say(*texts: str, first: str = "user", **more) -> list[dict]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": text, **more} for number, text in enumerate(texts)]


def opened(path: str, name: str = "openai"):
    (source,) = open_sources([f"{name}:{path}"], "dialogue")
    return source


def turns(path: str, name: str = "openai") -> list[list[str]]:
    source = opened(path, name)
    return [source[index]["turns"] for index in range(len(source))]


def test_openai(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    made = [
        say("a", "b", "c", "d"),
        [system, *say("a", "b")],
        [*say("hello", first="assistant"), *say("a", "b", "c")],
        [*say("a"), *say("b", "c")],
        [{"role": "user", "content": parts}, *say("b", first="assistant")],
    ]
    path = write(tmp_path / "mine.jsonl", [{"messages": messages} for messages in made])
    assert turns(path) == [
        ["a", "b", "c", "d"], ["a", "b"], ["a", "b"], ["a\n\nb", "c"], ["one\ntwo", "b"],
    ]  # fmt: skip
    assert opened(path)[1] == {"turns": ["a", "b"], "system": "Be brief."}
    assert opened(f"{path}?system=drop")[1] == {"turns": ["a", "b"]}
    source = opened(f"{path}?system=join")
    assert source[1] == {"turns": ["Be brief.\n\na", "b"]}
    assert source.where(1) == f"{path}:2"
    assert source.changed == {
        "with their system message in front of a turn": 1,
        "without what the assistant says before the user": 1,
        "without a last turn that nobody answers": 1,
        "with neighbouring messages of one role joined": 1,
    }


def test_what_is_left_out_or_changed_is_told(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    made = [say("a", "b", "c", "d"), [*say("a"), call], [picture, *say("b", first="assistant")], say("a")]
    path = write(tmp_path / "mine.jsonl", [{"messages": messages} for messages in made])
    config = DialogueConfig(min_turns=4)
    _, report = build(config, tokenizer()).load([opened(path)])
    assert str(report) == (
        f"1 of 4 dialogues are used; dropped: 1 with calls of tools, which turns do not hold (the first: {path}:2), "
        f"1 with pictures, sound or files, which turns do not hold (the first: {path}:3), "
        f"1 in which user and assistant do not both speak (the first: {path}:4)"
    )
    with pytest.raises(UserError, match=r"nothing of it can be used \(1 in which user and assistant"):
        opened(write(tmp_path / "none.jsonl", [{"messages": say("a")}]))


def test_weights_are_what_is_scored(tmp_path):
    no = {"weight": 0}
    made = [*say("a", "b"), *say("c"), *say("d", first="assistant", **no), *say("e", "f"), *say("g"),
            *say("h", first="assistant", **no)]  # fmt: skip
    source = opened(write(tmp_path / "mine.jsonl", [{"messages": made}]))
    assert source[0] == {"turns": ["a", "b", "c", "d", "e", "f"], "scored": [1, 5]}
    every = [*say("c"), *say("d", first="assistant", **no)]
    with pytest.raises(UserError, match="whose weights are all 0"):
        opened(write(tmp_path / "none.jsonl", [{"messages": every}]))


def test_sharegpt(tmp_path):
    talk = [
        {"from": "system", "value": "Be kind."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
    ]  # fmt: skip
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"id": "x", "conversations": talk}, {"conversations": talk[1:]}]))
    assert turns(str(path), "sharegpt") == [["a", "b"], ["a", "b"]]
    assert opened(str(path), "sharegpt")[0]["system"] == "Be kind."
    assert opened(str(path), "sharegpt").where(1) == f"{path}[1]"


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("openai", {"turns": []}, r"a\.jsonl:1: there is no field 'messages' \(the fields: turns\)"),
        ("openai", {"messages": "a"}, r"a\.jsonl:1: field 'messages' must be a list, it is 'a'"),
        ("openai", {"messages": ["a"]}, r"a\.jsonl:1: messages\[0\]: a JSON object is needed, this is a str"),
        ("openai", {"messages": [{"role": "user"}]}, r"messages\[0\]: there is no field 'content'"),
        ("openai", {"messages": [{"role": "usr", "content": "a"}]}, r"messages\[0\]: field 'role' is 'usr'; did you"),
        ("openai", {"messages": say("a", "\ud83d")}, r"messages\[1\]: field 'content' holds half a character"),
        ("openai", {"messages": say("a", weight=0.5)}, r"messages\[0\]: field 'weight' must be 0 or 1, it is 0.5"),
        ("sharegpt", {"conversations": [{"from": "human", "value": 3}]}, r"field 'value' must be a string, it is 3"),
    ],
)
def test_mistakes_name_file_line_and_field(tmp_path, name, record, says):
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=says):
        opened(path, name)


def test_sources_that_cannot_be(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": say("a", "b")}])
    for source, format, says in [
        (f"openai:{path}", "text", "gives records for format 'dialogue', but data.format is 'text'"),
        (f"openai:{path}?sytem=drop", "dialogue", "did you mean 'system'"),
        (f"openai:{path}?path=x", "dialogue", "unknown option"),
        (f"openai:{path}?system=kept", "dialogue", "Allowed: drop, join, keep"),
        (f"openai:{tmp_path}/none.jsonl", "dialogue", "there is no .*none.jsonl. openai reads"),
        (f"openai:{tmp_path}/*.json", "dialogue", "no file matches"),
        (f"openai:{tmp_path}/a.txt", "dialogue", "ends in '.txt'; allowed are"),
    ]:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(UserError, match=says):
            open_sources([source], format)
    assert len(open_sources([f"openai:{tmp_path}/*.jsonl"], "dialogue")) == 1
