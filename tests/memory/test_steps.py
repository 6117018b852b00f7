"""The parallel forward and the recurrence compute the same function, for every method of the table."""

from __future__ import annotations

import dataclasses
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_ccm.attention import dispatch
from jax_ccm.errors import UserError
from jax_ccm.evals import parity, recurrent
from jax_ccm.evals.slots import context_slots
from jax_ccm.memory import cache as memory
from jax_ccm.memory import steps
from jax_ccm.methods import METHODS, build
from jax_ccm.nn.config import PROJECTIONS
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Chunk, Kind
from tests import cases

MODEL = cases.model(tokens=3, targets=cases.ALL)
SHALLOW = cases.model(tokens=3, num_layers=1)
EMPTY = np.zeros(0, np.int32)
TABLE = cases.METHODS | cases.RECURRENT
# One of each name, and of each way to write and to forget.
FEW = (*cases.EACH, "compressive_now_sink", "streaming_llm", "evict")
REMEMBERS = {name: method for name, method in cases.METHODS.items() if method.remembers}


@pytest.fixture(autouse=True, scope="module")
def parts():
    """Rows as short as these are cut into parts, too, as long ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "PART", 6)
        yield


def gap(ours, theirs) -> float:
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", cases.METHODS)
def test_parallel_is_recurrent(name):
    """Same logits for ragged sessions of 1 to 4 chunks (trap 2), and the memory matters."""
    method = cases.METHODS[name]
    sessions = cases.sessions_for(method)
    parallel = parity.parallel_logits(MODEL, method, sessions)
    recurrent = parity.recurrent_logits(MODEL, method, sessions)
    assert gap(parallel, recurrent) < 1e-5
    if method.remembers:
        without = parity.parallel_logits(MODEL, method, sessions, with_memory=False)
        assert gap(parallel, without) > 0.05


KEEPS_BEGINNING = {name: method for name, method in TABLE.items() if method.kept_kind is Kind.SINK}


@pytest.mark.parametrize("name", [n for n in KEEPS_BEGINNING if n in cases.METHODS])
def test_a_system_message_stays(name):
    """The same logits in parallel and as a recurrence behind system messages of any length, which matter to the end."""
    method = KEEPS_BEGINNING[name]
    long, none, short = (
        dataclasses.replace(session, start=np.arange(5, 5 + size, dtype=np.int32), keeps_start=True)
        for session, size in zip(cases.sessions(start=0), (7, 0, 2), strict=True)
    )
    sessions = [long, none, short]
    recurrent = parity.recurrent_logits(MODEL, method, sessions)
    assert gap(parity.parallel_logits(MODEL, method, sessions), recurrent) < 1e-5
    other = dataclasses.replace(long, start=long.start[::-1])
    assert np.abs(parity.recurrent_logits(MODEL, method, [other])[0][-1] - recurrent[0][-1]).max() > 0.01
    plain = dataclasses.replace(long, keeps_start=False)
    assert context_slots(method, long) > context_slots(method, plain)


def test_text_can_be_kept_at_the_beginning_alone():
    method = build("ccm_concat", sink=True)
    cache = memory.init_cache(MODEL, method, 3, memory_capacity=4, raw_capacity=16)
    kept = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    chunk = Chunk(np.full((3, 4), 7), np.ones((3, 4), bool), kept)
    read, _ = steps.read(MODEL, cache, chunk, method=method)
    assert read.spoiled.tolist() == [False, True, False]
    assert read.slots.kind[0, :4].tolist() == [Kind.SINK, Kind.SINK, Kind.TEXT, Kind.TEXT]
    again, _ = steps.read(MODEL, steps.compress(MODEL, read, method=method), chunk, method=method)
    assert again.spoiled.tolist() == [True, True, False]
    with pytest.raises(UserError, match="text was to be kept behind other text"):
        memory.check(again)
    for name, options in (("ccm_concat", {}), ("loma", dict(ratio=2, memory_tokens=2, sink=True)), ("none", {})):
        other = build(name, **options)
        cache = memory.init_cache(MODEL, other, 3, memory_capacity=4, raw_capacity=16)
        with pytest.raises(UserError, match="keeps none; with method.sink: true"):
            steps.read(MODEL, cache, chunk, method=other)


def test_every_method_is_in_the_table():
    """What is in `METHODS` is put to the common tests; one of each name to those that take long."""
    assert {method.name for method in TABLE.values()} == set(METHODS)
    assert {cases.METHODS[name].name for name in cases.EACH} | {"streaming_llm", "evict"} == set(METHODS)
    assert all(method.recurrent_only for method in cases.RECURRENT.values())


@pytest.mark.parametrize(
    "name", [n if n in cases.EACH else pytest.param(n, marks=pytest.mark.slow) for n in cases.METHODS]
)
def test_gradients_are_equal(name):
    """Adapter gradients through both; gradients reach the earliest chunk (no stop-gradient anywhere)."""
    method = cases.METHODS[name]
    sessions = cases.sessions_for(method)
    loss, ours = parity.parallel_gradients(MODEL, method, sessions)
    other, theirs = parity.recurrent_gradients(MODEL, method, sessions)
    assert loss == pytest.approx(other, abs=1e-5)
    assert parity.gradient_gap(ours, theirs) < 1e-5
    # Stacks of the LoRA; the table of embeddings has two axes, and a method may use none of it.
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(ours) if x.ndim == 3)


def sessions_for(name):
    method = dataclasses.replace(cases.METHODS[name], repeat=None)
    return method, cases.sessions_for(method)


@pytest.mark.parametrize("name", cases.EACH)
def test_padding_and_batch_change_nothing(name):
    """Left or right padding, more padding, and the company of other rows (traps 2 and 16: validity is explicit)."""
    method, sessions = sessions_for(name)
    expected = parity.parallel_logits(MODEL, method, sessions)
    sizes = recurrent.caps_for(method, sessions)
    wide = rows.Sizes(sizes.tokens + 7, sizes.memory + 6 * method.remembers, sizes.scored + 3)

    def check(sessions, sizes, expected, pad="right"):
        made = rows.batch(method, sessions, sizes, cases.VOCAB, pad=pad)
        logits = np.asarray(parity._parallel(MODEL, made, method=method))
        assert gap([row[w > 0] for row, w in zip(logits, made.weights, strict=True)], expected) < 1e-5

    check(sessions, wide, expected)
    check(sessions, wide, expected, pad="left")
    for session, row in zip(sessions, expected, strict=True):
        check([session], sizes, [row])


@pytest.mark.parametrize("name", [*cases.EACH, "streaming_llm", "evict"])
def test_padding_and_batch_change_no_recurrence(name):
    """Tokens at either end of a chunk, and other rows beside it."""
    method = dataclasses.replace(TABLE[name], repeat=None)
    sessions = cases.sessions_for(method)
    right, cache = _tail(method, sessions)
    left, moved = _tail(method, sessions, arrange=_left)
    assert np.abs(left - right).max() < 1e-5
    for logits in (cache.logits, moved.logits):
        assert np.abs(np.asarray(logits) - right).max() < 1e-5, "pending logits are those of the last text token"
    others, _ = _tail(method, [sessions[0], *cases.sessions_for(method, seed=1)[1:]])
    assert np.abs(others[0] - right[0]).max() < 1e-5 < np.abs(others[1:] - right[1:]).max()


def _left(chunk: Chunk) -> Chunk:
    """The chunk with its tokens at the right end."""
    shift = lambda x: np.stack([np.roll(row, -count) for row, count in zip(x, chunk.valid.sum(1), strict=True)])
    return jax.tree.map(shift, chunk)


def _tail(method, sessions, arrange=lambda chunk: chunk):
    """Logits after the last token of each row, by the recurrence, and the cache."""
    stream = recurrent.stream(method, sessions)
    cache = recurrent.cache_for(MODEL, method, sessions)
    for t in range(stream.context.tokens.shape[0]):
        chunk = arrange(jax.tree.map(operator.itemgetter(t), stream.context))
        cache, _ = parity._read(MODEL, cache, chunk, method=method, query=False)
        cache = parity._compress(MODEL, cache, chunk.valid.any(1), method=method)
    tail = arrange(stream.tail)
    cache, logits = parity._read(MODEL, cache, tail, method=method, query=True)
    place = np.arange(tail.valid.shape[1])
    last = np.where(tail.valid, place, -1).max(1)
    return np.asarray(logits)[np.arange(len(last)), last], cache


@pytest.mark.parametrize("name", ["concat_n1", "merge_n2_sink", "ema_n1"])
def test_scan_is_loop(name):
    """`compress_scan` over chunks, and reading a chunk in pieces, give the state of the loop."""
    method, sessions = sessions_for(name)
    stream = recurrent.stream(method, sessions)
    cache = recurrent.cache_for(MODEL, method, sessions)
    scanned = jax.jit(steps.compress_scan, static_argnames="method")(MODEL, cache, stream.context, method=method)
    for t in range(stream.context.tokens.shape[0]):
        chunk = jax.tree.map(operator.itemgetter(t), stream.context)
        for column in range(chunk.tokens.shape[1]):
            piece = Chunk(chunk.tokens[:, column : column + 1], chunk.valid[:, column : column + 1])
            cache, _ = parity._read(MODEL, cache, piece, method=method, query=False)
        cache = parity._compress(MODEL, cache, chunk.valid.any(1), method=method)
    chex.assert_trees_all_close(scanned, cache, atol=1e-5)
    chex.assert_trees_all_equal(scanned.slots, cache.slots)


def test_text_is_bit_equal_with_the_adapter_on():
    """The conditional LoRA leaves text alone where no memory is read (trap 4's other half)."""
    method = build("ccm_concat", comp_tokens=2)
    text = Example(np.array([1]), np.array([], np.int32), (Segment(np.arange(10, 20), np.ones(10, bool)),))
    with_adapter = parity.parallel_logits(MODEL, method, [text])
    without = parity.parallel_logits(cases.model(tokens=3, rank=0), method, [text])
    plain = dataclasses.replace(method, gate=())
    assert np.array_equal(with_adapter[0], parity.parallel_logits(MODEL, plain, [text])[0])
    assert np.array_equal(with_adapter[0], without[0])
    everywhere = build("ccm_concat", comp_tokens=2, conditional=False)
    assert not np.array_equal(with_adapter[0], parity.parallel_logits(MODEL, everywhere, [text])[0])


@pytest.mark.parametrize("zeroed", PROJECTIONS)
def test_the_gate_holds_in_all_projections(zeroed):
    """Each projection of attention and MLP has its LoRA in effect on compression tokens (trap 4)."""
    method = build("ccm_concat", comp_tokens=2)
    changed = nnx.merge(*nnx.split(MODEL))
    projection = getattr(getattr(changed.layers, PROJECTIONS[zeroed]), zeroed)
    projection.lora_b = nnx.LoRAParam(jnp.zeros_like(projection.lora_b[...]))
    sessions = cases.sessions()
    assert (
        gap(parity.parallel_logits(MODEL, method, sessions), parity.parallel_logits(changed, method, sessions)) > 1e-3
    )


@pytest.mark.parametrize("name", REMEMBERS)
def test_old_raw_text_is_gone(name):
    """After a chunk is closed its raw text is in no live slot, and noise in free slots changes nothing."""
    method, sessions = sessions_for(name)
    expected, cache = _tail(method, sessions)
    cache = jax.tree.map(np.asarray, cache)  # what follows is computed here, not compiled operation by operation
    kinds, segments, chunks = cache.slots.kind, cache.slots.segment, cache.chunks[:, None]
    seen = visibility.reachable(method.rule, cache.slots, cache.chunks, cache.tokens)
    assert not ((kinds == Kind.TEXT) & (segments < chunks) & ~seen).any()
    assert method.pool or method.recent or not ((kinds == Kind.TEXT) & (segments < chunks)).any()
    tails = [len(rows.arrange(method, s)[-1].tokens) for s in sessions]
    slots = [context_slots(method, s) + tail for s, tail in zip(sessions, tails, strict=True)]
    assert (kinds != Kind.PAD).sum(1).tolist() == slots
    assert (kinds == Kind.MEMORY).any()
    assert ((kinds == Kind.SINK).sum(1) == method.sink).all()

    noisy = (kinds == Kind.PAD)[None, :, :, None, None]
    more = Chunk(np.full((len(sessions), 2), 11, np.int32), np.ones((len(sessions), 2), bool))
    roomy = recurrent.cache_for(MODEL, method, sessions)
    assert roomy.k.shape == cache.k.shape

    def after(value):
        filled = {x: np.where(noisy, np.float32(value), getattr(cache, x)) for x in ("k", "v")}
        changed = dataclasses.replace(cache, **filled)
        return parity._read(MODEL, changed, more, method=method, query=True)[1]

    np.testing.assert_array_equal(after(1e3), after(0))


def test_independent_chunks_do_not_see_memory():
    """A chunk's state is invariant to earlier chunks only in the independent variant (trap 12)."""
    sessions = cases.sessions(((5, 4, 3), (5, 4, 3)))
    other = dataclasses.replace(sessions[0], segments=(sessions[1].segments[0], *sessions[0].segments[1:]))
    for independent in (True, False):
        method = build("ccm_concat", comp_tokens=2, independent=independent)
        scored = lambda e: dataclasses.replace(
            e, segments=tuple(Segment(s.tokens, np.full(len(s.tokens), i == 1)) for i, s in enumerate(e.segments))
        )
        first, second = parity.parallel_logits(MODEL, method, [scored(sessions[0]), scored(other)])
        # The first token of the second chunk is predicted by the last of the first: leave it out.
        same = np.abs(first[1:] - second[1:]).max()
        assert same < 1e-6 if independent else same > 1e-3


def test_merge_is_a_mean_of_rotated_keys():
    """Four chunks count a quarter each, slot by slot, keys averaged after rotation (traps 7, 8 and 11)."""
    sessions = cases.sessions(((5, 3, 4, 2, 3),))
    merge = build("ccm_merge", comp_tokens=2, independent=True)
    concat = build("ccm_concat", comp_tokens=2, independent=True)
    caches = {}
    for method in (merge, concat):
        caches[method.name] = _tail(method, sessions)[1]
    for x in ("k", "v"):
        appended = np.asarray(getattr(caches["ccm_concat"], x))[:, 0, :8]
        mean = appended.reshape(cases.CONFIG.num_layers, 4, 2, *appended.shape[2:]).mean(1)
        merged = np.asarray(getattr(caches["ccm_merge"], x))[:, 0, :2]
        np.testing.assert_allclose(merged, mean, atol=1e-5)
        assert np.abs(merged[:, ::-1] - mean).max() > 1e-2, "slots must not be mixed"


def test_ema_weights():
    """With decay a: state_t = (1 - a) state_(t-1) + a new, the first a plain copy."""
    sessions = cases.sessions(((5, 3, 4, 3),))
    ema = build("ccm_ema", comp_tokens=1, independent=True, decay=0.3)
    concat = build("ccm_concat", comp_tokens=1, independent=True)
    appended = np.asarray(_tail(concat, sessions)[1].v)[:, 0, :3]
    state = appended[:, 0]
    for i in (1, 2):
        state = 0.7 * state + 0.3 * appended[:, i]
    np.testing.assert_allclose(np.asarray(_tail(ema, sessions)[1].v)[:, 0, 0], state, atol=1e-5)


@pytest.mark.parametrize("name", [*cases.EACH, *cases.RECURRENT])
def test_one_program_and_slots_by_formula(name):
    """Rows of any ages and lengths, chunks of any number: one trace, bytes that stay, slots as the formula has it."""
    method = dataclasses.replace(TABLE[name], context="chunks", chunk=None, repeat=None)
    cache = memory.init_cache(MODEL, method, 3, memory_capacity=40, raw_capacity=48)
    empty = cache
    traces = []

    @jax.jit
    def step(model, cache, chunk):
        traces.append(chunk)
        return steps.compress_step(model, cache, chunk, method=method)

    rng = np.random.default_rng(0)
    rows: list[tuple[Segment, ...]] = [(), (), ()]
    for _ in range(6):
        lengths = rng.integers(0, 9, 3)
        tokens, valid = rng.integers(3, 90, (3, 8)), np.arange(8) < lengths[:, None]
        # What is kept stands in front of a span.
        kept = np.arange(8) < (lengths // 2)[:, None] if method.kept_kind is not None else None
        if kept is not None and method.kept_kind is Kind.SINK:
            kept &= (np.asarray(cache.tokens) == 0)[:, None]
        cache = step(MODEL, cache, Chunk(tokens, valid, kept))
        for row, count in enumerate(lengths):
            if count:
                keep = None if kept is None else kept[row, :count]
                rows[row] += (Segment(tokens[row, :count], np.zeros(count, bool), keep),)
        tail = Segment(np.array([7]), np.ones(1, bool))
        slots = [context_slots(method, Example(EMPTY, EMPTY, (*row, tail))) for row in rows]
        assert cache.slots.live.sum(1).tolist() == slots
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)
    memory.check(cache)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in TABLE])
