"""Each format has the options that it reads, and no others."""

import dataclasses

import pytest

from jax_ccm.data.config import (
    BY_FORMAT,
    DataConfig,
    DialogueConfig,
    FewShotConfig,
    OnlineConfig,
    TextConfig,
    kind_of,
    own_options,
)
from jax_ccm.errors import UserError


def test_an_option_of_another_format_is_refused():
    every = {option for kind in BY_FORMAT.values() for option in own_options(kind)}
    for name, kind in BY_FORMAT.items():
        assert kind().format == name
        own = own_options(kind)
        assert kind_of({"format": name, **dict.fromkeys(own)}) is kind
        for option in every - set(own):
            with pytest.raises(UserError, match=rf"data\.{option} is set, but format '{name}'"):
                kind_of({"format": name, option: 1})


def test_a_class_is_of_one_format():
    with pytest.raises(UserError, match="data.format is .text., whose options are the fields of TextConfig"):
        DialogueConfig(format="text")
    with pytest.raises(UserError, match="fields of DialogueConfig; this is a DataConfig"):
        DataConfig()
    with pytest.raises(UserError, match="TextConfig"):
        dataclasses.replace(DialogueConfig(), format="text")


def test_fixed_texts():
    assert DialogueConfig().fixed_texts()["separator"] == DialogueConfig().fixed_texts()["answer"] == "\nA:"
    assert DialogueConfig(separator="\nB:").fixed_texts()["answer"] == "\nB:"
    assert OnlineConfig(separator="\nQ:", answer="\nA:").fixed_texts()["answer"] == "\nA:"
    assert FewShotConfig().fixed_texts()["answer"] == " Output:"
    assert DialogueConfig(bos=False).fixed_texts()["bos"] is False
    assert TextConfig().fixed_texts() == {"bos": True}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": "dialog"}, "did you mean 'dialogue'"),
        ({"format": ["text"]}, r"unknown data.format \"\['text'\]\""),
        ({"loss": "some"}, "unknown data.loss"),
        ({"join": 1.5}, "data.join is 1.5; it is a probability, from 0 to 1"),
        ({"format": "fewshot", "symbols": float("nan")}, "data.symbols is nan; it is a probability, from 0 to 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"max_turn_tokens": 0}, "max_turn_tokens is 0; it must be at least 1"),
        ({"min_turns": 2}, "at least 3"),
        ({"max_turns": 3, "min_turns": 4}, "no dialogue could pass"),
        ({"train": "a.jsonl"}, r"give a list of sources, \['a.jsonl'\]"),
        ({"format": "fewshot", "demonstrations": "a.jsonl"}, r"give a list of sources, \['a.jsonl'\]"),
        ({"shuffle_seed": -1}, "must lie in"),
        ({"loss": "all"}, "is for format 'text'"),
        ({"format": "recall", "loss": "every"}, "nothing to add"),
        ({"format": "text", "max_chunks": 8, "chunk": 64, "tokens": 512}, "do not fit into"),
        ({"format": "text", "ratio": 0.5, "span": 1}, "span is 1; it must be at least 2"),
        ({"format": "text", "span": 9}, "data.span has no effect without data.ratio"),
        ({"format": "text", "ratio": 0.5, "hide": "tokens", "unit": "words"}, "no effect with data.hide='tokens'"),
        ({"format": "fewshot", "shots": 0}, "at least 1"),
        ({"format": "fewshot", "max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ],
)
def test_bad_values(fields, says):
    with pytest.raises(UserError, match=says):
        kind_of(fields)(**fields)
