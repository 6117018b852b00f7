"""LoMA: layout, losses and gradients; L1 to L16 number the traps of its specification."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_ccm.data.batches import prepare
from jax_ccm.data.config import TextConfig
from jax_ccm.errors import UserError
from jax_ccm.evals import parity, recurrent
from jax_ccm.memory import losses, repetition, steps
from jax_ccm.memory.cache import init_cache, select
from jax_ccm.memory.closing import prefill
from jax_ccm.memory.generation import generate
from jax_ccm.methods import build
from jax_ccm.rules import visibility
from jax_ccm.rules.draw import draw
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.rows import Sizes, arrange, batch, bound, chunk, closed, measure
from jax_ccm.rules.types import Chunk, Kind, Slots
from jax_ccm.rules.visibility import gate
from tests import cases, jitted
from tests.data.support import ids, tokenizer, write
from tests.data.test_formats import load

METHOD = build("loma", ratio=2, memory_tokens=2)
READING = dataclasses.replace(METHOD, repeat=None)
MODEL = cases.model(tokens=2)
EMPTY = np.zeros(0, np.int32)


def text(count: int, seed: int = 0, scored: bool = True) -> Example:
    """A text without opening tokens, in one piece: the method cuts it."""
    tokens = np.random.default_rng(seed).integers(10, cases.VOCAB, count).astype(np.int32)
    return Example(EMPTY, EMPTY, (Segment(tokens, np.full(count, scored)),))


def laid_out(examples, method=METHOD, extra: int = 0):
    sizes = recurrent.caps_for(method, examples)
    sizes = Sizes(sizes.tokens + extra, sizes.memory + 2 * extra, sizes.scored + extra)
    return batch(method, examples, sizes, cases.VOCAB)


def hidden_of(made, method=METHOD, model=MODEL):
    return steps.parallel_forward(model, made, method=method)


def test_drawn_mask():
    """Who sees whom and the positions, of two closed chunks and a tail (L3, L5 and L8)."""
    assert (
        draw(METHOD, (4, 4, 1)).splitlines()
        == """\
  a b c d C C r r r r e f g h C C r r r r i | M1 M1 M2 M2   position
