"""Likelihoods in few shapes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.evals import parity, recurrent, scoring
from jax_ccm.evals.slots import context_slots
from jax_ccm.methods import build
from jax_ccm.nn import RopeScaling, positions
from jax_ccm.rules.examples import Example, Segment
from tests import cases
from tests.evals.support import SMALL, bigram, random_sessions, session
from tests.test_imports import imported

pytestmark = pytest.mark.once


def test_hand_computed_likelihoods():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(8, 8)) * 2
    model = bigram(table)
    # start, 3 4 5, separator, 6 | 7 3
    (found,) = scoring.score(model, build("full"), [session([3, 4, 5], [6, 7, 3], target=2)], rows=2)
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    np.testing.assert_allclose(found.nll, [-log_p[6, 7], -log_p[7, 3]], rtol=1e-5)
    assert found.hit.tolist() == [table[6].argmax() == 7, table[7].argmax() == 3]


def test_scores_do_not_depend_on_batching():
    model = cases.model(tokens=2, config=SMALL)
    method = build("ccm_concat", comp_tokens=2)
    examples = [*random_sessions(3, 1), *random_sessions(2, 5, seed=1), *random_sessions(2, 2, seed=2)]
    lines = []
    together = scoring.score(model, method, examples, rows=4, log=lines.append, name="all")
    (alone,) = scoring.score(model, method, examples[3:4], rows=1)
    np.testing.assert_allclose(together[3].nll, alone.nll, atol=1e-5)
    assert len(lines) == 1 and "7 examples" in lines[0]
    logits = parity.parallel_logits(model, method, examples)
    for scores, row, example in zip(together, logits, examples, strict=True):
        log_p = row - np.log(np.exp(row).sum(1, keepdims=True))
        tail = example.segments[-1]
        expected = -log_p[np.arange(len(row)), tail.tokens[tail.scored]]
        np.testing.assert_allclose(scores.nll, expected, atol=1e-5)


@pytest.mark.parametrize(
    "lengths, rows, cost, expected",
    [
        ([10] * 8 + [100], 4, 0, [10, 100]),
        ([10] * 8 + [11] * 8, 4, 1000, [11]),  # a second compilation would cost more than the padding
        ([10] * 800 + [100] * 800, 4, 1000, [10, 100]),
        ([5], 4, 1000, [5]),
        ([1, 2, 3, 4], 1, 0, [1, 2, 3, 4]),
    ],
)
def test_shapes(lengths, rows, cost, expected):
    assert scoring.shapes(lengths, rows, cost) == expected


def test_store_keeps_scores(tmp_path):
    table = np.random.default_rng(0).normal(size=(8, 8))
    model, examples = bigram(table), [session([3], [6, 7, 3], target=2), session([3], [6, 7, 5], target=1)]
    store, lines = scoring.Store(tmp_path / "s"), []
    run = lambda method, those, identity="w": scoring.score(
        model, method, those, rows=2, store=store, identity=identity, log=lines.append
    )
    first, second = run(build("full"), examples), run(build("full"), examples)
    assert "scored before" not in lines[0] and "scored before" in lines[1]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.nll, b.nll)
        np.testing.assert_array_equal(a.hit, b.hit)
    # Anything that decides the scores makes another file.
    full, none = build("full"), build("none")
    known = [("w", full, examples), ("v", full, examples), ("w", none, examples), ("w", full, examples[::-1])]
    assert len({store.path(*key) for key in known}) == 4
    other = session([3], [6, 7, 3], target=2)
    other.segments[1].scored[1] = False
    assert store.path("w", full, [other]) != store.path("w", full, examples[:1])
    store.path("w", full, examples).write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cannot be read"):
        run(full, examples)


@pytest.mark.parametrize(
    "method",
    [build("full"), build("ccm_concat", comp_tokens=2, sink=True), build("ccm_merge", comp_tokens=2), build("evict")],
    ids=lambda method: method.name,
)
def test_tails_that_are_scored_from_their_first_token(method):
    """The context's last token predicts it: sessions with other tails share their contexts, but not that score."""
    model = cases.model(config=SMALL, tokens=2)
    context, tails = random_sessions(1, 3)[0].segments[:-1], ([20, 21], [22, 21], [20, 23])
    asked = []
    for tokens in tails:
        tail = Segment(np.array(tokens, np.int32), np.ones(2, bool))
        asked.append(Example(np.array([1], np.int32), np.zeros(0, np.int32), (*context, tail)))
    shared = recurrent.score_recurrently(model, method, asked, rows=2)
    for example, (nll, hit) in zip(asked, shared, strict=True):
        (alone,) = scoring.score(model, method, [example])
        np.testing.assert_allclose(nll, alone.nll, atol=1e-5)
        np.testing.assert_array_equal(hit, alone.hit)


@pytest.mark.parametrize(
    "method",
    [build("full"), build("ccm_concat", comp_tokens=2, sink=True), build("ccm_merge", comp_tokens=2), build("evict")],
    ids=lambda method: method.name,
)
def test_a_context_is_read_once_for_all_its_questions(method, monkeypatch):
    """Answers to choose from, and the memory of another session: the same scores as when each is read by itself."""
    model = cases.model(config=SMALL, tokens=2)
    sessions = random_sessions(3, 4)
    tails = [s.segments[-1] for s in random_sessions(4, 1, seed=1)]
    asked = [
        dataclasses.replace(session, segments=(*session.segments[:-1], tail)) for tail in tails for session in sessions
    ]
    read = []
    step = recurrent._step
    monkeypatch.setattr(recurrent, "_step", lambda *args, **kw: read.append(kw["close"]) or step(*args, **kw))
    shared = scoring.score(model, method, asked, rows=3)
    assert sum(read) == 4 and read.count(False) == 4  # chunks and tails of a batch of three sessions
    for example, found in zip(asked, shared, strict=True):
        (alone,) = scoring.score(model, method, [example])
        np.testing.assert_allclose(found.nll, alone.nll, atol=1e-5)
        np.testing.assert_array_equal(found.hit, alone.hit)


