"""What a question asks for is told otherwise, and nothing else is changed."""

from __future__ import annotations

import pytest

from jax_ccm.data.exchanging import exchanged
from jax_ccm.data.sources import open_sources


def record(contexts, target, *choices):
    return {"contexts": list(contexts), "query": "?", "target": target, "choices": [*choices, target]}


@pytest.mark.parametrize(
    "given, expected",
    [
        # Words, numbers, the article with its noun.
        (record(["I live in Lisbon."], "You live in Lisbon.", "You live in Porto."), ["I live in Porto."]),
        (record(["My code is 4711, yes."], "It is 4711.", "It is 4218."), ["My code is 4218, yes."]),
        (record(["I am a postman."], "You are a postman.", "You are an optician."), ["I am an optician."]),
        # In whatever case, with its own; in every context; not within a word.
        (
            record(["Emerald coats!", "My emerald coat", "emeralds"], "Emerald.", "Cobalt blue."),
            ["Cobalt blue coats!", "My cobalt blue coat", "emeralds"],
        ),
        # The first choice that nobody has spoken of.
        (record(["At Oak, or at Elm."], "At Oak.", "At Elm.", "At Ash."), ["At Ash, or at Elm."]),
        (record(["At Oak, or at Elm."], "At Oak.", "At Elm."), ["At Elm, or at Elm."]),
        # What is like an expression is none, and what replaces it is no template.
        (record(["It costs 3.5 (net)"], "It costs 3.5.", r"It costs \1."), [r"It costs \1 (net)"]),
        # Nothing was told word for word, or there is no choice.
        (record(["I deliver letters."], "You are a postman.", "You are a welder."), None),
        (record(["hello"], "hello"), None),
        ({"contexts": ["a"], "query": "b", "target": "a"}, None),
    ],
)
def test_what_is_exchanged(given, expected):
    before = list(given["contexts"])
    assert exchanged(given) == expected
    assert given["contexts"] == before


@pytest.mark.parametrize("name", ["chat_questions", "questions", "updates"])
def test_generated_questions_are_told_otherwise(name):
    """Nearly all of them, in the turns that say the answer; no other answer is then told."""
    (source,) = open_sources([f"generated:{name}?split=test&size=40&seed=3"], "online")
    found = 0
    for number in range(40):
        given = source[number]
        told = exchanged(given)
        if told is None:
            continue
        found += 1
        (own,) = given["answers"]
        changed = [(a, b) for a, b in zip(given["contexts"], told, strict=True) if a != b]
        assert changed and len(told) == len(given["contexts"])
        assert not any(f" {own.lower()} " in f" {b.lower()} " for _, b in changed)
    assert found > 30
