"""Compressive Transformer: what is pooled, and when."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jax_ccm.data.batches import prepare
from jax_ccm.data.config import DialogueConfig
from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.evals.slots import context_slots
from jax_ccm.memory.cache import check, init_cache
from jax_ccm.methods import build
from jax_ccm.rules import rows
from jax_ccm.rules.draw import draw
from jax_ccm.rules.types import Kind, Method, Rule
from tests import cases
from tests.data.support import VOCAB, dialogues, tokenizer, write

MODEL = cases.model()


def closed(method, lengths, **options):
    """The state after chunks of these lengths, and the keys and values of each chunk's text before it was closed."""
    cache = init_cache(MODEL, method, 1, **dict(memory_capacity=16, raw_capacity=16) | options)
    rng, raw = np.random.default_rng(0), []
    for number, length in enumerate(lengths):
        chunk = rows.chunk([rng.integers(10, 90, length)], 8, cases.VOCAB)
        cache, _ = parity._read(MODEL, cache, chunk, method=method, query=False)
        own = (np.asarray(cache.slots.segment[0]) == number) & np.isin(cache.slots.kind[0], [Kind.TEXT])
        raw.append([np.asarray(x)[:, 0, own] for x in (cache.k, cache.v)])
        cache = parity._compress(MODEL, cache, chunk.valid.any(1), method=method)
    return cache, raw


def test_drawn_mask():
    """Own segment and the one before as they are, older ones through their means."""
    assert (
        draw(build("compressive", ratio=2), (3, 1, 1)).splitlines()
        == """\
  a b c d e | M1 M1 M2   position
a x . . . . | .  .  .    0
b x x . . . | .  .  .    1
c x x x . . | .  .  .    2
d x x x x . | .  .  .    3
e . . . x x | x  x  .    4""".splitlines()
    )


@pytest.mark.parametrize("recent", [0, 1])
def test_memory_is_a_mean(recent):
    """Each slot is the mean of c neighbours of one chunk, keys as they were rotated; a rest makes a slot, too."""
    cache, raw = closed(build("compressive", ratio=3, recent=recent), (5, 3, 4))
    kinds = np.asarray(cache.slots.kind[0])
    groups = [(0, 0, 3), (0, 3, 5), (1, 0, 3), (2, 0, 3), (2, 3, 4)][: 5 if recent == 0 else 3]
    assert (kinds == Kind.MEMORY).sum() == len(groups) and (kinds == Kind.TEXT).sum() == 4 * recent
    for x, array in enumerate((cache.k, cache.v)):
        expected = np.stack([raw[chunk][x][:, first:last].mean(1) for chunk, first, last in groups], 1)
        np.testing.assert_allclose(np.asarray(array)[:, 0, kinds == Kind.MEMORY], expected, atol=1e-5)
    assert cache.slots.segment[0][: len(groups)].tolist() == [chunk for chunk, _, _ in groups]


def test_first_in_first_out():
    """At capacity the oldest slots go; without leave to evict the session is invalid."""
    method = build("compressive", ratio=2, recent=0, sink=True)
    whole, _ = closed(method, (5, 4, 4, 3))
    cache, _ = closed(method, (5, 4, 4, 3), memory_capacity=3, overflow="evict")
    of = lambda cache: np.asarray(cache.slots.position[0])[np.asarray(cache.slots.kind[0]) == Kind.MEMORY].tolist()
    assert of(whole) == [2, 4, 6, 8, 10, 12, 14, 15] and of(cache) == [12, 14, 15]
    assert cache.slots.kind[0, 0] == Kind.SINK
    check(cache)
    with pytest.raises(UserError, match="larger memory_capacity"):
        check(closed(method, (5, 4, 4, 3), memory_capacity=3)[0])


def test_sizes_hold_every_row():
    """The bound for a row is never below what it needs, and the slots are those that a session then holds."""
    for ratio, recent, sink in ((1, 0, False), (3, 1, True), (4, 0, True), (7, 2, False)):
        method = build("compressive", ratio=ratio, recent=recent, sink=sink)
        for session in cases.sessions(((5, 1, 7, 2), (1, 1, 1, 1, 1), (9, 3))):
            needs = rows.measure(method, session)
            text = sum(len(segment.tokens) for segment in rows.arrange(method, session))
            assert needs.memory <= rows.bound(method, text, len(session.segments) - 1, text).memory
            made = rows.batch(method, [session], needs, cases.VOCAB)
            assert made.memory.slots.live.sum() == needs.memory
            np.testing.assert_allclose(made.memory.share.reshape(needs.memory, ratio).sum(1), 1, atol=1e-6)
            if recent == 0:
                assert context_slots(method, session) == needs.memory + method.sink


def test_training_batches_keep_their_shape(tmp_path):
    """Turns of any lengths, joined or not: one shape, and no slot without its full share."""
    path = write(tmp_path / "d.jsonl", dialogues(5, 6, 7, 8))
    config = DialogueConfig(train=(path,), tokens=256, max_chunks=6, scored=200, loss="every", join=0.5, batch_size=4)
    data = prepare(config, build("compressive", ratio=4, sink=True), tokenizer(), VOCAB)
    shapes, slots = set(), set()
    for made, _ in zip(data.iterator(seed=0), range(5), strict=False):
        shapes.add((made.memory.source.shape, made.memory.slots.kind.shape))
        shares = made.memory.share.reshape(*made.memory.slots.kind.shape, 4).sum(2)
        np.testing.assert_allclose(shares, made.memory.slots.live, atol=1e-6)
        slots |= set(made.memory.slots.live.sum(1).tolist())
    assert len(shapes) == 1 and len(slots) > 3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ratio=0), "ratio is 0"),
        (dict(recent=-1), "recent is -1"),
        (dict(ratio=4, segment=6), "segment is 6; it must be a multiple of ratio=4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        build("compressive", **options)


def test_pooling_excludes_what_runs_tokens():
    with pytest.raises(ValueError, match="pool=2 .* none of closes, mix and eviction"):
        dataclasses.replace(build("ccm_concat"), pool=2)
    with pytest.raises(ValueError, match="pool=0"):
        Method(name="m", rule=Rule(()), pool=0)
