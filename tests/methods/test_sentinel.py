"""Sentinel tokens and their baselines against the specification; numbers S1 to S17 are its traps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_ccm.config.sections import OptimizerConfig
from jax_ccm.errors import UserError
from jax_ccm.evals import parity, recurrent
from jax_ccm.evals.slots import context_slots
from jax_ccm.memory import losses
from jax_ccm.methods import build
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Kind, Slots
from jax_ccm.training.step import make_optimizer, split
from tests import cases, jitted

METHOD = build("sentinel")
MODEL = cases.model(tokens=2)
EMPTY = np.zeros(0, np.int32)
# The specification's example: a <CL> b c <CR> d <CL> e f <CR> g
LENGTHS, KEPT = (3, 3, 1), (1, 1, 1)
SPEC = """\
x . . . . . . . . . .
. x . . . . . . . . .
x . x . . . . . . . .
x . x x . . . . . . .
. x x x x . . . . . .
x . . . x x . . . . .
. . . . . . x . . . .
x . . . x x . x . . .
x . . . x x . x x . .
. . . . . . x x x x .
x . . . x x . . . x x"""
POSITIONS = [0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 6]
# Where each token of the example stands in our row, which runs both sentinels when the span closes.
PLACES = [0, 3, 1, 2, 4, 5, 8, 6, 7, 9, 10]


def example(seed: int = 0, lengths=LENGTHS, kept=KEPT) -> Example:
    rng = np.random.default_rng(seed)
    segments = tuple(
        Segment(rng.integers(10, cases.VOCAB, count).astype(np.int32), np.ones(count, bool), np.arange(count) < keep)
        for count, keep in zip(lengths, kept, strict=True)
    )
    return Example(EMPTY, EMPTY, segments)


def laid_out(made: Example, method=METHOD):
    return rows.batch(method, [made], rows.measure(method, made), cases.VOCAB)


def test_mask_and_positions_of_the_specification():
    """Entry by entry: <CL> sees itself, <CR> its span and no history, later text <CR> and what is kept (S1 and S4)."""
    made = laid_out(example())
    own = visibility.visible(METHOD.rule, made.slots, made.slots)[0]
    past = visibility.visible(METHOD.rule, made.slots, made.memory.slots)[0]
    for slot, source in enumerate(made.memory.source[0]):
        own[:, source] |= past[:, slot]
    seen = own[np.ix_(PLACES, PLACES)]
    assert ["".join(row.split()) for row in SPEC.splitlines()] == [
        "".join("x" if x else "." for x in row) for row in seen
    ]
    assert made.slots.position[0, PLACES].tolist() == POSITIONS


def test_labels_skip_sentinels():
    """The token behind a span is predicted by the last one in it; no sentinel is a target or predicts (S2, S3, S5)."""
    made = laid_out(example())
    tokens = np.concatenate([segment.tokens for segment in example().segments])
    assert made.targets[0].tolist() == tokens[1:].tolist()
    assert [PLACES.index(place) for place in made.indices[0]] == [0, 2, 3, 5, 7, 8]


@pytest.mark.parametrize("shift, sure", [(-1, False), (0, True), (1, False)])
def test_an_oracle_loses_nothing(shift, sure):
    """Logits that are sure of the text token behind each text token have no loss, and only they (S3)."""
    made = laid_out(example())
    following = np.zeros(made.tokens.shape[1], np.int32)
    text = np.flatnonzero(made.tokens[0] < cases.VOCAB)
    following[text] = np.roll(made.tokens[0, text], -1 + shift)
    table = np.eye(cases.VOCAB, dtype=np.float32)
    hidden = 40.0 * table[following][made.indices]
    found = jax.jit(losses.token_losses, static_argnums=0)("vd", hidden, table, made.targets)
    assert (found.max() < 1e-6) == sure and (found.min() > 1) == (not sure)


def test_positions_at_the_start():
    """A span that opens the text: <CL> stands at position 0, together with the first token."""
    made = laid_out(example(lengths=(2, 1), kept=(0, 1)))
    assert made.slots.position[0].tolist() == [0, 1, 0, 1, 2]


def states(seed_before: int):
    """Keys and values of both sentinels of the second span, for different text before it."""
    before = example(seed_before).segments[0]
    made = dataclasses.replace(example(), segments=(before, *example().segments[1:]))
    cache = recurrent.cache_for(MODEL, METHOD, [made])
    for segment in made.segments[:-1]:
        chunk = rows.chunk([segment.tokens], 3, cases.VOCAB)
        cache = jitted.compress_step(MODEL, cache, dataclasses.replace(chunk, kept=segment.kept[None]), method=METHOD)
    kinds = np.asarray(cache.slots.kind[0])
    return np.asarray(cache.v)[:, 0, np.flatnonzero(kinds == Kind.MEMORY)[1]], kinds


def test_cr_sees_no_history():
    """The second span's state depends on earlier text from the third layer on, through the span's own states (S1)."""
    first, kinds = states(0)
    other, _ = states(7)
    change = np.abs(first - other).reshape(3, -1).max(axis=1)
    assert change[0] < 1e-6 and change[1] < 1e-6 and change[2] > 1e-3
    assert (kinds[:4] == [Kind.QUERY, Kind.MEMORY, Kind.QUERY, Kind.MEMORY]).all() and not kinds[4:].any()


def test_live_slots():
    """Slots after each span: 3 -> 2, then 5 -> 4, as the specification's lazy trace has it."""
    made = example()
    cache = recurrent.cache_for(MODEL, METHOD, [made])
    trace = []
    for segment in made.segments[:-1]:
        chunk = rows.chunk([segment.tokens], 3, cases.VOCAB)
        cache, _ = jitted.read(MODEL, cache, dataclasses.replace(chunk, kept=segment.kept[None]), method=METHOD)
        trace.append(int(cache.slots.live.sum()))
        cache = jitted.compress(MODEL, cache, method=METHOD)
        trace.append(int(cache.slots.live.sum()))
    assert trace == [3, 2, 5, 4]
    assert context_slots(METHOD, made) == 4


