"""Options of CCM that are in no paper: one adapter for several numbers of compression tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jax_ccm.data.batches import prepare
from jax_ccm.data.config import DialogueConfig
from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.labels import closing_tokens
from jax_ccm.memory.starts import starts_of_row, starts_of_session
from jax_ccm.methods import build
from jax_ccm.nn import Transformer
from jax_ccm.rules import rows
from jax_ccm.rules.describe import describe_method
from jax_ccm.rules.mixtures import Mean
from jax_ccm.rules.types import Chunk, Kind
from jax_ccm.rules.visibility import gate
from jax_ccm.weights.adapters import Adapter, load_adapter
from jax_ccm.weights.identity import check_method
from tests import cases, jitted
from tests.data.support import VOCAB, dialogues, tokenizer, write


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge", "ccm_ema"])
def test_rows_of_different_ratios(name):
    """Rows of one batch that close chunks with 1, 2 and 3 tokens compute what the methods of 1, 2 and 3 tokens do."""
    model, sessions = cases.model(tokens=3), cases.sessions()
    mixed = [dataclasses.replace(session, num_comp_tokens=1 + i) for i, session in enumerate(sessions)]
    together = parity.parallel_logits(model, build(name, comp_tokens=3, min_comp_tokens=1), mixed)
    for i, session in enumerate(sessions):
        alone = parity.recurrent_logits(model, build(name, comp_tokens=1 + i), [session])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


def test_training_draws_ratios(tmp_path):
    """Every number from the fewest to all is drawn, in shapes that do not change."""
    method = build("ccm_concat", comp_tokens=4, min_comp_tokens=2)
    path = write(tmp_path / "d.jsonl", dialogues(6, 5, 7))
    data = prepare(
        DialogueConfig(train=(str(path),), tokens=256, max_chunks=6, loss="every"), method, tokenizer(), VOCAB
    )
    counts, shapes = set(), set()
    for batch, _ in zip(data.iterator(seed=0), range(6), strict=False):
        shapes.add((batch.tokens.shape, batch.memory.slots.kind.shape))
        for kinds, segments in zip(batch.slots.kind, batch.slots.segment, strict=True):
            counts |= set(np.bincount(segments[kinds == Kind.COMP]).tolist())
    assert counts == {2, 3, 4} and len(shapes) == 1


def test_one_adapter_serves_them(tmp_path):
    """Loaded for fewer tokens an adapter has their rows only; for fewer than it was trained for it is refused."""
    trained, model = build("ccm_merge", comp_tokens=3, min_comp_tokens=2), cases.model(tokens=3)
    path = Adapter.of(model, method=trained, base="tiny").write(tmp_path / "a")
    base = Transformer(jax.random.key(0), cases.CONFIG)
    sessions = cases.sessions()
    for count in (2, 3):
        method = build("ccm_merge", comp_tokens=count)
        served = load_adapter(path, base, method=method, base="tiny")
        assert served.embed_tokens.comp[...].shape[0] == count
        ours, theirs = (parity.parallel_logits(m, method, sessions) for m in (served, model))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    for options in (dict(comp_tokens=1), dict(comp_tokens=4), dict(comp_tokens=2, sink=True)):
        with pytest.raises(UserError, match="was trained for the method"):
            load_adapter(path, base, method=build("ccm_merge", **options), base="tiny")


def test_slots_by_the_length_of_a_chunk():
    method = build("ccm_concat", comp_tokens=3, sink=True, ratio=4)
    assert [int(method.num_closing(np.array(c))) for c in (0, 1, 4, 5, 8, 9, 40)] == [0, 1, 1, 2, 2, 3, 3]
    assert method.memory_slots(2, tokens=5) == 4 and method.memory_slots(2) == 6
    # Rows of any lengths fit into sizes by bound, which is less than three slots a chunk.
    sessions = cases.sessions(((1, 9, 4), (12, 2)))
    sizes = rows.bound(method, 40, 2, 40)
    assert rows.batch(method, sessions, sizes, cases.VOCAB).tokens.shape == (2, sizes.tokens)
    assert rows.bound(method, 12, 4, 12).memory == 7
    # What is kept is not compressed, and asks for no slots.
    kept = dataclasses.replace(sessions[0], start=np.arange(30, 50, dtype=np.int32), keeps_start=True)
    assert rows.measure(method, kept).memory == 1 + 3
    for name, options, message in (
        ("ccm_concat", {"ratio": -1}, "ratio is -1; it must be at least 1"),
        ("ccm_merge", {"ratio": 2}, "unknown option of method 'ccm_merge'"),
        ("ccm_concat", {"positions": "spread"}, "positions is 'spread'; allowed: sequential, stride"),
        ("ccm_concat", {"positions": "stride"}, "which needs a ratio"),
        ("ccm_concat", {"positions": "stride", "ratio": 2, "streaming": True}, "and no streaming"),
        ("ccm_concat", {"ratio": 2, "sight": "share"}, "only tokens at positions 'stride' have one"),
        ("ccm_concat", {"ratio": 2, "sight": "all"}, "sight is 'all'; allowed: chunk, share"),
    ):
        with pytest.raises(UserError, match=message):
            build(name, **options)
    for fields in ({"mix": Mean()}, {"ratio": 0}, {"closes": ()}, {"writes": (Kind.OPEN,)}):
        with pytest.raises(ValueError, match="must be at least 1, and goes with"):
            dataclasses.replace(method, **fields)


@pytest.mark.parametrize(
    "name, options, shares",
    [
        ("ccm_concat", dict(comp_tokens=3, ratio=2, positions="stride"), [(0, 2), (2, 4), (4, 5)]),
        # The sink is nobody's text.
        ("ccm_concat", dict(comp_tokens=3, ratio=2, positions="stride", sink=True), [(1, 3), (3, 5)]),
        # The last stands at the end of a chunk that is longer than all shares.
        ("ccm_concat", dict(comp_tokens=2, ratio=2, positions="stride"), [(0, 2), (3, 5)]),
        ("ccm_concat", dict(comp_tokens=2), [(0, 5), (0, 5)]),
        ("ccm_merge", dict(comp_tokens=2), [(0, 5), (0, 5)]),
        ("ccm_ema", dict(comp_tokens=1), [(0, 5)]),
        ("gist", dict(comp_tokens=1), [(0, 5)]),
        ("loma", dict(ratio=2, memory_tokens=2, repeat=False), [(0, 2), (2, 4)]),
        ("loma", dict(ratio=2, memory_tokens=2, repeat=False, positions="sequential"), [(0, 4), (0, 4)]),
        ("sentinel", dict(opener=False), [(0, 5)]),
    ],
)
def test_slots_start_from_the_mean_of_their_text(name, options, shares):
    """By both roads a compression token begins as its own embedding and the mean of those of its share."""
    method, size = build(name, start="mean", **options), max(end for _, end in shares)
    (session,) = cases.sessions(((size, 3),), start=0, separator=0)
    model = cases.model(tokens=method.num_embeddings)
    pieces = rows.arrange(method, session)
    words = np.asarray(model.embed_tokens.embedding[...])[pieces[0].tokens]
    expected = np.stack([words[a:b].mean(axis=0) for a, b in shares])
    made = rows.batch(method, [session], rows.measure(method, session), cases.VOCAB)
    found = np.asarray(starts_of_row(model, made, method))[0]
    comp = np.asarray(made.slots.kind)[0] == Kind.COMP
    np.testing.assert_allclose(found[comp], expected, atol=1e-6)
    assert not found[~comp].any()
    embedded = np.asarray(model.embed_tokens(made.tokens, found[None]))[0, comp]
    np.testing.assert_allclose(embedded, expected + model.embed_tokens.comp[...], atol=1e-6)
    # Closed with text of the next chunk behind it, which nothing starts from.
    words = np.concatenate([piece.tokens for piece in pieces])[None].astype(np.int32)
    text = Chunk(words, np.ones(words.shape, bool))
    cache = init_cache(model, method, 1, memory_capacity=6, raw_capacity=12)
    cache, _ = jitted.read(model, cache, text, method=method)
    chosen = np.arange(cache.slots.kind.shape[1])[None] < size
    assert np.asarray(cache.ids)[0, : size + 3].tolist() == text.tokens[0].tolist()
    closing, _ = closing_tokens(cache, chosen, np.ones(1, bool), method)
    closed_alone = np.asarray(starts_of_session(model, cache, closing, chosen, method))
    np.testing.assert_allclose(closed_alone[0, : len(shares)], expected, atol=1e-6)
    with pytest.raises(UserError, match="start is 'zero'; allowed: learned, mean"):
        build(name, **options, start="zero")
    with pytest.raises(ValueError, match="nothing starts from text"):
        dataclasses.replace(method, closes=(), ratio=None)


def test_an_adapter_for_any_number_serves_any_ratio():
    stored = describe_method(build("ccm_concat", comp_tokens=3, min_comp_tokens=1))
    check_method(stored, build("ccm_concat", comp_tokens=3, ratio=4), "x")
    check_method(stored, build("ccm_concat", comp_tokens=2, ratio=4), "x")
    for trained in (dict(comp_tokens=3, min_comp_tokens=2), dict(comp_tokens=3), dict(comp_tokens=3, ratio=2)):
        with pytest.raises(UserError, match="ratio: .* there, 4 here"):
            check_method(
                describe_method(build("ccm_concat", **trained)), build("ccm_concat", comp_tokens=3, ratio=4), "x"
            )


def test_tokens_that_are_one_token_serve_any_ratio():
    spread: dict[str, Any] = dict(positions="stride", sight="share", start="mean", sink=True)
    stored = describe_method(build("ccm_concat", comp_tokens=24, ratio=6, **spread))
    for comp_tokens, ratio in ((36, 4), (24, 12), (1, 1), (3, 6)):
        check_method(stored, build("ccm_concat", comp_tokens=comp_tokens, ratio=ratio, **spread), "x")
    for changed, differs in (
        (dict(start="learned"), "starts_from"), (dict(sight="chunk"), "sees"), (dict(sink=False), "sink"),
        (dict(positions="sequential", sight="chunk"), "closes"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=differs):
            check_method(stored, build("ccm_concat", comp_tokens=36, ratio=4, **spread | changed), "x")


@pytest.mark.parametrize("min_comp_tokens", [0, 3])
def test_min_comp_tokens_out_of_range(min_comp_tokens):
    with pytest.raises(
        UserError, match=f"min_comp_tokens is {min_comp_tokens}; it must lie between 1 and comp_tokens=2"
    ):
        build("ccm_concat", comp_tokens=2, min_comp_tokens=min_comp_tokens)


def test_sizes_follow():
    (session,) = cases.sessions(((3, 3, 1),))
    method = build("ccm_concat", comp_tokens=4, min_comp_tokens=1)
    sizes = [rows.measure(method, dataclasses.replace(session, num_comp_tokens=count)) for count in (1, 4, None)]
    assert [s.memory for s in sizes] == [2, 8, 8] and sizes[0].tokens + 6 == sizes[1].tokens == sizes[2].tokens


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge", "ccm_ema"])
def test_repetition_by_the_base_alone(name):
    """The LoRA does nothing to repetition tokens then; on compression tokens, and so in what text reads, it does."""
    gated, alone = (build(name, comp_tokens=2, repeat=True, repeat_gated=given) for given in (True, False))
    assert gated.rule == alone.rule and dataclasses.replace(alone, gate=gated.gate) == gated
    examples = cases.sessions()
    made = rows.batch(alone, examples, rows.Sizes(96, 16, 64), cases.VOCAB)
    kind = np.asarray(made.slots.kind)
    acts = {method: np.asarray(gate(method, made.slots)) > 0 for method in (gated, alone)}
    assert (kind == Kind.REPEAT).any() and not acts[alone][kind == Kind.REPEAT].any()
    assert acts[gated][kind == Kind.REPEAT].all() and acts[alone][kind == Kind.COMP].all()
    with pytest.raises(UserError, match="repeat_gated False, but repeat is false"):
        build(name, repeat_gated=False)