def test_a_part_of_the_text_is_closed(name):
    """Whatever of the oldest raw text is closed, "error" gives what "evict" gives where nothing overflows."""
    method = dataclasses.replace(TABLE[name], context="chunks", chunk=None, repeat=None)
    rng = np.random.default_rng(0)
    counts = np.array([5, 0, 1, 11, 12, 7])
    text = lambda size: Chunk(rng.integers(3, 90, (6, size)).astype(np.int32), np.ones((6, size), bool))
    before = memory.init_cache(SHALLOW, method, 6, memory_capacity=24, raw_capacity=24)
    for piece in (text(3) for _ in range(4)):
        before, _ = parity._read(SHALLOW, before, piece, method=method, query=False)
    raw = np.asarray(before.slots.kind == Kind.TEXT)
    oldest = raw & (np.cumsum(raw, axis=1) <= counts[:, None])
    more, found = text(3), []
    for overflow in ("error", "evict"):
        cache = dataclasses.replace(before, overflow=overflow)
        cache = parity._compress(SHALLOW, cache, oldest, method=method)
        assert cache.chunks.tolist() == (counts > 0).tolist()
        memory.check(cache)
        cache = dataclasses.replace(cache, overflow="error")
        found.append(parity._read(SHALLOW, cache, more, method=method, query=False))
    chex.assert_trees_all_close(*found, atol=1e-5)