def test_sessions_of_which_the_oldest_is_forgotten(tmp_path):
    """What is left of six chunks in room for three is a memory that has heard of three; and the store knows which."""
    model = cases.model(tokens=2, config=SMALL)
    concat, ring = build("ccm_concat", comp_tokens=2), build("ccm_ema", comp_tokens=2, decay=1.0, groups=3)
    examples = [*random_sessions(2, 6), *random_sessions(2, 2, seed=1)]
    store = scoring.Store(tmp_path)
    run = lambda method, **options: scoring.score(model, method, examples, rows=2, store=store, **options)
    growing, constant, replaced = run(concat), run(concat, capacity=6), run(ring)
    for a, b, c, example in zip(growing, constant, replaced, examples, strict=True):
        np.testing.assert_allclose(b.nll, c.nll, atol=1e-5)
        if len(example.segments) == 3:
            np.testing.assert_allclose(a.nll, b.nll, atol=1e-5)
        else:
            assert np.abs(a.nll - b.nll).max() > 1e-3
    assert [context_slots(concat, example, 6) for example in examples] == [6, 6, 4, 4]
    # As much room as is needed is no room at all to forget in: the same scores, kept once.
    roomy, files = run(concat, capacity=12), len(list(tmp_path.iterdir()))
    for a, b in zip(growing, roomy, strict=True):
        np.testing.assert_array_equal(a.nll, b.nll)
    assert files == 3 and not scoring.forgets(concat, examples, 12)


def test_a_changed_library_scores_anew(tmp_path, monkeypatch):
    """The key of stored scores names all code that computes them."""
    root = Path(scoring.__file__).parents[1]
    folder = tmp_path / "jax_ccm"
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("__pycache__"))
    digest = lambda: scoring.code.__wrapped__(folder)
    seen = {digest()}
    for name in ("attention/dispatch.py", "weights/gguf.py", "nn/rope.py", "methods/ccm.py", "evals/scoring.py"):
        with (folder / name).open("a") as file:
            file.write("# changed\n")
        seen.add(digest())
    assert len(seen) == 6
    (folder / "chat.py").write_text("")  # takes no part
    assert digest() in seen
    key = ("w", build("full"), [session([3], [6, 7, 3], target=2)])
    before = scoring.Store(tmp_path).path(*key)
    monkeypatch.setattr(scoring, "code", lambda: "another")
    assert scoring.Store(tmp_path).path(*key) != before


def test_the_parts_that_score_are_all_that_is_imported():
    """What scoring and the loading of weights import, at any depth, is digested."""
    root = Path(scoring.__file__).parents[1]
    todo, seen = [root / "evals" / "scoring.py", root / "weights" / "base.py", root / "weights" / "adapters.py"], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "jax_ccm" and len(parts) > 1:
                module = root.joinpath(*parts[1:])
                todo += [file for file in (module.with_suffix(".py"), module / "__init__.py") if file.is_file()]
    names = {path.relative_to(root).as_posix() for path in seen}
    assert {"nn/transformer.py", "attention/blocks.py", "weights/gguf.py"} <= names
    assert not {name for name in names if name not in scoring.PARTS and name.split("/")[0] not in scoring.PARTS}


def test_sessions_beyond_the_trained_positions_are_warned_of_once(monkeypatch):
    monkeypatch.setattr(positions, "_told", set())
    model = cases.model(config=dataclasses.replace(SMALL, max_position=7))
    short, long = session([3, 4], [6, 7], target=1), session([3, 4, 5, 6], [6, 7, 3], target=1)
    scoring.score(model, build("full"), [short])
    with pytest.warns(UserWarning, match="a session of 9 tokens goes beyond the 7 positions .* method.streaming"):
        scoring.score(model, build("full"), [short, long])
    scoring.score(model, build("full"), [long])
    # Another model with as many positions is another matter; and RoPE that was made for a length serves that length.
    other = dataclasses.replace(model.config, norm_eps=1e-6)
    with pytest.warns(UserWarning, match="a session of 8 tokens goes beyond the 7 positions"):
        positions.warn_beyond(other, build("full"), tokens=8)
    scaling = RopeScaling("dynamic", 2.0, original_max_position=7, length=14)
    positions.warn_beyond(dataclasses.replace(other, rope_scaling=scaling), build("full"), tokens=14)


def test_trimmed_drops_only_what_cannot_matter():
    example = session([3, 4], [5, 6, 7], target=1)
    longer = session([3, 4], [5, 6, 7, 2], target=2)
    longer.segments[-1].scored[-1] = False  # an unscored end of sequence
    np.testing.assert_array_equal(scoring.trimmed(longer).segments[-1].tokens, example.segments[-1].tokens)
    assert scoring.trimmed(example).segments[-1].scored.tolist() == [False, False, True]


def test_base_only_switches_the_lora_off():
    model = cases.model(config=SMALL)
    examples = random_sessions(2, 2)
    on, off = (scoring.score(model, m, examples) for m in (build("full"), scoring.base_only(build("full"))))
    bare = cases.model(config=SMALL, rank=0)
    base = scoring.score(bare, build("full"), examples)
    assert not np.allclose(on[0].nll, off[0].nll, atol=1e-3)
    np.testing.assert_array_equal(off[0].nll, base[0].nll)
