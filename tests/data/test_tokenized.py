"""Training data that were tokenised before: the same batches without the corpus; what is damaged is refused."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from tokenizers import normalizers

from jax_ccm import prepare as command
from jax_ccm.config.schema import save_config
from jax_ccm.data import documents, tokenized
from jax_ccm.data.batches import prepare
from jax_ccm.data.config import DialogueConfig, FewShotConfig, OnlineConfig, TextConfig
from jax_ccm.errors import UserError
from jax_ccm.methods import build, ccm
from jax_ccm.training.inputs import of_data
from jax_ccm.training.run import Run
from jax_ccm.weights import save_hf
from tests import cases, pretrained
from tests.data.support import VOCAB, dialogues, tokenizer, write

pytest.importorskip("tensorflow_datasets")
# The library itself warns about its own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

METHOD = ccm.concat(comp_tokens=2, sink=True)
SIZES = {"batch_size": 2, "tokens": 160, "max_chunks": 8, "scored": 120}


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["the", "hen", "on", "tin", "her"]) for _ in range(count))


def dialogue_data(folder):
    marked = {"turns": ["a", "b", "c", "d", "the end"], "scored": [2, 4]}
    empty = {"turns": ["a", " ", "c", "d"]}
    first = write(folder / "first.jsonl", [*dialogues(3, 4, 9, 30), marked, empty])
    second = write(folder / "second.jsonl", dialogues(5, 6, 7))
    # Of the third nothing is left: its dialogues are too short.
    third = write(folder / "third.jsonl", dialogues(2, 2))
    return DialogueConfig(train=(first, third, second), loss="every", max_turns=8, join=0.3, **SIZES)


def weighted(folder):
    config = dialogue_data(folder)
    first, _, second = config.train
    return dataclasses.replace(config, train=(first, second), weights=(1.0, 3.0), buckets=(64, 96))


def twice(folder):
    first, _, second = dialogue_data(folder).train
    return DialogueConfig(train=(first, first, second), weights=(1.0, 2.0, 1.0), loss="last", **SIZES)


def online_data(folder):
    record = lambda n: {"contexts": [f"the hen {k}" for k in range(n)], "query": "her?", "target": f"{n}", "age": n}
    return OnlineConfig(train=(write(folder / "asked.jsonl", [record(n) for n in range(1, 6)]),), **SIZES)


def text_data(folder):
    for number in range(3):
        (folder / f"{number}.txt").write_text(words(40 + 20 * number, number))
    sizes = SIZES | {"tokens": 256}
    return TextConfig(train=(str(folder / "*.txt"),), chunk=12, loss="every", **sizes)


def spans_data(folder):
    return dataclasses.replace(text_data(folder), ratio=0.5, unit="words", loss="all", buckets=(96,))


DATA = {
    "dialogue": (dialogue_data, METHOD),
    "weights": (weighted, METHOD),
    "a source twice": (twice, METHOD),
    "online": (online_data, METHOD),
    "text": (text_data, METHOD),
    "spans": (spans_data, build("sentinel")),
    "some rows repeat": (weighted, ccm.concat(comp_tokens=2, repeat=True, repeat_by="text", repeat_share=0.5)),
}


def built(config, method, folder):
    """The config with its data tokenised into a folder."""
    config = dataclasses.replace(config, tokenized=str(folder))
    tokenized.build(config, method, documents.build(config, tokenizer()), tokenizer(), VOCAB, log=lambda line: None)
    return config


def take(data, count=12):
    iterator = data.iterator(seed=5)
    return [next(iterator) for _ in range(count)]


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, take(left), take(right))


@pytest.mark.parametrize("name", DATA)
def test_the_same_batches_without_the_corpus(name, tmp_path, monkeypatch):
    make, method = DATA[name]
    # Several blocks a source, the last smaller.
    monkeypatch.setattr(tokenized, "BLOCK", 2)
    plain = make(tmp_path)
    wanted = prepare(plain, method, tokenizer(), VOCAB)
    config = built(plain, method, tmp_path / "built")
    for file in tmp_path.glob("*.*"):
        file.unlink()
    found = prepare(config, method, tokenizer(), VOCAB)
    same(found, wanted)
    assert str(found.report) == str(wanted.report) and found.parts == wanted.parts


def test_what_a_resumed_run_compares(tmp_path):
    config = built(dialogue_data(tmp_path), METHOD, tmp_path / "built")
    data = prepare(config, METHOD, tokenizer(), VOCAB)
    assert of_data(data) == of_data(prepare(config, METHOD, tokenizer(), VOCAB))
    # Shorter rows drop units.
    smaller = dataclasses.replace(config, tokens=int(data.places.max()) - 1)
    fewer = prepare(smaller, METHOD, tokenizer(), VOCAB)
    assert len(fewer.units) < len(data.units) and of_data(fewer)["tokens"] != of_data(data)["tokens"]


def test_another_method_measures_once(tmp_path, monkeypatch):
    plain = dialogue_data(tmp_path)
    config = built(plain, METHOD, tmp_path / "built")
    other = ccm.concat(comp_tokens=3)
    same(prepare(config, other, tokenizer(), VOCAB), prepare(plain, other, tokenizer(), VOCAB))
    monkeypatch.setattr(tokenized, "measured", lambda *_: pytest.fail("measured again"))
    for method in (METHOD, other):
        assert len(prepare(config, method, tokenizer(), VOCAB).units)


def test_a_unit_is_read_when_it_is_asked_for(tmp_path, monkeypatch):
    config = built(weighted(tmp_path), METHOD, tmp_path / "built")
    read, restored = [], tokenized.Unit.restored
    monkeypatch.setattr(tokenized.Unit, "restored", lambda id, arrays: (read.append(id), restored(id, arrays))[1])
    data = prepare(config, METHOD, tokenizer(), VOCAB)
    iterator = data.iterator(seed=0)
    assert not read and len(data.units) > 4
    next(iterator)
    assert len(read) == 2


def changed(**fields):
    return lambda config, folder: dataclasses.replace(config, **fields)


def without(name):
    def spoil(config, folder):
        for file in folder.rglob(name):
            file.unlink()
        return config

    return spoil


def cut(config, folder):
    (shard, *_) = sorted(folder.rglob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    return config


def flipped(config, folder):
    for shard in folder.rglob("*array_record*"):
        content = bytearray(shard.read_bytes())
        # Records stand at the front; a lost one would be a conversation that is never trained on.
        content[65536 if len(content) > 2 * 65536 else 100 : len(content) // 2] = bytes(
            len(content[65536 if len(content) > 2 * 65536 else 100 : len(content) // 2])
        )
        shard.write_bytes(content)
    return config


def later(config, folder):
    file = folder / tokenized.BUILT
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    return config


@pytest.mark.parametrize(
    "spoil, says",
    [
        (changed(tokenized="nowhere"), "nowhere does not exist; build it by python -m jax_ccm.prepare build"),
        (changed(tokenized="gs://bucket/data"), "from a folder of this machine"),
        (changed(min_turns=4), r"was built with data\.min_turns 3, but now it is 4; put that back"),
        (changed(train=("one.jsonl", "two.jsonl")), r"was built with data\.train"),
        (without(tokenized.BUILT), "was never finished; remove it"),
        (without("*array_record*"), "array_record.* is missing; remove"),
        (cut, r"array_record.* has [\d,]+ bytes of [\d,]+; remove"),
        (flipped, r"unit \d+ of .* cannot be read"),
        (later, "is of another version of jax_ccm"),
    ],
)
def test_what_cannot_be_trained_on(spoil, says, tmp_path):
    config = built(weighted(tmp_path), METHOD, tmp_path / "built")
    config = spoil(config, tmp_path / "built")
    with pytest.raises(UserError, match=says):
        take(prepare(config, METHOD, tokenizer(), VOCAB))


def test_another_tokenizer(tmp_path):
    config = built(dialogue_data(tmp_path), METHOD, tmp_path / "built")
    other = type(tokenizer()).from_pretrained(saved(tmp_path / "tokenizer"))
    prepare(config, METHOD, other, VOCAB)
    stripping = type(tokenizer()).from_pretrained(tmp_path / "tokenizer")
    stripping.backend_tokenizer.normalizer = normalizers.Lowercase()
    other.add_tokens(["hen"])
    with pytest.raises(UserError, match="was built with tokenizer"):
        prepare(config, METHOD, stripping, VOCAB)
    with pytest.raises(UserError, match="was built with tokenizer"):
        prepare(config, METHOD, other, VOCAB + 1)
    with pytest.raises(UserError, match=r"holds token id \d+, which is outside the model's vocabulary"):
        prepare(config, METHOD, tokenizer(), 60)


def saved(folder):
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda folder: FewShotConfig(train=(write(folder / "a.jsonl", []),)), "not tokenised beforehand"),
        (lambda folder: DialogueConfig(train=(write(folder / "a.jsonl", dialogues(2)),)), "no training data is left"),
        (lambda folder: DialogueConfig(train=(write(folder / "a.jsonl", [{"turns": 1}]),)), r"a\.jsonl:1: field"),
        (lambda folder: DialogueConfig(train=(str(folder / "none.jsonl"),)), "does not exist"),
    ],
)
def test_what_is_not_built(make, says, tmp_path):
    config = make(tmp_path)
    with pytest.raises(UserError, match=says):
        built(config, METHOD, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_what_became_of_the_records_is_said(tmp_path, capsys):
    config = dataclasses.replace(dialogue_data(tmp_path), tokenized=str(tmp_path / "built"))
    tokenized.build(config, METHOD, documents.build(config, tokenizer()), tokenizer(), VOCAB)
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(said) == set(config.train) and "1 with one of their turns empty" in said[config.train[0]]


def test_a_failed_build_leaves_the_folder_that_was_there(tmp_path):
    (tmp_path / "built").mkdir()
    with pytest.raises(UserError, match="no training data is left"):
        built(DialogueConfig(train=(write(tmp_path / "a.jsonl", dialogues(2)),)), METHOD, tmp_path / "built")
    assert not list((tmp_path / "built").iterdir())


def test_damaged_needs_are_measured_again(tmp_path):
    config = built(dialogue_data(tmp_path), METHOD, tmp_path / "built")
    wanted = prepare(config, METHOD, tokenizer(), VOCAB)
    (file,) = (tmp_path / "built").glob("needs-*.npy")
    whole = file.read_bytes()
    for content in (b"", whole[:40], whole[:-7], b"\0" * len(whole)):
        file.write_bytes(content)
        same(prepare(config, METHOD, tokenizer(), VOCAB), wanted)
        assert file.read_bytes() == whole


@pytest.mark.once
def test_a_run_and_its_resumption_without_the_corpus(tmp_path):
    """The same losses as from the corpus; what is validated on is read from its own files."""
    pretrained.make_base(tmp_path / "base")
    plain = pretrained.config(tmp_path)
    held_out = write(tmp_path / "held_out.jsonl", dialogues(4, 5))
    plain = dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, validation=(held_out,), tokens=160, scored=120),
        train=dataclasses.replace(plain.train, steps=2, eval_every=1),
    )
    words = pretrained.tokenizer()
    config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, tokenized=str(tmp_path / "built")))
    tokenized.build(config.data, METHOD, documents.build(config.data, words), words, len(words), log=lambda line: None)

    def losses(config, name):
        with Run(config, tmp_path / name) as run:
            run.train()
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]

    wanted = losses(plain, "plain")
    (tmp_path / "talk.jsonl").unlink()
    assert losses(config, "tokenized") == wanted
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    assert losses(longer, "tokenized")[: len(wanted)] == wanted


def test_a_folder_is_not_written_over(tmp_path):
    config = built(dialogue_data(tmp_path), METHOD, tmp_path / "built")
    with pytest.raises(UserError, match="holds tokenised data; name another, or remove it"):
        built(config, METHOD, tmp_path / "built")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        built(config, METHOD, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_the_command(tmp_path, capsys):
    save_hf(cases.model(tokens=0, rank=0, vocab_size=VOCAB), tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    save_config(pretrained.config(tmp_path), tmp_path / "mine.yaml")
    given = [str(tmp_path / "mine.yaml"), "--data.tokenized", str(tmp_path / "built")]
    command.main(["build", *given])
    said = capsys.readouterr().out
    assert "dialogues are used" in said and f"{tmp_path / 'built'}: " in said and "MiB in" in said
    assert "ownload" not in said
    (tmp_path / "talk.jsonl").unlink()
    command.main(["inspect", *given, "--count", "1"])
    assert "example 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="names no folder; add --data.tokenized DIR"):
        command.main(["build", given[0]])
