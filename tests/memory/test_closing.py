"""Open text is closed on the way: at a length, after a sentence, or where the caller says; prompt and answer alike."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.closing import Closing, policy, prefill
from jax_ccm.memory.generation import generate
from jax_ccm.methods import build
from jax_ccm.rules import rows
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Kind
from tests import cases

pytestmark = pytest.mark.once

MODEL = cases.model(tokens=2)
EMPTY = np.zeros(0, np.int32)
SENTINEL = build("sentinel")


def empty(method, rows=1):
    return init_cache(MODEL, method, rows, memory_capacity=24, raw_capacity=24)


def text(count, seed=0):
    return np.random.default_rng(seed).integers(10, cases.VOCAB, count).astype(np.int32)


def session(tokens, ends, kept=None, scored=None) -> Example:
    """The text as segments that end at ``ends``, and a tail."""
    scored = np.ones(len(tokens), bool) if scored is None else scored
    cut = lambda x: np.split(x, ends)
    pieces = zip(cut(tokens), cut(scored), cut(np.zeros(len(tokens), bool) if kept is None else kept), strict=True)
    return Example(EMPTY, EMPTY, tuple(Segment(*piece) for piece in pieces if len(piece[0])))


_fill = jax.jit(prefill, static_argnames=("method", "query", "closing"))


@functools.cache
def talked(name):
    """Two sessions of different lengths, read in two goes and continued, with what a span's length says."""
    method = {
        "sentinel": SENTINEL,
        "sentinel, history": build("sentinel", history=True),
        "concat": build("ccm_concat", comp_tokens=2),
        "compressive": build("compressive", ratio=2, recent=0),
    }[name]
    closing, prompts = Closing(4), [text(9, 1), text(6, 2)]
    cache = empty(method, 2)
    for part in (slice(0, 3), slice(3, 9)):
        chunk = rows.chunk([prompt[part] for prompt in prompts], 6, cases.VOCAB)
        cache = _fill(MODEL, cache, chunk, method=method, closing=closing)
    before = cache
    cache, tokens, lengths = generate(MODEL, cache, method=method, max_tokens=6, closing=closing)
    assert lengths.tolist() == [6, 6]
    return method, prompts, before, cache, np.asarray(tokens)


@pytest.mark.parametrize("name", ["sentinel", "sentinel, history", "concat", "compressive"])
def test_length(name):
    """The answer is that of one parallel forward over the same spans."""
    method, prompts, before, cache, tokens = talked(name)
    assert before.chunks.tolist() == [2, 1] and cache.chunks.tolist() == [3, 3]
    kinds = np.asarray(cache.slots.kind)
    each = method.memory_slots(1, 4)
    assert (kinds == Kind.MEMORY).sum(1).tolist() == [3 * each, 3 * each]
    assert (kinds != Kind.PAD).sum(1).tolist() == [3 * each + 3, 3 * each]
    for prompt, answer in zip(prompts, tokens, strict=True):
        whole = np.concatenate([prompt, answer])
        scored = np.arange(len(whole)) >= len(prompt)
        ends = np.arange(4, len(whole), 4)
        logits = parity.parallel_logits(MODEL, method, [session(whole, ends, scored=scored)])[0]
        assert logits.argmax(axis=1).tolist() == answer.tolist()


@pytest.mark.parametrize("name", ["ccm_concat", "compressive"])
def test_a_system_message_is_no_part_of_a_span(name):
    """Whether it is read with what follows or before it; the sink of a session that has none does count."""
    method = build(name, sink=True, **({"comp_tokens": 2} if name == "ccm_concat" else {"ratio": 2, "recent": 0}))
    said, message = text(11), np.arange(11) < 6

    def fill(parts, kept):
        cache = empty(method)
        for part in parts:
            chunk = rows.chunk([said[part]], len(said[part]), cases.VOCAB)
            chunk = dataclasses.replace(chunk, kept=kept[part][None])
            cache = _fill(MODEL, cache, chunk, method=method, closing=Closing(4))
        return cache

    for kept, closed in ((message, [1]), (np.zeros(11, bool), [2])):
        once = fill([slice(0, 11)], kept)
        assert once.chunks.tolist() == closed
        for cuts in ([6], [6, 7], [3, 6, 9]):
            parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, 11], strict=True)]
            np.testing.assert_array_equal(fill(parts, kept).slots.kind, once.slots.kind)


def test_sentences_and_the_callers_spans():
    """Ends of sentences close a span unless it is too short; so do the caller's ends, behind text that is kept."""
    tokens = text(12)
    stop, at = int(tokens[4]), np.flatnonzero(tokens == tokens[4])
    assert at.tolist() == [4]
    tokens[5] = stop
    # The second stop leaves a span of one token open; five more make the longest span of six.
    chunk = rows.chunk([tokens], 12, cases.VOCAB)
    cache = _fill(MODEL, empty(SENTINEL), chunk, method=SENTINEL, closing=Closing(6, (stop,)))
    assert cache.chunks.tolist() == [2]
    other = session(np.append(tokens, 0), [5, 11])
    np.testing.assert_allclose(cache.logits[0], parity.parallel_logits(MODEL, SENTINEL, [other])[0][-1], atol=1e-5)

    kept, ends = np.zeros((2, 12), bool)
    kept[[0, 1, 6]] = True
    ends[[5, 9]] = True
    expected = parity.parallel_logits(MODEL, SENTINEL, [session(np.append(tokens, 0), [6, 10], np.append(kept, False))])
    cache = _fill(
        MODEL, empty(SENTINEL), dataclasses.replace(chunk, kept=kept[None]), method=SENTINEL, closing=Closing(8),
        ends=ends[None],
    )  # fmt: skip
    assert cache.chunks.tolist() == [2]
    kinds = np.asarray(cache.slots.kind[0])
    assert (kinds == Kind.QUERY).sum() == 3 and (kinds == Kind.MEMORY).sum() == 2
    np.testing.assert_allclose(cache.logits[0], expected[0][-1], atol=1e-5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("full", {}, "'full' compresses nothing"),
        ("loma", {}, "closes text every 32 tokens by itself"),
        ("gist", {}, "the whole context at once"),
        ("ccm_concat", dict(independent=True), "compresses chunks that saw no memory"),
    ],
)
def test_methods_that_cannot_close(name, options, message):
    with pytest.raises(UserError, match=message):
        policy(build(name, **options), Closing(4), query=True)


def test_mistakes():
    with pytest.raises(UserError, match="shortest=5 to length=4"):
        Closing(4, shortest=5)
    with pytest.raises(UserError, match="ends need a closing"):
        chunk = rows.chunk([[5, 6]], 2, cases.VOCAB)
        prefill(MODEL, empty(SENTINEL), chunk, method=SENTINEL, ends=np.ones((1, 2), bool))
    method = build("loma", ratio=4, memory_tokens=2)
    with pytest.raises(UserError, match="raw_capacity is 20; .* takes 8 tokens at a time, so give .* such as 24"):
        init_cache(MODEL, method, 1, memory_capacity=8, raw_capacity=20)
