"""The generator: same everywhere, train and test apart, answers that need memory."""

import hashlib
import json
import re

import pytest

from jax_ccm.data import conversations
from jax_ccm.data.conversations import dialogue, entities, parse_turns, question
from jax_ccm.errors import UserError

LENGTHS = range(3, 17)
SPLITS = ("train", "validation", "test")


def strings(tree):
    if isinstance(tree, str):
        yield tree
    else:
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from strings(branch)


def test_templates_are_disjoint():
    facts, talk = conversations.wordlist("facts"), conversations.wordlist("talk")
    train, test = (
        {text for fact in facts.values() for text in strings(fact[split])} | set(strings(talk[split]))
        for split in ("train", "test")
    )
    assert not train & test
    assert len(train) > 500 and len(test) > 250


def test_entities_are_disjoint():
    computed = (
        "age",
        "guests",
        "number",
        "price",
        "room_number",
        "morning",
        "office_hours",
        "time",
        "date",
        "seat",
        "code",
        "spot",
    )
    names = (*conversations.wordlist("entities"), *computed)
    # Across lists too, but not across kinds of numbers: 60 may be an age here and a price there, by the same rule.
    split_of = {}
    for name in names:
        sets = {split: set(entities(name, split)) for split in SPLITS}
        assert all(
            len(found) >= (2 if name in ("species", "room", "item", "relation", "acquaintance", "when") else 4)
            for found in sets.values()
        )
        for split, found in sets.items():
            for entity in found:
                key = re.sub(r"^(a|an|the) ", "", entity.lower())
                assert split_of.setdefault(key, split) == split, (name, entity)
    assert len(split_of) > 3000


def test_values_that_appear_are_disjoint():
    """In what is generated, not only in the lists: the values of the questions' choices."""
    found = {}
    for split in SPLITS:
        talks = [conversations._make(split, 0, index, LENGTHS)[0] for index in range(300)]
        found[split] = {(fact.kind, fact.slots["v"]) for talk in talks for fact in talk.facts}
    assert not found["train"] & found["test"] and not found["validation"] & (found["train"] | found["test"])


def test_the_same_on_every_machine():
    text = json.dumps([question(split, 7, index, LENGTHS) for split in SPLITS for index in range(20)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a4cd064fddc25903"
    assert dialogue("train", 0, 3, LENGTHS) == dialogue("train", 0, 3, LENGTHS) != dialogue("train", 1, 3, LENGTHS)


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_in_the_context_and_nowhere_else(split):
    for index in range(300):
        talk, fact, answer = conversations._make(split, 0, index, LENGTHS)
        *contexts, query, target = talk.turns
        value = fact.slots["v"]
        assert value.lower() in " ".join(contexts).lower()
        assert not re.search(rf"\b{re.escape(value)}\b", query, re.I), (value, query)
        assert target == answer() and value.lower() in target.lower()
        told = max(number for number, turn in enumerate(contexts) if value.lower() in turn.lower())
        for old in fact.past:  # the latest value counts: it comes up last
            if not any(other is not fact and old in other.slots.values() for other in talk.facts):
                first = min(number for number, turn in enumerate(contexts) if old.lower() in turn.lower())
                assert first <= told


@pytest.mark.parametrize("split", SPLITS)
def test_questions(split):
    for index in range(300):
        record = question(split, 0, index, LENGTHS)
        assert len(set(record["choices"])) == conversations.CHOICES
        assert record["target"] in record["choices"]
        assert [*record["contexts"], record["query"], record["target"]] == dialogue(split, 0, index, LENGTHS)["turns"]
    places = [
        question(split, 0, i, LENGTHS)["choices"].index(question(split, 0, i, LENGTHS)["target"]) for i in range(200)
    ]
    assert all(25 < places.count(place) < 75 for place in range(4))


def test_superseded_values_are_among_the_choices():
    changed = 0
    for index in range(300):
        _, fact, answer = conversations._make("train", 0, index, LENGTHS)
        if fact.past and fact.past[-1] != fact.slots["v"]:
            changed += 1
            assert answer(value=fact.past[-1]) in question("train", 0, index, LENGTHS)["choices"]
    assert changed > 10


def test_turns_look_like_talk():
    turns = [turn for split in SPLITS for i in range(200) for turn in dialogue(split, 0, i, LENGTHS)["turns"]]
    words = [len(turn.split()) for turn in turns]
    assert max(words) <= 40 and 8 < sum(words) / len(words) < 18
    for turn in turns:
        assert (turn[0].isupper() or turn[0].isdigit()) and turn[-1] in ".!?"
        assert not re.search(r"[{}]|\s\s|\ba [aeiou]\w* named| i | a a | the the |\bI is\b|\byou am\b", turn), turn
    assert len(set(turns)) > 0.8 * len(turns)
    lengths = {len(dialogue("train", 0, i, LENGTHS)["turns"]) for i in range(300)}
    assert lengths == set(LENGTHS)


def test_second_person():
    said = "I bought it for myself, I am glad; my sister and I'm sure I was seen by me"
    assert conversations.second_person(said) == (
        "you bought it for yourself, you are glad; your sister and you're sure you were seen by you"
    )


@pytest.mark.parametrize(("text", "lengths"), [("4-6", (4, 5, 6)), ("3,14", (3, 14)), ("5", (5,))])
def test_parse_turns(text, lengths):
    assert parse_turns(text) == lengths


@pytest.mark.parametrize("text", ["", "6-4", "2-5", "4-99", "a", "4,,5", "4-"])
def test_parse_turns_errors(text):
    with pytest.raises(UserError, match="give a range 4-16 or a list"):
        parse_turns(text)