a x . . . . . . . . . . . . . . . . . . . . | .  .  .  .    0
b x x . . . . . . . . . . . . . . . . . . . | .  .  .  .    1
c x x x . . . . . . . . . . . . . . . . . . | .  .  .  .    2
d x x x x . . . . . . . . . . . . . . . . . | .  .  .  .    3
C x x x x x x . . . . . . . . . . . . . . . | .  .  .  .    1
C x x x x x x . . . . . . . . . . . . . . . | .  .  .  .    3
r . . . . . . x . . . . . . . . . . . . . . | x  x  .  .    0
r . . . . . . . x . . . . . . . . . . . . . | x  x  .  .    1
r . . . . . . . . x . . . . . . . . . . . . | x  x  .  .    2
r . . . . . . . . . x . . . . . . . . . . . | x  x  .  .    3
e . . . . . . . . . . x . . . . . . . . . . | x  x  .  .    4
f . . . . . . . . . . x x . . . . . . . . . | x  x  .  .    5
g . . . . . . . . . . x x x . . . . . . . . | x  x  .  .    6
h . . . . . . . . . . x x x x . . . . . . . | x  x  .  .    7
C . . . . . . . . . . x x x x x x . . . . . | x  x  .  .    5
C . . . . . . . . . . x x x x x x . . . . . | x  x  .  .    7
r . . . . . . . . . . . . . . . . x . . . . | .  .  x  x    4
r . . . . . . . . . . . . . . . . . x . . . | .  .  x  x    5
r . . . . . . . . . . . . . . . . . . x . . | .  .  x  x    6
r . . . . . . . . . . . . . . . . . . . x . | .  .  x  x    7
i . . . . . . . . . . . . . . . . . . . . x | x  x  x  x    8""".splitlines()
    )


def test_targets():
    """Text predicts the next text token across memory and repetition; repetition is not shifted (L1 and L2)."""
    example = text(9)
    made = laid_out([example])
    tokens = example.segments[0].tokens
    kinds = made.slots.kind[0][made.indices[0]]
    read = kinds != Kind.REPEAT
    assert made.targets[0][read].tolist() == tokens[1:].tolist()
    assert made.targets[0][~read].tolist() == tokens[:8].tolist()
    assert (made.slots.position[0][made.indices[0]][~read] == np.arange(8)).all()
    assert not np.isin(kinds, [Kind.COMP, Kind.PAD]).any()
    ids = made.tokens[0][made.tokens[0] >= cases.VOCAB]
    assert set(ids) == {cases.VOCAB, cases.VOCAB + 1}, "one memory token and one repetition token serve all places"


def test_repetition_changes_no_text():
    """The row with its repetition zones gives the same text logits as the row without (L3)."""
    example = text(11)
    without = laid_out([example], READING)
    ours = jitted.scored_logits(MODEL, laid_out([example]), method=METHOD)
    theirs = jitted.scored_logits(MODEL, without, method=READING)
    np.testing.assert_allclose(ours[0, : theirs.shape[1]], theirs[0], atol=1e-5)


def test_chunk_boundaries():
    """A recurrence that compresses every t c tokens equals the row, at and around the boundary (L9, L10)."""
    for count in (4, 5, 7, 8, 9, 13):
        example = text(count)
        assert [len(s.tokens) for s in arrange(METHOD, example)] == [4] * ((count - 1) // 4) + [(count - 1) % 4 + 1]
        ours = parity.parallel_logits(MODEL, METHOD, [example])[0]
        np.testing.assert_allclose(ours, parity.recurrent_logits(MODEL, METHOD, [example])[0], atol=1e-5)


@pytest.mark.parametrize("repeats_see", ["self", "causal", "both"])
def test_repeating_from_the_cache(repeats_see):
    """`repeat` reads a closed chunk back, its text being gone, as the training row does (L15)."""
    method = build("loma", ratio=2, memory_tokens=2, repeats_see=repeats_see)
    example = text(13)
    made = laid_out([example], method)
    again = np.asarray(losses.repeated(made))[0]
    expected = np.asarray(jitted.scored_logits(MODEL, made, method=method))[0][again].reshape(3, 4, -1)
    cache = recurrent.cache_for(MODEL, method, [example])
    segments = arrange(method, example)
    for segment in segments[:-1]:
        cache = jitted.compress_step(MODEL, cache, chunk([segment.tokens], 4, cases.VOCAB), method=method)
    for open_text in (False, True):
        if open_text:
            tail = chunk([segments[-1].tokens[:3]], 3, cases.VOCAB)
            cache, _ = jitted.read(MODEL, cache, tail, method=method)
        # What was evicted is not merely masked: nothing of it is left to read.
        free = (np.asarray(cache.slots.kind) == Kind.PAD)[None, :, :, None, None]
        noisy = {x: np.where(free, np.float32(1e3), getattr(cache, x)) for x in ("k", "v")}
        cache = dataclasses.replace(cache, **noisy)
        for back in (1, 2, 3):
            logits = jitted.repeat(MODEL, cache, 4, back, method=method)[0]
            np.testing.assert_allclose(logits, expected[3 - back], atol=1e-5)


@pytest.mark.parametrize("name", ["concat", "merge", "ema"])
def test_repetition_on_top_of_ccm(name):
    """The last chunk, of whatever length, read back from a memory of CCM as its training row does."""
    method, model = cases.METHODS[f"{name}_n2_repeat"], cases.model(tokens=3)
    (session,) = cases.sessions(((5, 3, 4, 1),))
    made = laid_out([session], method)
    segments = arrange(method, session)
    cache = recurrent.cache_for(model, method, [session])
    begin, logits_of_row = 0, np.asarray(jitted.scored_logits(model, made, method=method))[0]
    for number, segment in enumerate(segments[:-1]):
        count = len(segment.tokens)
        cache = jitted.compress_step(model, cache, chunk([segment.tokens], 7, cases.VOCAB), method=method)
        mine = np.asarray(losses.repeated(made))[0] & (made.steps[0] == number)
        assert made.targets[0][mine].tolist() == segment.tokens.tolist()
        logits = jitted.repeat(model, cache, count, method=method, begin=np.full(1, begin))[0]
        np.testing.assert_allclose(logits, logits_of_row[mine], atol=1e-5)
        begin += count


@pytest.mark.parametrize("name", ["concat_n2_say", "loma_say"])
def test_a_chunk_is_said_again_token_after_token(name):
    """A training row feeds the text before each token as the cache does; a repetition feeds what it said itself."""
    method, model = cases.METHODS[name], cases.model(tokens=3)
    session = text(13) if method.chunk else cases.sessions(((5, 3, 4, 1),))[0]
    made = laid_out([session], method)
    logits_of_row = np.asarray(jitted.scored_logits(model, made, method=method))[0]
    cache = recurrent.cache_for(model, method, [session])

    def fed(tokens, begin):
        """Logits behind these tokens, all read at once over the memory."""
        place = jnp.arange(len(tokens))[None]
        whole = lambda value: jnp.full(place.shape, value, jnp.int32)
        slots = Slots(whole(Kind.REPEAT), whole(cache.chunks[0] - 1), cache.tokens[:, None] + place, begin + place)
        hidden, _, _ = model(jnp.asarray(tokens)[None], slots, gate(method, slots), rule=method.rule, memory=cache)
        return np.asarray(model.logits(hidden))[0]

    size = method.chunk or 7
    begin, prompt, new = 0, cases.VOCAB + method.repeat.embedding_index, 0
    for number, segment in enumerate(closed(method, arrange(method, session))):
        count = len(segment.tokens)
        cache = jitted.compress_step(model, cache, chunk([segment.tokens], size, cases.VOCAB), method=method)
        mine = np.asarray(losses.repeated(made))[0] & (made.steps[0] == number)
        assert made.targets[0][mine].tolist() == segment.tokens.tolist()
        np.testing.assert_allclose(fed([prompt, *segment.tokens[:-1]], begin), logits_of_row[mine], atol=1e-5)
        said = np.asarray(jitted.repeat(model, cache, count, method=method, begin=np.full(1, begin))[0])
        np.testing.assert_allclose(fed([prompt, *said.argmax(-1)[:-1]], begin), said, atol=1e-5)
        new, begin = new + int((said.argmax(-1) != segment.tokens).sum()), begin + count
    assert new  # or both would have fed the same


@pytest.mark.parametrize(
    "name", ["merge_n2_repeat", "loma", "loma_say_sink", "concat_n2_say", "concat_n2_repeat_recent"]
)
def test_repeating_whole_texts(name):
    """`repeat_recurrently` hears of every closed chunk what `repeat` says of it, whatever the others' lengths."""
    recent = name.endswith("_recent")
    method = cases.METHODS[name.removesuffix("_recent").removesuffix("_sink")]
    method = build("ccm_concat", comp_tokens=2, sink=True, repeat=True, recent=1) if recent else method
    if name.endswith("_sink"):
        method = build("loma", ratio=2, memory_tokens=2, repeat_by="text", sink=True)
    sessions = (
        [text(13), text(6), text(21)] if method.chunk else cases.sessions(((5, 3, 4, 1), (2, 6, 3), (4, 1, 3, 2)))
    )
    model, size = cases.model(tokens=3), method.chunk or 8
    found = recurrent.repeat_recurrently(model, method, sessions, rows=2)
    for session, heard in zip(sessions, found, strict=True):
        segments, begin = arrange(method, session), 0
        cache = recurrent.cache_for(model, method, sessions)
        cache = select(cache, np.zeros(1, int))
        for number, segment in enumerate(segments[: len(heard) + method.recent]):
            cache = jitted.compress_step(model, cache, chunk([segment.tokens], size, cases.VOCAB), method=method)
            if number < method.recent:
                continue
            wanted = segments[number - method.recent].tokens
            back, where = method.recent + 1, np.full(1, begin)
            said = jitted.repeat(model, cache, len(wanted), back, method=method, begin=where)[0]
            assert np.asarray(said).argmax(-1).tolist() == heard[number - method.recent].tolist()
            begin += len(wanted)
        assert len(heard) == len(closed(method, segments)) > 0