def test_lora_is_unconditional():
    """Text without spans is changed by the LoRA, unless it is made conditional (S10)."""
    plain = example(lengths=(5,), kept=(5,))
    logits = lambda method: parity.parallel_logits(MODEL, method, [plain])[0]
    base = logits(dataclasses.replace(METHOD, gate=()))
    assert np.abs(logits(METHOD) - base).max() > 1e-3
    assert np.array_equal(logits(build("sentinel", conditional=True)), base)


def test_only_attention_is_adapted():
    """Four kernels a layer, and two rows (S9)."""
    adapter = nnx.to_pure_dict(nnx.state(MODEL, nnx.LoRAParam))
    assert set(adapter["layers"]) == {"self_attn"}
    assert sum(x.shape[0] for x in jax.tree.leaves(adapter["embed_tokens"])) == METHOD.num_embeddings == 2


def test_weight_decay_leaves_the_vocabulary_alone():
    """Decay and Adam's state touch the two new rows, which are a table of their own, and no old one (S11)."""
    graphdef, params, frozen = split(MODEL, "adapter")
    assert set(params["embed_tokens"]) == {"comp"} and set(frozen["embed_tokens"]) == {"embedding"}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), optax.constant_schedule(1e-2))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = nnx.merge(graphdef, optax.apply_updates(params, updates), frozen).embed_tokens
    old = MODEL.embed_tokens
    np.testing.assert_array_equal(new.embedding[...], old.embedding[...])
    assert (np.asarray(new.comp[...]) != old.comp[...]).all()


def test_opener_is_a_constant():
    """<CL> sees only itself: the same values in every layer whatever stands around it, and one for every span.

    So nothing is gained by keeping it in the cache: it rides in the pass that runs <CR>, when the span closes.
    """
    made = [laid_out(example(seed)) for seed in (0, 7)]
    run = jax.jit(
        lambda m: MODEL(m.tokens, m.slots, visibility.gate(METHOD, m.slots), rule=METHOD.rule, memory=m.memory)[1][1]
    )
    states = [run(m)[:, 0] for m in made]
    opener = np.flatnonzero(made[0].slots.kind[0] == Kind.OPEN)
    values = np.stack([np.asarray(x)[:, opener] for x in states])
    assert values.shape[:3] == (2, cases.CONFIG.num_layers, 2)
    np.testing.assert_allclose(values, np.broadcast_to(values[:1, :, :1], values.shape), atol=1e-6)


@pytest.mark.parametrize(
    "lengths, kept, message",
    [((3, 1), [[0, 1, 0]], "keeps text behind its span"), ((2, 1), [[1, 1]], "keeps all of its text")],
)
def test_segments_that_are_no_span(lengths, kept, message):
    made = example(lengths=lengths, kept=(0,) * len(lengths))
    head = dataclasses.replace(made.segments[0], kept=np.array(kept[0], bool))
    with pytest.raises(UserError, match=message):
        laid_out(dataclasses.replace(made, segments=(head, *made.segments[1:])))


def test_methods_that_keep_nothing_refuse_kept_text():
    for method in (build("ccm_concat"), build("loma", ratio=3, memory_tokens=1)):
        with pytest.raises(UserError, match="keeps none"):
            laid_out(example(), method)


def slots_of(kind, positions) -> Slots:
    place = np.arange(len(positions))[None]
    return Slots(
        np.full_like(place, kind) if isinstance(kind, Kind) else np.asarray(kind)[None], 0 * place, place, place
    )


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_local_window_is_an_exact_fraction(ratio):
    """Token j sees k from floor(j r) on, exactly; float64 is one too small at three places for 0.7 (S13)."""
    slots = slots_of(Kind.TEXT, range(256))
    seen = visibility.visible(build("local", hidden=ratio).rule, slots, slots)[0]
    queries = np.arange(256)
    first = queries * round(ratio * 10) // 10
    keys = np.arange(256)
    np.testing.assert_array_equal(seen, (keys[None] <= queries[:, None]) & (keys[None] >= first[:, None]))
    floats = np.floor(queries * ratio).astype(int)
    assert np.flatnonzero(floats != first).tolist() == ([90, 170, 180] if ratio == 0.7 else [])


def test_local_window_far_out():
    """No overflow of int32 in long texts."""
    far = np.int32(2_000_000_000)
    assert visibility.first_seen(far, (300, 1000)) == 600_000_000


def test_scattered_columns_are_constant():
    """One keep vector for all queries, and each token sees itself (S14)."""
    keep = np.random.default_rng(0).random(40) < 0.4
    slots = slots_of(np.where(keep, Kind.QUERY, Kind.TEXT), range(40))
    seen = visibility.visible(build("scattered").rule, slots, slots)[0]
    lower = np.tril(np.ones((40, 40), bool), -1)
    np.testing.assert_array_equal(seen & lower, lower & keep)
    assert seen.diagonal().all() and not np.triu(seen, 1).any()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
def test_ratio_outside_its_range(ratio):
    with pytest.raises(UserError, match=rf"hidden is {ratio}; it must lie in \(0, 1\)"):
        build("local", hidden=ratio)


@pytest.mark.parametrize("ratio", [0.12345, 0.0001, 0.9999])
def test_ratio_that_has_no_exact_edge(ratio):
    """A share is never rounded in silence."""
    with pytest.raises(UserError, match=f"hidden is {ratio}; .* at most three decimal places"):
        build("local", hidden=ratio)