@pytest.mark.parametrize("name", cases.METHODS)
def test_rows_have_one_shape(name):
    """Whatever the lengths in a batch, its arrays are those of its sizes: one compilation of the parallel forward."""
    method, rng = cases.METHODS[name], np.random.default_rng(0)
    made = []
    for _ in range(5):
        lengths = [tuple(rng.integers(1, 5, rng.integers(1, 6))) for _ in range(3)]
        sessions = cases.sessions_for(method, lengths=lengths)
        made.append(rows.batch(method, sessions, rows.Sizes(120, 60, 90), cases.VOCAB))
    chex.assert_trees_all_equal_shapes_and_dtypes(*made)


@pytest.mark.parametrize("name", ["ccm_merge", "ccm_concat"])
def test_constant_state(name):
    """Bytes of the state and temporaries of the step are the same after 1 and after 1,000 chunks."""
    method = build(name, comp_tokens=2)
    cache = memory.init_cache(MODEL, method, 1, memory_capacity=8, raw_capacity=4, overflow="evict")
    chunk = Chunk(np.full((1, 4), 7, np.int32), np.ones((1, 4), bool))
    step = jax.jit(steps.compress_step, static_argnames="method")

    def many(model, cache, count):
        body = lambda _, cache: steps.compress_step(model, cache, chunk, method=method)
        return jax.lax.fori_loop(0, count, body, cache)

    compiled = step.lower(MODEL, cache, chunk, method=method).compile()
    one = step(MODEL, cache, chunk, method=method)
    thousand = jax.jit(many)(MODEL, cache, 1000)
    assert one.nbytes == thousand.nbytes == cache.nbytes
    chex.assert_trees_all_equal_shapes_and_dtypes(one, thousand)
    later = step.lower(MODEL, thousand, chunk, method=method).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == later.memory_analysis().temp_size_in_bytes
    assert int(thousand.chunks[0]) == 1000 and int(thousand.tokens[0]) == 4000
    assert np.isfinite(np.asarray(thousand.logits)).all()
    memory.check(thousand)