def test_a_share_of_the_examples_is_repeated():
    """An example without is laid out as by the method without repetition, slots and all; a layout holds either."""
    method, plain = cases.METHODS["concat_n2_say"], dataclasses.replace(cases.METHODS["concat_n2_say"], repeat=None)
    sessions = cases.sessions()
    without = [dataclasses.replace(session, repeats=False) for session in sessions]
    assert [measure(method, each) for each in without] == [measure(plain, each) for each in sessions]
    ours, theirs = laid_out(without, method), laid_out(sessions, plain)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    mixed = laid_out([sessions[0], *without[1:]], method)
    assert np.asarray(losses.repeated(mixed)).any(axis=1).tolist() == [True, False, False]


def test_a_last_full_chunk_is_repeated():
    """A text of a multiple of t c tokens is closed and repeated to its end; its text logits are none the wiser."""
    example = text(8)
    made = laid_out([example])
    again = np.asarray(losses.repeated(made))[0]
    assert made.targets[0][again].tolist() == example.segments[0].tokens.tolist()
    assert made.memory.slots.live.sum() == 4 and (made.slots.kind[0] == Kind.COMP).sum() == 4
    assert measure(METHOD, example) == bound(METHOD, 8, 9, 7)
    without = laid_out([example], READING)
    assert without.memory.slots.live.sum() == 2
    ours = jitted.scored_logits(MODEL, made, method=METHOD)[0, :7]
    np.testing.assert_allclose(ours, jitted.scored_logits(MODEL, without, method=READING)[0], atol=1e-5)


