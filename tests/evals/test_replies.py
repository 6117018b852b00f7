"""Generated replies: how texts are compared, and that what is generated is what each session would say by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jax_ccm.data.questions import Choice, wrong_memory_choices
from jax_ccm.errors import UserError
from jax_ccm.evals import perplexity, recurrent, replies
from jax_ccm.evals.perplexity import Stage
from jax_ccm.evals.replies import Asking, contains, f1, judge, prompt, words
from jax_ccm.evals.scoring import Scores, Store
from jax_ccm.memory.cache import init_cache, raw_capacity
from jax_ccm.memory.generation import generate
from jax_ccm.methods import build
from jax_ccm.rules.rows import arrange, chunk
from tests import cases, jitted
from tests.evals.support import SMALL, bigram, random_sessions, session

pytestmark = pytest.mark.once

SAID = Asking(5, (3,), "", cases.VOCAB, lambda ids: " ".join(map(str, ids)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The Cat, sat.", ["cat", "sat"]),
        ("  an\tA the\n", []),
        ("don't (ever) theatre", ["dont", "ever", "theatre"]),
        ("Zürich — 3.5", ["zürich", "—", "35"]),
    ],
)
def test_words(text, found):
    assert words(text) == found


def test_measures_by_hand():
    assert f1("the red red house", "a red house there") == pytest.approx(2 * 2 / (3 + 3))
    assert f1("red red red", "red") == pytest.approx(2 * 1 / 4)  # multisets: one of the three counts
    assert (f1("", "the"), f1("", "cat"), f1("the", "cat")) == (1.0, 0.0, 0.0)
    assert contains("It is the Blue-Moon, I think.", "bluemoon") == 1 and contains("start", "art") == 0
    assert contains("New old York", "New York") == 0 and contains("anything", "the") == 0
    said = judge("It is Kalort.", "The name is Kalort.", ["Kalort"])
    assert (said.exact, said.contains) == (0, 1) and said.f1 == pytest.approx(2 * 2 / (3 + 3))
    assert judge("kalort", "The name is Kalort.", ["Kalort"]).exact == 1
    # Without a short answer the whole one has to be in the reply.
    assert judge("It is Kalort.", "The name is Kalort.").contains == 0


def test_what_can_be_answered():
    asked = prompt(session([9], [6, 7, 8, 3], target=2))
    assert asked.segments[-1].tokens.tolist() == [6, 7] and not asked.segments[-1].scored.any()
    two = session([9], [6, 7, 8, 3], target=2)
    two.segments[-1].scored[0] = True
    for example in (two, session([9], [6, 7], target=2), session([9], [6, 7], target=0)):
        with pytest.raises(UserError, match="one answer"):
            prompt(example)


@pytest.mark.parametrize(
    "method",
    [
        build("full"),
        build("none"),
        build("ccm_concat", comp_tokens=2, sink=True),
        build("evict"),
        build("loma", ratio=3, memory_tokens=1),
    ],
    ids=lambda method: method.name,
)
def test_each_is_answered_as_if_it_were_alone(method, monkeypatch):
    """Contexts are read once for the questions and the controls that share them; LoMA closes what it says."""
    model = cases.model(config=SMALL, tokens=2)
    right = [Choice((example,), 0) for example in random_sessions(5, 3)]
    asked = [*right, *wrong_memory_choices(right)]
    reads = []
    step = recurrent._step
    monkeypatch.setattr(recurrent, "_step", lambda *args, **kw: reads.append(1) or step(*args, **kw))
    made = replies.answer(model, method, asked, SAID, rows=3)
    if method.context == "chunks" and method.chunk is None:
        assert len(reads) == 2 * 3  # two batches of contexts of three chunks, for ten questions
    shape = recurrent.cache_for(
        model, method, [recurrent._longer(prompt(q.examples[0]), SAID.max_tokens + 1) for q in asked]
    )
    sizes = dict(memory_capacity=shape.memory_capacity, raw_capacity=raw_capacity(shape))
    pad = lambda segment: chunk([segment.tokens], 12, cases.VOCAB)
    for question, reply in [*zip(asked, made, strict=True)][::3]:
        *context, tail = arrange(method, prompt(question.examples[0]))
        cache = init_cache(model, method, 1, **sizes | {"raw_capacity": max(sizes["raw_capacity"], 12)})
        for segment in context:
            cache = jitted.compress_step(model, cache, pad(segment), method=method)
        cache, _ = jitted.read(model, cache, pad(tail), method=method, query=True)
        if method.chunk and len(tail.tokens) == method.chunk:
            cache = jitted.compress(model, cache, method=method)
        _, tokens, lengths = generate(
            model, cache, method=method, max_tokens=5, stop_tokens=(3,), vocabulary=cases.VOCAB
        )
        alone = np.asarray(tokens)[0, : int(lengths[0])].tolist()
        assert reply.text == SAID.decode(alone) and reply.tokens == len(alone) and reply.cut == (len(alone) == 5)
    # The control says something else: otherwise nothing was read.
    if method.context != "dropped":
        assert [reply.text for reply in made[:5]] != [reply.text for reply in made[5:]]


def test_a_reply_ends():
    """At a stop token, at a text, or at the limit; a token that the tokenizer does not know is never drawn."""
    table = np.full((8, 8), -9.0)
    table[4, 5] = table[5, 6] = table[6, 3] = table[7, 7] = 9
    table[5, 7] = 99  # the most likely one, but beyond the vocabulary
    asked = [Choice((session([7], [6, 4, 5, 6], target=2),), 0)]
    run = lambda **how: replies.answer(bigram(table), build("full"), asked, dataclasses.replace(SAID, **how), rows=1)[0]
    ended = run(stops=(3,), vocabulary=7)
    assert (ended.text, ended.tokens, ended.cut, ended.exact) == ("5 6", 2, False, 1)
    assert run(stops=(), vocabulary=7, max_tokens=1).cut
    until = run(stops=(), vocabulary=8, max_tokens=3, until="7")
    assert until.text == "5" and not until.cut and until.f1 == pytest.approx(2 / 3)


def test_replies_are_kept(tmp_path):
    asked = [Choice((example,), 0) for example in random_sessions(3, 1)]
    model, lines = bigram(np.random.default_rng(0).normal(size=(cases.VOCAB,) * 2)), []
    how = dict(rows=2, store=Store(tmp_path), identity="w", log=lines.append)
    first = replies.answer(model, build("full"), asked, SAID, **how)
    assert replies.answer(model, build("full"), asked, SAID, **how) == first
    assert "made before" not in lines[0] and "made before" in lines[1]
    replies.answer(model, build("full"), asked, dataclasses.replace(SAID, max_tokens=4), **how)
    assert "made before" not in lines[2]


def test_differences_are_paired():
    """The interval of a difference is of the questions, not of two systems by themselves: equal ones differ by 0."""
    right = [Choice((example,), 0) for example in random_sessions(6, 1)]
    stage = Stage(1, right, wrong_memory_choices(right))
    rigged = lambda hits: [judge("yes" if hit else "no", "yes") for hit in hits]
    loss = [(Scores(np.array([1.0]), np.array([True])),)] * 6
    measured = lambda hits, wrong: perplexity.Measured(
        loss, None if wrong is None else loss, np.ones(6), {}, said=(rigged(hits), wrong and rigged(wrong))
    )
    (row,) = perplexity.summarise(
        [stage],
        {
            "memory": [measured([1, 1, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0])],
            "full": [measured([1, 1, 0, 1, 0, 1], [1, 1, 0, 1, 0, 1])],
            "none": [measured([0] * 6, None)],
        },
        4,
    )
    memory, full, none = (row["systems"][name] for name in ("memory", "full", "none"))
    assert memory["replies"]["exact"].value == pytest.approx(4 / 6) and none["replies"]["contains"].value == 0
    difference = memory["differences"]["exact"]["minus_wrong"]
    assert difference.value == pytest.approx(3 / 6) and 0 < difference.low < 0.5 < difference.high
    equal = full["differences"]["contains"]["minus_wrong"]
    assert (equal.value, equal.low, equal.high) == (0, 0, 0)
    assert memory["differences"]["f1"]["minus_none"].value == pytest.approx(4 / 6)
    assert "differences" not in none and full["wrong"]["replies"]["f1"].value == pytest.approx(4 / 6)
