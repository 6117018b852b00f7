"""Which data there are, and examples of a config as they are fed, read off the arrays of a training step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from jax_ccm import prepare
from jax_ccm.config.schema import save_config
from jax_ccm.data.generated import GENERATED
from jax_ccm.data.runs import positions, runs
from jax_ccm.data.sources import Computed, open_sources
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Kind
from jax_ccm.weights import save_hf
from tests import cases, pretrained
from tests.data.support import VOCAB, ids, tokenizer


def example(*texts: str, kept: int = 0) -> Example:
    """A session of texts, the last word of the tail scored; of each chunk the first tokens are kept."""
    tokens = [np.array(ids(text), np.int32) for text in texts]
    scored = [np.zeros(len(piece), bool) for piece in tokens]
    scored[-1][-2:] = True
    keeps = [np.arange(len(piece)) < kept if kept else None for piece in tokens]
    pieces = tuple(Segment(*parts) for parts in zip(tokens, scored, keeps, strict=True))
    return Example(np.zeros(1, np.int32), np.zeros(0, np.int32), pieces)


def cells(method, shown: Example) -> list[tuple]:
    made, _ = runs(method, shown, VOCAB, tokenizer())
    return [(run.chunk, run.kind.name, positions(run.positions), run.gated, run.scored, run.text) for run in made]


def test_runs_of_ccm():
    assert cells(build("ccm_concat", comp_tokens=2, sink=True), example("ab", "c", " the z")) == [
        (1, "SINK", "0", False, False, "<s>"),
        (1, "TEXT", "1-2", False, False, "ab"),
        (1, "COMP", "3-4", True, False, "<comp 0> <comp 1>"),
        (2, "TEXT", "3", False, False, "c"),
        (2, "COMP", "4-5", True, False, "<comp 0> <comp 1>"),
        (None, "QUERY", "4", False, False, " the"),
        (None, "QUERY", "5-6", False, True, " z"),
    ]


def test_runs_of_text_that_stays_and_a_lora_on_all():
    found = cells(build("sentinel"), example("abc", " the z", kept=1))
    assert ("QUERY", "a") in [(kind, text[-1]) for _, kind, *_, text in found], found
    assert {kind for _, kind, *_ in found} == {"QUERY", "TEXT", "OPEN", "COMP"}
    assert all(gated for *_, gated, _, _ in found)
    assert [text for *_, scored, text in found if scored] == [" z"]


def test_runs_that_are_repeated():
    """What is repeated is scored in place; a full tail is closed, and so is a chunk like the others."""
    found = cells(build("loma", ratio=2, memory_tokens=1, repeat=True), example("a", "bc"))
    assert [(chunk, scored, text) for chunk, kind, _, _, scored, text in found if kind == "REPEAT"] == [
        (1, True, "<repeat x 2>"), (2, True, "<repeat x 2>"),
    ]  # fmt: skip
    assert all(chunk is not None for chunk, *_ in found)


def config_file(folder) -> str:
    """A config beside its data and a base, whose tokenizer gives text back as it was."""
    save_hf(cases.model(tokens=0, rank=0, vocab_size=VOCAB), folder / "base")
    tokenizer().save_pretrained(folder / "base")
    save_config(pretrained.config(folder), folder / "mine.yaml")
    return str(folder / "mine.yaml")


def test_positions():
    assert [positions(given) for given in ((3,), (3, 4, 5), (3, 7, 11), (4, 4))] == ["3", "3-5", "3, 7, 11", "4, 4"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_inspect(split, tmp_path, capsys):
    file = config_file(tmp_path)
    (tmp_path / "talk.jsonl").write_text(json.dumps({"turns": ["hi\nyou", "\x1b[2Jok", "what", "no"]}) + "\n")
    prepare.main(["inspect", file, "--split", split, "--data.loss", "every", "--count", "2"])
    said = capsys.readouterr().out
    assert "the LoRA acts on COMP" in said and said.count("example ") == 1 and "\x1b" not in said
    assert "1      TEXT  " in said and "[<s>hi⏎you]" in said and "[<comp 0> <comp 1>]" in said
    assert ("[ no</s>]" if split == "train" else "[ no]") in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_not_shown_is_not_made(split, tmp_path, capsys, monkeypatch):
    """Of 300,000 generated conversations in two sources four are made, spread over both."""
    made, get = [], Computed.__getitem__
    monkeypatch.setattr(Computed, "__getitem__", lambda self, index: made.append(self.where(index)) or get(self, index))
    sources = [f"generated:conversations?split=train&turns=4&seed={seed}&size=150000" for seed in (0, 1)]
    limits = {"tokens": 4000, "max_tokens": 4000, "max_tokens_evaluation": 4000, "max_turn_tokens": 400, "scored": 999}
    given = [word for name, most in limits.items() for word in (f"--data.{name}", str(most))]
    given += ["--data.weights", "1", "2"] if split == "train" else []
    prepare.main(["inspect", config_file(tmp_path), "--split", split, f"--data.{split}", *sources, *given, "--count=4"])
    said = capsys.readouterr().out
    assert f"{split} data, 4 of 300,000 records looked at: 4 of 4 dialogues are used" in said
    assert [line.split(": ")[1] for line in said.splitlines() if line.startswith("example ")] == made
    assert made == [f"{sources[0]}[0]", f"{sources[0]}[100000]", f"{sources[1]}[49999]", f"{sources[1]}[149999]"]


def test_records_that_are_dropped_are_passed_over(tmp_path, capsys):
    """As many are made as it takes to find examples among those that are too long, and it says of how many."""
    file = config_file(tmp_path)
    talks = [["hi", "x" * 400 if number % 10 else "yes", "what", "no"] for number in range(200)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in talks))
    prepare.main(["inspect", file, "--data.loss", "every", "--count", "3"])
    said = capsys.readouterr().out
    assert said.count("example ") == 3 and "48 of 200 records looked at: 5 of 48 dialogues are used" in said
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"turns": talks[1]}) + "\n" for _ in range(9)))
    for split, what in (("train", "training"), ("test", "evaluation")):
        says = f"no {what} data is left: 0 of 9 dialogues are used; dropped: 9 with one of"
        with pytest.raises(UserError, match=says):
            prepare.main(["inspect", file, "--split", split, "--data.loss", "every", "--count", "3"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_few_shot_examples_are_drawn_from_all_records(split, tmp_path, capsys):
    file = config_file(tmp_path)
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) + "\n" for n in range(9)))
    given = ["--data.format", "fewshot", "--data.demonstrations", str(task), "--data.shots", "2"]
    given += ["--data.train", str(task), "--data.test", str(task), "--data.tokens", "9000", "--data.max_chunks", "99"]
    prepare.main(["inspect", file, "--split", split, *given])
    said = capsys.readouterr().out
    assert f"{split} data: 9 of 9" in said and said.count("example ") == 3


def test_colours_on_a_terminal_only(monkeypatch, tmp_path, capsys):
    import rich.console

    file = config_file(tmp_path)
    monkeypatch.setattr(rich.console, "Console", lambda **given: Console(force_terminal=True, **given))
    prepare.main(["inspect", file, "--count", "1"])
    assert "[\x1b[35m<comp 0> <comp 1>\x1b[0m]" in capsys.readouterr().out


def test_list(monkeypatch, tmp_path, capsys):
    (tmp_path / "talks" / "1.0.0").mkdir(parents=True)
    (tmp_path / "talks" / "1.0.0" / "dataset_info.json").write_text('{"splits": [{"name": "train"}]}')
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare.main(["list"])
    said = capsys.readouterr().out
    assert "tfds:talks:SPLIT   splits: train" in said
    for name, kind in GENERATED.items():
        (shown,) = [line.strip() for line in said.splitlines() if line.strip().startswith(f"generated:{name}?")]
        # What is listed can be given.
        assert len(open_sources([shown], kind.format)[0]) == 2000


@pytest.mark.parametrize(
    "given, says",
    [
        ([], "say what to do"),
        (["inspct"], "did you mean 'inspect'"),
        (["inspect", "CONFIG", "--count", "0"], "--count is 0"),
    ],
)
def test_mistakes(given, says, tmp_path):
    save_config(pretrained.config(tmp_path), tmp_path / "mine.yaml")
    given = [str(tmp_path / "mine.yaml") if word == "CONFIG" else word for word in given]
    with pytest.raises(UserError, match=says):
        prepare.main(given)


def test_kinds_have_room_in_the_table():
    assert max(len(kind.name) for kind in Kind) <= 6
