"""Every field is read, or refused."""

import dataclasses

import pytest

from jax_ccm.data.config import FORMAT_OPTIONS, DataConfig
from jax_ccm.errors import UserError


def test_each_format_reads_what_it_says():
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    for name, options in FORMAT_OPTIONS.items():
        assert set(options) <= fields
        DataConfig(format=name)
        for option in set().union(*FORMAT_OPTIONS.values()) - set(options):
            with pytest.raises(UserError, match=rf"data\.{option} is set, but format '{name}'"):
                DataConfig(format=name, **{option: 1})


def test_options_fall_back_to_the_format():
    assert DataConfig().option("separator") == "\nA:"
    assert DataConfig(separator="\nB:").option("answer") == "\nB:"
    assert DataConfig(format="online", separator="\nQ:", answer="\nA:").option("answer") == "\nA:"
    assert DataConfig(format="fewshot").option("answer") == " Output:"
    assert DataConfig(format="fewshot").option("max_turn_tokens") == 256
    assert DataConfig(bos=False).option("bos") is False


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": "dialog"}, "did you mean 'dialogue'"),
        ({"loss": "some"}, "unknown data.loss"),
        ({"join": 1.5}, "probability"),
        ({"batch_size": 0}, "at least 1"),
        ({"min_turns": 2}, "at least 3"),
        ({"max_turns": 3, "min_turns": 4}, "no dialogue could pass"),
        ({"train": "a.jsonl"}, r"give a list of sources, \['a.jsonl'\]"),
        ({"shuffle_seed": -1}, "must lie in"),
        ({"format": "recall", "loss": "every"}, "nothing to add"),
        ({"format": "text", "max_chunks": 8, "chunk": 64, "tokens": 512}, "do not fit|fit into"),
        ({"format": "fewshot", "shots": 0}, "at least 1"),
    ],
)
def test_bad_values(fields, says):
    with pytest.raises(UserError, match=says):
        DataConfig(**fields)
