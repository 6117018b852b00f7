"""An audit finds what stands in two splits, and questions that need no conversation."""

from __future__ import annotations

import dataclasses

import pytest

from jax_ccm import prepare
from jax_ccm.config.schema import save_config
from jax_ccm.data import audit
from jax_ccm.data.config import DialogueConfig, OnlineConfig, RecallConfig
from jax_ccm.data.sources import Records, open_sources
from jax_ccm.errors import UserError
from tests import pretrained


def test_records_in_two_splits_or_twice():
    talk = lambda *texts: {"turns": list(texts)}
    train = Records("train", [talk("a", "b"), talk("c", "d"), talk("A ", "b")])
    test = Records("test", [talk("c", "D"), talk("e", "f")])
    first, second, both = audit.shared({"train": [train], "test": [test]}, "dialogue")
    assert first == "train: 3 records, none say what another of them says"
    assert second == "test: 2 records, none say what another of them says"
    assert both == "test and train: WARNING: 1 (50.0%) of test stand in train, too (the first: test[0])"
    (twice,) = audit.shared({"train": [Records("train", [talk("a  b"), talk("A b")])]}, "dialogue")
    assert twice == "train: 2 records, WARNING: 1 (50.0%) say what another of them says (the first: train[1])"


def test_questions():
    ask = lambda context, query, target: {"contexts": [context], "query": query, "target": target}
    made = [
        ask("Ann has a cat.", "What has Ann?", "A cat"), ask("Bob has an owl.", "Which one?", "An owl"),
        ask("Cat! A cat.", "Which one?", "A cat"), ask("Nothing.", "Which one?", "A cat"),
    ]  # fmt: skip
    assert list(audit.questions([Records("r", made)])) == [
        "the answer stands, word for word, in 75% of the own conversations, and in 50% of others",
        "2 different questions and 2 different answers in 4 records",
        "the most frequent answer, 'a cat', is right for 75%",
        "3 questions are asked more than once; the most frequent answer to each is right for 67% of those: what "
        "somebody knows who remembers no conversation",
    ]


def test_what_is_generated_is_answered_by_its_own_conversation_alone():
    told, *_ = audit.questions(open_sources(["generated:needle?size=60"], "online"))
    assert told.endswith("in 100% of the own conversations, and in 0% of others")


def test_of_a_config(tmp_path, capsys):
    made = DialogueConfig(train=("generated:chats?size=5",), test=("generated:chats?size=5",))
    save_config(dataclasses.replace(pretrained.config(tmp_path), data=made), tmp_path / "mine.yaml")
    prepare.main(["audit", str(tmp_path / "mine.yaml")])
    assert "test and train: WARNING: 5 (100.0%)" in capsys.readouterr().out
    found = list(audit.lines(OnlineConfig(test=("generated:updates?size=9",))))
    assert found[0].startswith("test: 9 records, none") and any("different answers" in line for line in found)
    for given, says in ((DialogueConfig(), "names no data"), (RecallConfig(), "no texts to compare")):
        with pytest.raises(UserError, match=says):
            list(audit.lines(given))
