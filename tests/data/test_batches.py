"""The pipeline: same shapes, same draws after a restart, nothing lost in silence."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jax_ccm.data.batches import joined, prepare, train_iterator
from jax_ccm.data.config import DialogueConfig, OnlineConfig, RecallConfig
from jax_ccm.data.sources import Records
from jax_ccm.errors import UserError
from jax_ccm.methods import baselines, ccm
from jax_ccm.rules import rows as layout
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Kind
from tests.data.support import VOCAB, dialogues, text_of, tokenizer, write

METHOD = ccm.concat(comp_tokens=2, sink=True)


@pytest.fixture
def config(tmp_path):
    path = write(tmp_path / "train.jsonl", dialogues(*range(3, 14)))
    return DialogueConfig(train=(path,), batch_size=4, tokens=256, max_chunks=11, scored=200, loss="every", join=0.5)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def rows(batch):
    """Rows as texts, compression tokens left out."""
    return [
        text_of([t for t in row[kind > 0] if t < VOCAB])
        for row, kind in zip(batch.tokens, batch.slots.kind, strict=True)
    ]


@pytest.mark.parametrize("buckets", [(), (128,)])
def test_resumed_equals_uninterrupted(config, buckets):
    config = dataclasses.replace(config, buckets=buckets)
    data = prepare(config, METHOD, tokenizer(), VOCAB)
    iterator = data.iterator(seed=5)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = take(iterator, 6)  # into the third epoch
    resumed = prepare(config, METHOD, tokenizer(), VOCAB).iterator(seed=5)
    resumed.set_state(state)
    same(take(resumed, 6), wanted)


def test_every_mixture_has_one_shape(config):
    shapes = {
        tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch))
        for batch in take(prepare(config, METHOD, tokenizer(), VOCAB).iterator(seed=0), 8)
    }
    assert len(shapes) == 1


def test_epochs_differ_and_seeds_count(config):
    data = prepare(config, METHOD, tokenizer(), VOCAB)
    batches = take(data.iterator(seed=0), 11)  # 44 rows: four epochs of 11 dialogues
    found = sum(map(rows, batches), [])
    epochs = [found[at : at + 11] for at in range(0, 44, 11)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    compressed = [int((b.slots.kind == Kind.COMP).sum()) for b in batches]
    assert len(set(compressed)) > 1  # joined differently
    assert found != sum(map(rows, take(data.iterator(seed=1), 11)), [])
    fixed = DialogueConfig(**{**vars(config), "shuffle_seed": 0})
    same(take(prepare(fixed, METHOD, tokenizer(), VOCAB).iterator(seed=1), 3), batches[:3])


@pytest.mark.parametrize("buckets", [(), (64, 96, 128, 192)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_global_batch(config, buckets, processes):
    """The blocks of the processes are the batch that one would read, in the same order and the same bucket."""
    data = prepare(dataclasses.replace(config, buckets=buckets), METHOD, tokenizer(), VOCAB)
    iterator, count = data.iterator(seed=6), 4 // processes
    whole = take(iterator, 12)  # into the fifth epoch
    parts = [data.iterator(seed=6, rows=range(i * count, (i + 1) * count)) for i in range(processes)]
    for batch, *blocks in zip(whole, *(take(part, 12) for part in parts), strict=True):
        same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks), batch)
    assert len({batch.tokens.shape for batch in whole}) == (4 if buckets else 1)
    assert all(part.get_state() == iterator.get_state() for part in parts)


def test_a_checkpoint_of_one_process_is_read_by_two(config):
    data = prepare(config, METHOD, tokenizer(), VOCAB)
    iterator = data.iterator(seed=2)
    take(iterator, 3)
    other = data.iterator(seed=2, rows=[1, 3])
    other.set_state(json.loads(json.dumps(iterator.get_state())))
    same(next(other), jax.tree.map(lambda leaf: leaf[1::2], next(iterator)))


def test_rows_outside_the_batch(config):
    with pytest.raises(UserError, match=r"rows \[3, 4\] of a batch of data.batch_size=4; they must lie in 0..3"):
        prepare(config, METHOD, tokenizer(), VOCAB).iterator(seed=2, rows=range(3, 5))


@pytest.mark.parametrize("buckets", [(), (128,)])
def test_sources_are_drawn_by_their_weights(config, tmp_path, buckets):
    """Whatever their sizes; resumed as it would have gone on, and the same for every number of processes."""
    other = write(tmp_path / "other.jsonl", [{"turns": ["in here"] * 4}] * 3)
    mixed = dataclasses.replace(config, train=(*config.train, other), weights=(3.0, 1.0), buckets=buckets)
    data = prepare(mixed, METHOD, tokenizer(), VOCAB)
    assert data.parts == (11, 3) and data.report.kept == 14 and data.report.records == 14
    iterator = data.iterator(seed=5)
    batches = take(iterator, 40)
    drawn = [row for batch in batches for row in rows(batch)]
    assert sum("in here" in row for row in drawn) == len(drawn) // 4
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = take(iterator, 3)
    resumed = prepare(mixed, METHOD, tokenizer(), VOCAB).iterator(seed=5)
    resumed.set_state(state)
    same(take(resumed, 3), wanted)
    halves = [take(data.iterator(seed=5, rows=those), 2) for those in ((0, 1), (2, 3))]
    for number, batch in enumerate(batches[:2]):
        assert rows(batch) == [row for half in halves for row in rows(half[number])]


def test_weights_that_cannot_be(config, tmp_path):
    for weights, says in {
        (1.0,): "data.weights has 1 numbers for the 2 sources",
        (1.0, 0.0): "each must be positive",
        (1.0, float("inf")): "each must be positive",
    }.items():
        with pytest.raises(UserError, match=says):
            dataclasses.replace(config, train=(*config.train, "b.jsonl"), weights=weights)
    short = write(tmp_path / "short.jsonl", dialogues(2))
    with pytest.raises(UserError, match="data.weights: nothing of .*short.jsonl' is left .*with fewer than 3 turns"):
        prepare(
            dataclasses.replace(config, train=(*config.train, short), weights=(1.0, 1.0)), METHOD, tokenizer(), VOCAB
        )


def test_what_does_not_fit_is_counted(tmp_path):
    path = write(tmp_path / "train.jsonl", [*dialogues(3, 8, 3), {"turns": ["a", "b", "x" * 60]}, *dialogues(6)])
    lines = []
    config = DialogueConfig(train=(path,), tokens=160, max_chunks=5, scored=40, batch_size=2)
    iterator = train_iterator(config, METHOD, tokenizer(), VOCAB, seed=0, log=lines.append)
    assert lines == [
        "training data: 3 of 5 dialogues are used; dropped: 1 of more than data.max_chunks=5 chunks, "
        "1 with more than data.scored=40 scored tokens"
    ]
    take(iterator, 4)
    with pytest.raises(UserError, match="no training data is left: 0 of 5 dialogues .* 5 of more than data.tokens=20"):
        prepare(DialogueConfig(train=(path,), tokens=20), METHOD, tokenizer(), VOCAB)


def test_ids_outside_the_vocabulary(config):
    """Trap 18: no compression token in text or labels."""
    with pytest.raises(UserError, match=r"train\.jsonl:1: token id \d+ is outside .* \(0\.\.199\)"):
        prepare(config, METHOD, tokenizer(), 200)
    data = prepare(config, METHOD, tokenizer(), VOCAB)
    example = data.draw(data.units[0], np.random.default_rng(0))
    bad = Segment(np.array([VOCAB], np.int32), np.array([True]))
    for segments, says in (
        ((bad,), "outside the vocabulary"),
        ((Segment(bad.tokens[:0], bad.scored[:0]),), "is empty"),
    ):
        with pytest.raises(UserError, match=says):
            data.batch([Example(example.start[:0], example.separator, segments)])


def test_joining_needs_chunks(config):
    for method in (baselines.full(), ccm.gist(2)):
        with pytest.raises(UserError, match="data.join=0.5 has no effect with method"):
            prepare(config, method, tokenizer(), VOCAB)


def sized(*counts):
    segments = [Segment(np.full(n, 5, np.int32), np.ones(n, bool)) for n in counts]
    return Example(np.zeros(1, np.int32), np.array([7], np.int32), tuple(segments))


def test_joined():
    example, rng = sized(1, 2, 3, 4), np.random.default_rng(0)
    assert joined(example, 0.0, 0.0, rng) is example
    everything = joined(example, 1.0, 0.0, rng)
    assert [len(s.tokens) for s in everything.segments] == [1 + 1 + 2 + 1 + 3, 4]  # separators between
    whole = joined(example, 0.3, 1.0, rng)
    assert [len(s.tokens) for s in whole.segments] == [13] and whole.segments[0].scored.sum() == 10
    alone = joined(sized(4), 1.0, 1.0, rng)
    assert len(alone.segments) == 1
    patterns = {}
    for _ in range(4000):
        key = tuple(len(s.tokens) for s in joined(example, 0.25, 0.0, rng).segments)
        patterns[key] = patterns.get(key, 0) + 1
    wanted = {(1, 2, 3, 4): 0.5625, (4, 3, 4): 0.1875, (1, 6, 4): 0.1875, (8, 4): 0.0625}
    assert patterns.keys() == wanted.keys()
    assert all(abs(patterns[key] / 4000 - share) < 0.04 for key, share in wanted.items())


def test_uncompressed_rows_stand_beside_compressed_ones():
    config = RecallConfig(
        train=("generated:recall?size=64&names=20&things=20",), batch_size=32, tokens=64, max_chunks=8,
        scored=8, uncompressed=0.5,
    )  # fmt: skip
    batch = next(prepare(config, METHOD, None, 41).iterator(seed=0))
    compressed = (batch.slots.kind == Kind.COMP).sum(1)
    assert set(compressed.tolist()) == {0, 16} and 8 <= (compressed == 0).sum() <= 24
    assert (batch.weights.sum(1) == 8).all()
    assert set(batch.steps[compressed == 0].reshape(-1)) == {0}


def test_online_and_generated_questions():
    config = OnlineConfig(train=("generated:questions?size=20&turns=4-8",), batch_size=4, max_chunks=6)
    data = prepare(config, METHOD, tokenizer(), VOCAB)
    assert 0 < len(data.units) <= 20
    batch = next(data.iterator(seed=0))
    assert (batch.weights.sum(1) > 0).all()


def test_records_in_memory_are_not_changed(config):
    records = dialogues(5, 6)
    before = json.dumps(records)
    format = prepare(config, METHOD, tokenizer(), VOCAB).format
    units, _ = format.load([Records("r", records)])
    for unit in units:
        layout.batch(METHOD, [format.draw(unit, np.random.default_rng(0))], layout.Sizes(256, 22, 200), VOCAB)
    assert json.dumps(records) == before


def test_a_share_of_the_records_is_repeated(config):
    """Drawn anew in each epoch, about as often as `Method.repeat_share` says; with a share of 1 all of them."""
    repeating = lambda share: ccm.concat(comp_tokens=2, repeat=True, repeat_by="text", repeat_share=share)

    def has_one(share):
        batches = take(prepare(config, repeating(share), tokenizer(), VOCAB).iterator(seed=5), 24)
        return np.concatenate([(batch.slots.kind == Kind.REPEAT).any(axis=1) for batch in batches])

    found = has_one(0.25)
    assert 0.1 < found.mean() < 0.4 and has_one(1.0).all()
    epochs = found[: len(found) // 11 * 11].reshape(-1, 11)
    assert len({row.tobytes() for row in epochs}) > 1