def test_bad_input():
    method = build("ccm_concat", comp_tokens=2)
    cache = memory.init_cache(MODEL, method, 1, memory_capacity=4, raw_capacity=4)
    full = lambda size: Chunk(np.ones((1, size), np.int32), np.ones((1, size), bool))
    with pytest.raises(UserError, match="5 tokens does not fit the region of 4"):
        steps.read(MODEL, cache, full(5), method=method)
    step = jax.jit(steps.compress_step, static_argnames="method")
    for _ in range(2):
        cache = step(MODEL, cache, full(3), method=method)
    memory.check(cache)
    with pytest.raises(UserError, match="larger memory_capacity"):
        memory.check(step(MODEL, cache, full(3), method=method))
    cache, _ = steps.read(MODEL, cache, full(3), method=method)
    cache, _ = steps.read(MODEL, cache, full(3), method=method)
    with pytest.raises(UserError, match="larger raw_capacity"):
        memory.check(cache)
    with pytest.raises(UserError, match="a window of 4 live slots has no room for text beside the sink's 4"):
        steps.stream_step(MODEL, cache, full(1), method=build("streaming_llm", sinks=4), window=4, closes=1)


def test_empty_chunk_passes_through():
    """Rows without tokens keep their state bit for bit."""
    method = build("ccm_merge", comp_tokens=2, sink=True)
    _, cache = _tail(method, cases.sessions())
    nothing = Chunk(np.zeros((3, 4), np.int32), np.zeros((3, 4), bool))
    nothing.valid[1] = True
    cache = jax.jit(steps.compress, static_argnames="method")(MODEL, cache, method=method)
    after = jax.jit(steps.compress_step, static_argnames="method")(MODEL, cache, nothing, method=method)
    row = lambda cache, b: memory.select(cache, jnp.array([b]))
    chex.assert_trees_all_equal(row(cache, 0), row(after, 0))
    chex.assert_trees_all_equal(row(cache, 2), row(after, 2))
    assert int(after.chunks[1]) == int(cache.chunks[1]) + 1


def test_sink_survives():
    """The first token stays visible and in the cache only with a sink (trap 13)."""
    sessions = cases.sessions(((4, 4, 4), (3, 3, 3)))
    for sink in (True, False):
        method = build("ccm_concat", comp_tokens=2, sink=sink)
        _, cache = _tail(method, sessions)
        live = np.asarray(cache.slots.live).sum(1) - [len(rows.arrange(method, s)[-1].tokens) for s in sessions]
        assert live.tolist() == [2 * 2 + int(sink)] * 2
        made = rows.batch(method, sessions, recurrent.caps_for(method, sessions), cases.VOCAB)
        column = visibility.visible(method.rule, made.slots, made.slots)[0, :, 0]
        kinds = made.slots.kind[0] > 0
        assert column[kinds].sum() == (kinds.sum() if sink else 1 + 4 + 2)