def test_first_token_may_be_pinned():
    """With a sink the first token outlives its chunk and is seen by all later ones; without, it goes with it (L11)."""
    for sink in (True, False):
        method = build("loma", ratio=2, memory_tokens=2, sink=sink)
        cache = recurrent.cache_for(MODEL, method, [text(9)])
        for segment in arrange(method, text(9))[:-1]:
            cache = jitted.compress_step(MODEL, cache, chunk([segment.tokens], 4, cases.VOCAB), method=method)
        kinds = np.asarray(cache.slots.kind[0])
        assert (kinds == Kind.SINK).sum() == sink and (kinds != Kind.PAD).sum() == 4 + sink
        made = laid_out([text(9)], method)
        tail = visibility.visible(method.rule, made.slots, made.slots)[0][made.slots.segment[0] == 2]
        assert tail[0, 0] == sink


def test_conditional_lora_reads_as_the_base_model_does():
    """On memory and repetition tokens only, the LoRA leaves an open chunk alone; LoMA's own changes it."""
    logits = lambda method: parity.parallel_logits(MODEL, method, [text(4)])[0]
    base = logits(dataclasses.replace(METHOD, gate=()))
    conditional = build("loma", ratio=2, memory_tokens=2, conditional=True)
    np.testing.assert_array_equal(logits(conditional), base)
    assert np.abs(logits(METHOD) - base).max() > 1e-3
    assert set(conditional.gate) == {Kind.COMP, Kind.REPEAT}


def test_documents_share_no_row():
    """A row is one session: a window never reaches from one document into the next (L14)."""
    texts = ["abcdefgh" * 3, "stuvwxyz" * 2 + "st"]
    format, units, _ = load(
        [{"text": text} for text in texts], format="text", chunk=4, max_chunks=1, tokens=60, loss="all", bos=False
    )
    for number, document in enumerate(texts):
        mine = [unit for unit in units if unit.id.startswith(f"r[{number}]")]
        found = [token for unit in mine for piece in unit.pieces for token in piece.tolist()]
        assert found == ids(document)[: len(found)] and len(found) >= 16
        for unit in mine:
            assert len(format.draw(unit, np.random.default_rng(0)).segments) == len(unit.pieces)


