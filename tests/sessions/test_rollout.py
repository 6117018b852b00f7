"""Recorded conversations held anew: in batches as one by one, from memory and from all text, and by the command."""

from __future__ import annotations

import dataclasses
import json

import pytest
from flax import nnx

from jax_ccm import rollout as command
from jax_ccm.config import cli
from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.rollout import Recorded, roll_out, roll_out_records, with_full_context
from tests import cases
from tests.data import support as data
from tests.test_chat import experiment
from tests.test_evaluate import SCRATCH, run, write

METHOD = dict(comp_tokens=2, sink=True)
# Of different lengths; the last turn of the second is the user's.
HELD = [
    Recorded(("hello", "a", "who", "b")),
    Recorded(("hi you", "c", "what is it", "d", "and then")),
    Recorded(("yes", "e")),
]


def by_hand(made, recorded: Recorded, max_tokens: int) -> tuple[str, ...]:
    talk, turns = Conversations(made), list(recorded.turns)
    if recorded.system:
        talk.instruct({0: recorded.system})
    for at in range(0, len(turns) - 1, 2):
        turns[at + 1] = talk.say({0: turns[at]}, max_tokens=max_tokens)[0]
    return tuple(turns)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_side_by_side_as_one_by_one(rows):
    made, lines = experiment(**METHOD), []
    went = roll_out(Conversations(made, rows), HELD, max_tokens=4, log=lines.append)
    assert went.conversations == [by_hand(made, each, 4) for each in HELD]
    assert went.conversations[1][-1] == "and then" and went.conversations != [each.turns for each in HELD]
    assert went.replies == 5 and lines[-1].startswith("3 of 3") and len(lines) == -(-3 // rows)


@pytest.mark.once
def test_full_context_has_room_for_all_of_it():
    """More exchanges than the cache of the config has room for as text; the LoRA is of no account."""
    made = experiment(**METHOD)
    recorded = Recorded(("what is your name", "x") * 9)
    records = [{"contexts": list(recorded.turns), "query": "q", "target": "t"}]
    full = with_full_context(made, records, max_tokens=5)
    assert full.config.cache.raw_capacity > made.config.cache.raw_capacity
    talk = Conversations(full)
    went = roll_out(talk, [recorded], max_tokens=5)
    assert went.replies == 9 and went.conversations[0] != recorded.turns
    slots, held, of_full_context = talk.memory_bytes()
    assert slots > made.config.cache.raw_capacity and held == of_full_context
    # Another LoRA answers the same.
    other = dataclasses.replace(made, model=cases.model(tokens=2, seed=3, vocab_size=made.model_config.vocab_size))
    base = nnx.split(made.model, nnx.LoRAParam, ...)[2]
    other = dataclasses.replace(other, model=nnx.merge(*nnx.split(other.model, nnx.LoRAParam, ...)[:2], base))
    assert roll_out(Conversations(with_full_context(other, records, 5)), [recorded], max_tokens=5) == went
    assert roll_out(Conversations(other), HELD, max_tokens=5) != roll_out(Conversations(made), HELD, max_tokens=5)


def test_an_empty_answer_leaves_the_recorded_one():
    made = experiment(**METHOD)
    first = Conversations(made).say({0: "hello"}, max_tokens=1)[0]
    went = roll_out(Conversations(made, stop=[first]), [Recorded(("hello", "recorded"))], max_tokens=1)
    assert went.conversations == [("hello", "recorded")] and (went.replies, went.empty, went.cut) == (1, 1, 0)
    assert roll_out(Conversations(made), [Recorded(("hello", "x"))], max_tokens=1).cut == 1


def test_a_turn_that_cannot_be_answered():
    talk = Conversations(experiment(**METHOD), 2)
    with pytest.raises(UserError, match="turn 3 of conversations 2: "):
        roll_out(talk, [Recorded(("a", "b")), Recorded(("a", "b", "x" * 400, "c"))], max_tokens=2)


@pytest.mark.once
def test_records_of_one_conversation_share_it():
    made = experiment(data={"chat_template": True}, **METHOD)
    questions = [dict(contexts=["hello", "a"], query=query, target="t", age=1) for query in ("one", "two")]
    questions.append(questions[0] | {"system": "Be brief."})
    held, went = roll_out_records(Conversations(made, 2), questions, max_tokens=3)
    assert len(went.conversations) == went.replies == 2
    assert [record | {"contexts": 0} for record in held] == [record | {"contexts": 0} for record in questions]
    expected = [by_hand(made, Recorded.of(record), 3) for record in questions]
    assert [tuple(record["contexts"]) for record in held] == expected and expected[0] != expected[2]


def rolled_out(monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["rollout", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(command.main)
    return stopped.value.code, *capsys.readouterr()


@pytest.mark.once
def test_the_command(tmp_path, monkeypatch, capsys):
    """What it writes is what `evaluate` reads; both systems answer each in their own way."""
    data.tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["the hen", "the inner then", "on the hen", "then the inner"]
    asked = {"query": "the", "target": "then hen", "choices": ["then hen", "on"], "age": 1}
    record = lambda shift: {"contexts": [words[(k + shift) % 4] for k in range(4)], **asked}
    file = data.write(tmp_path / "r.jsonl", [record(shift) for shift in (0, 1, 2)])
    config = write(
        tmp_path / "c.yaml",
        model={"scratch": SCRATCH, "tokenizer": str(tmp_path / "tokenizer")},
        data={"format": "online", "test": [file]},
        eval={"by": "age", "steps": [1], "batch_size": 2},
    )
    found = {}
    for out, options in (("memory", ()), ("full", ("--full", True))):
        given = (config, "--workdir", tmp_path / out, "--max_tokens", 3, "--rows", 2, *options)
        code, printed, err = rolled_out(monkeypatch, capsys, *given)
        assert code == 0 and "6 replies in 3 conversations" in printed, err
        found[out] = [json.loads(line) for line in (tmp_path / out / "records.jsonl").read_text().splitlines()]
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        assert summary["records"] == 3 and summary["replies"] == 6
        assert [each["contexts"][::2] for each in found[out]] == [record(k)["contexts"][::2] for k in (0, 1, 2)]
    assert found["memory"] != [record(k) for k in (0, 1, 2)]
    code, printed, err = run(
        monkeypatch, capsys, config, "--workdir", tmp_path / "quality", "--data.test", tmp_path / "memory/records.jsonl"
    )
    assert code == 0, err
    for wrong, message in (
        (("--split", "validation"), "data.validation is empty"),
        (("--max_tokens", 0), "--max_tokens is 0"),
        (("--data.format", "text"), "data.format is 'text'; set --data.format online"),
    ):
        code, _, err = rolled_out(monkeypatch, capsys, config, "--workdir", tmp_path / "bad", *wrong)
        assert code == 2 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "bad" / "records.jsonl").exists()
    # Nothing of a training run is overwritten, and a record without text is no conversation.
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, _, err = rolled_out(monkeypatch, capsys, config, "--workdir", tmp_path / "run")
    assert code == 2 and "holds a training run" in err and not (tmp_path / "run" / "config.yaml").exists()
    blank = data.write(tmp_path / "b.jsonl", [record(0) | {"contexts": ["the hen", " "]}, record(1)])
    code, printed, err = rolled_out(monkeypatch, capsys, config, "--workdir", tmp_path / "blank", "--data.test", blank)
    assert code == 0 and "dropped: 1 with one of their pieces empty" in printed and "1 records in" in printed, err
    blank = data.write(tmp_path / "b.jsonl", [record(0) | {"contexts": [" "]}])
    code, _, err = rolled_out(monkeypatch, capsys, config, "--workdir", tmp_path / "bad", "--data.test", blank)
    assert code == 2 and "no test data is left" in err