def test_windows_that_t_c_does_not_divide(tmp_path):
    """Training text is cut into windows of whole chunks: the rest of each would never be compressed."""
    path = write(tmp_path / "text.jsonl", [{"text": "abcdefgh" * 9}])
    data = TextConfig(train=(path,), chunk=5, max_chunks=3, tokens=99, scored=64, loss="all", bos=False)
    with pytest.raises(
        UserError, match=r"data.chunk=5 x \(data.max_chunks=3 \+ 1\) = 20 tokens are no multiple of the 8"
    ):
        prepare(data, build("loma", ratio=4, memory_tokens=2), tokenizer(), 300)
    made = prepare(data, METHOD, tokenizer(), 300)
    sizes = made.format.needs(made.units[0], METHOD)
    assert sizes == Sizes(20 + 20 + 5 * 2, 5 * 2, 19 + 20)


def test_methods_without_repetition_say_so():
    method = build("ccm_concat")
    cache = recurrent.cache_for(MODEL, method, cases.sessions())
    with pytest.raises(UserError, match="no repetition token"):
        repetition.repeat(MODEL, cache, 4, method=method)


def test_memory_is_bidirectional():
    """Memory tokens see those behind them, which also means that they must be run in one pass (L6 and L7)."""
    causal = build("loma", ratio=2, memory_tokens=2, bidirectional=False)
    ours = parity.parallel_logits(MODEL, METHOD, [text(9)])[0]
    theirs = parity.parallel_logits(MODEL, causal, [text(9)])[0]
    np.testing.assert_array_equal(ours[:3], theirs[:3])
    assert np.abs(ours[3:] - theirs[3:]).max() > 1e-3

    def one_by_one(method):
        """The cache after four tokens, its memory tokens run in two passes."""
        cache = recurrent.cache_for(MODEL, method, [text(9)])
        cache, _ = jitted.read(
            MODEL, cache, Chunk(text(9).segments[0].tokens[None, :4], np.ones((1, 4), bool)), method=method
        )
        first = dataclasses.replace(method, closes=method.closes[:1])
        values = np.asarray(jitted.compress(MODEL, cache, method=first).v[:, 0, 0])
        return values, np.asarray(jitted.compress(MODEL, cache, method=method).v[:, 0, 0])

    alone, together = one_by_one(causal)
    np.testing.assert_allclose(alone, together, atol=1e-5)
    alone, together = one_by_one(METHOD)
    assert np.abs(alone - together)[1:].max() > 1e-3


def test_memory_positions_differ():
    """Memory tokens share one embedding: only positions tell them apart, and "sequential" is another choice (L5)."""
    cache = recurrent.cache_for(MODEL, METHOD, [text(9)])
    cache = jitted.compress_step(MODEL, cache, chunk([text(9).segments[0].tokens[:4]], 4, cases.VOCAB), method=METHOD)
    assert np.abs(cache.v[1:, 0, 0] - cache.v[1:, 0, 1]).max() > 1e-3
    assert cache.slots.position[0, :2].tolist() == [1, 3]
    sequential = build("loma", ratio=2, memory_tokens=2, positions="sequential")
    assert [token.offset for token in sequential.closes] == [0, 1]


def test_generation_compresses_as_it_goes():
    """Prompts of any length and the answer alike: every t c tokens, whatever each row's phase."""
    prompts = [
        text(11, seed=1).segments[0].tokens,
        text(6, seed=2).segments[0].tokens,
        text(4, seed=3).segments[0].tokens,
    ]
    cache = init_cache(MODEL, METHOD, 3, memory_capacity=20, raw_capacity=4)
    fill = jax.jit(prefill, static_argnames="method")
    for first in (0, 3):
        rows = [prompt[:3] if first == 0 else prompt[3:] for prompt in prompts]
        cache = fill(MODEL, cache, chunk(rows, 8, cases.VOCAB), method=METHOD)
    assert cache.chunks.tolist() == [2, 1, 1] and cache.slots.live.sum(axis=1).tolist() == [7, 4, 2]
    cache, tokens, lengths = generate(MODEL, cache, method=METHOD, max_tokens=9)
    assert cache.chunks.tolist() == [5, 3, 3] and lengths.tolist() == [9, 9, 9]
    for prompt, answer in zip(prompts, np.asarray(tokens), strict=True):
        whole = np.concatenate([prompt, answer])
        example = Example(EMPTY, EMPTY, (Segment(whole, np.arange(len(whole)) >= len(prompt)),))
        logits = parity.parallel_logits(MODEL, METHOD, [example])[0]
        assert logits.argmax(axis=1).tolist() == answer.tolist()


def losses_of(embedding, made, rows):
    """Repetition loss of chunk ``rows`` as a function of the vocabulary's table."""
    graphdef, table, rest = nnx.split(MODEL, lambda path, _: path[-1] == "embedding", ...)
    model = nnx.merge(graphdef, jax.tree.map(lambda _: embedding, table), rest)
    found = losses.scored_losses(model, hidden_of(made, model=model), made)[0]
    return jnp.sum(found * losses.repeated(made)[0] * (made.steps[0] == rows))


def test_gradients_do_not_leak():
    """Repetition learns through memory alone: no path from later text, none at all once memory is cut (L4)."""
    made = laid_out([text(9)])
    table = MODEL.embed_tokens.embedding[...]
    # The output projection shares the table in tied models; this one is not tied.
    assert not MODEL.config.tie_embeddings
    ids = made.tokens[0]
    first, second = (
        set(ids[(made.slots.segment[0] == s) & (made.slots.kind[0] == Kind.TEXT)].tolist()) for s in (0, 1)
    )
    assert not first & second
    gradient = jax.jit(jax.grad(lambda table, made: losses_of(table, made, 0)))
    reach = np.abs(np.asarray(gradient(table, made))).max(axis=1)
    assert all(reach[list(first)] > 0), "every token of the chunk is in its memory"
    assert all(reach[list(second)] == 0)
    cut = parity.without_memory(made)
    assert np.abs(np.asarray(gradient(table, cut))).max() == 0


def test_each_loss_has_its_own_mean():
    """A longer tail leaves the repetition loss alone, padding both (L12 and L13)."""
    short, long = text(10), text(11)
    value = lambda made, method: float(jitted.mean_loss(MODEL, made, method=method))
    parts = {}
    for name, example in (("short", short), ("long", long)):
        made = laid_out([example])
        parts[name] = value(made, METHOD) - value(laid_out([example], READING), READING)
        assert value(laid_out([example], extra=5), METHOD) == pytest.approx(value(made, METHOD), abs=1e-6)
    assert parts["short"] == pytest.approx(parts["long"], abs=1e-5)
    double = dataclasses.replace(METHOD, repeat_weight=2.0)
    made = laid_out([short])
    assert value(made, double) - value(made, METHOD) == pytest.approx(parts["short"], abs=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ratio=0), "ratio is 0"),
        (dict(memory_tokens=0), "memory_tokens is 0"),
        (dict(scope="some"), "scope is 'some'; allowed: all, last"),
        (dict(positions="end"), "allowed: stride, sequential"),
        (dict(repeats_see="all"), "allowed: self, causal, both"),
        (dict(memory="merge"), "memory is 'merge'; allowed: append, mean, ema"),
        (dict(memory="mean", decay=0.1), "decay is 0.1, but memory is 'mean'"),
        (dict(repeat_by="text", repeats_see="both"), "later tokens are what is asked for"),
        (dict(repeat_by="words"), "repeat_by is 'words'; allowed: placeholders, text"),
        (dict(repeat=False, repeat_by="text"), "but repeat is false; set repeat: true"),
        (dict(repeat_share=0.0), "repeat_share is 0.0; it must lie in"),
        (dict(repeat_weight=-1.0), "repeat_weight is -1.0; it must be at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        build("loma", **options)
