"""Generated conversations of a user and an assistant: reproducible, answerable only from what was told."""

import dataclasses
import re
import string

import pytest

from jax_ccm.data import chats, conversations, varied
from jax_ccm.data.chats import Making
from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError

ANY = Making(tuple(range(6, 25)))


def test_every_kind_of_fact_has_questions_in_words_of_its_split():
    facts, own = conversations.wordlist("facts"), conversations.wordlist("chats")
    for split in ("train", "test"):
        assert own[split]["ask"].keys() == facts.keys()
        for kind, entry in facts.items():
            for text in (*own[split]["ask"][kind], *own[split]["say"].get(kind, ())):
                fields = {field for _, field, _, _ in string.Formatter().parse(text) if field}
                assert fields <= {"v", *entry["slots"]}
        assert all(len(pair) == 2 for pair in own[split]["chat"])
    texts = lambda split: {text for those in own[split]["ask"].values() for text in those}
    assert not texts("train") & texts("test")
    assert not {str(pair) for pair in own["train"]["chat"]} & {str(pair) for pair in own["test"]["chat"]}


@pytest.mark.parametrize("wide", [False, True])
def test_varied_kinds_of_facts_are_of_one_split(wide):
    """Neither what it is told of nor a sentence of validation or test stands in training."""
    kinds = {split: varied.kinds(split, wide) for split in ("train", "validation", "test")}
    sentences = {
        split: {text for kind in found.values() for part in ("say", "ask", "wh") for text in kind[part]}
        for split, found in kinds.items()
    }
    assert not sentences["train"] & (sentences["validation"] | sentences["test"])
    assert len(kinds["train"]) > 250 and all(len(found) > 30 for found in kinds.values())
    for split, found in kinds.items():
        for kind, entry in found.items():
            for part in ("say", "wh", "ask", "react", "change"):
                own = {"v", *entry["slots"]} | ({"old"} if part == "change" else set())
                for text in entry[part]:
                    fields = {field for _, field, _, _ in string.Formatter().parse(text) if field}
                    assert fields <= own and (part not in ("say", "change") or "v" in fields), (kind, text)
        for other in kinds.keys() - {split}:
            assert not found.keys() & kinds[other].keys()
    assert all(varied.kinds(split, wide) == varied.kinds(split) for split in ("validation", "test"))
    if wide:
        assert len(kinds["train"]) > 350 and len(sentences["train"]) > 3 * len(
            {text for kind in varied.kinds("train").values() for part in ("say", "ask", "wh") for text in kind[part]}
        )
    for family in conversations.wordlist("varied").values():
        for part in ("say", "ask") if "say" in family["train"] else ():
            splits = [set(family[split][part]) for split in kinds]
            assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


@pytest.mark.parametrize("split, wide", [("train", 0.0), ("train", 1.0), ("validation", 0.0), ("test", 0.0)])
def test_varied_facts_are_asked_for_once_they_are_told_and_have_one_answer(split, wide):
    found = set()
    for index in range(60):
        making = Making(tuple(range(12, 50)), arbitrary=0.3, quoted=0.1, varied=1.0, wide=wide)
        made, fact, _ = chats._hold(split, 0, index, making)
        assert fact.slots["v"].lower() in made.turns[-1].lower() and "{" not in " ".join(made.turns)
        assert fact.slots["v"].lower() in made.turns[fact.told].lower()
        members = [made.varied[other.kind]["member"] for other in made.facts if other.kind in made.varied]
        assert len(members) == len(set(members))
        found |= {other.kind for other in made.facts}
    assert len(found & varied.kinds(split).keys()) > 30
    for index in range(40):
        record = chats.question(split, 1, index, Making((14,), (3,), varied=1.0, wide=wide))
        assert record["target"] in record["choices"] and len(set(record["choices"])) == conversations.CHOICES
    # So many facts that kinds run out.
    assert len(chats.chat("validation", 0, 1, Making((200,), varied=1.0))["turns"]) == 200


def test_invented_words_of_a_split_are_not_those_of_another():
    """Whatever syllables come before: no word of one split ends as those of another do."""
    last = [onset + vowel for onset in chats.ONSETS for vowel in chats.VOWELS]
    words = {split: {part + end for part in last for end in ends} for split, ends in chats.ENDINGS.items()}
    for split, ends in chats.ENDINGS.items():
        for other in words.keys() - {split}:
            assert not [word for word in words[other] for end in ends if end and word.endswith(end)], (split, other)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_last_answer_was_told_before(split):
    for index in range(60):
        made, fact, answer = chats._hold(split, 0, index, ANY)
        assert len(made.turns) % 2 == 0 and 6 <= len(made.turns) <= 24 and all(turn.strip() for turn in made.turns)
        value = fact.slots["v"]
        assert value.lower() in made.turns[-1].lower() and value.lower() in made.turns[fact.told].lower()
        assert made.turns == chats.chat(split, 0, index, ANY)["turns"]  # the same again
        scored = chats.chat(split, 0, index, ANY)["scored"]
        assert scored[-1] == len(made.turns) - 1 and all(turn % 2 for turn in scored)
        # A superseded value is not the answer.
        assert all(old.lower() not in made.turns[-1].lower() or old in value for old in fact.past)


@pytest.mark.parametrize("age", [1, 3, 8])
def test_the_age_of_the_fact_that_is_asked_for(age):
    for index in range(40):
        made, fact, _ = chats._hold("test", 1, index, Making((18, 20), (age,)))
        assert (len(made.turns) - 2 - fact.told) // 2 == age
        between = " ".join(made.turns[fact.told + 2 : -2]).lower()
        if len(fact.slots["v"]) > 4:  # a short number may stand in another
            assert fact.slots["v"].lower() not in between


def test_choices_and_long_conversations():
    for index in range(40):
        record = chats.question("validation", 0, index, Making((12,), (2,)))
        assert record["target"] in record["choices"] and len(set(record["choices"])) == conversations.CHOICES
        assert len(record["contexts"]) == 10
        assert [*record["contexts"], record["query"], record["target"]] == chats.chat(
            "validation", 0, index, Making((12,), (2,))
        )["turns"]
    long = chats.chat("test", 0, 0, Making((400,), (199,)))["turns"]
    assert len(long) == 400


def test_one_conversation_is_asked_for_facts_of_several_ages():
    ages = (1, 4, 16, 30)
    for number in range(6):
        asked = [chats.question("test", 0, 4 * number + own, Making((64,), ages)) for own in range(4)]
        assert tuple(record["age"] for record in asked) == ages
        contexts = [record["contexts"] for record in asked]
        assert all(context == contexts[0] for context in contexts) and len(contexts[0]) == 62
        assert len({record["query"] for record in asked}) == 4
        for record in asked:
            assert record["target"] in record["choices"]
    # There are fewer kinds of facts than ages to come and turns to fill.
    everything = chats.question("test", 0, 31, Making((400,), tuple(range(1, 1 + chats.MOST_AGES))))
    assert everything["age"] == chats.MOST_AGES


def test_arbitrary_values_are_words_of_their_split():
    values = {
        split: {chats.chat(split, 0, index, Making((4,), arbitrary=1.0))["turns"][-1] for index in range(50)}
        for split in ("train", "validation", "test")
    }
    assert not values["train"] & values["test"]
    words = {split: set(chats.words(split)) for split in values}
    assert not words["train"] & words["test"] and not words["train"] & words["validation"]
    said = " ".join(values["train"]).lower().replace(".", "").split()
    assert len(words["train"].intersection(said)) > 20
    assert all(text.isprintable() for those in values.values() for text in those)


def test_wordy_turns_are_no_answers():
    rambling = conversations.wordlist("chats")["test"]["ramble"]
    pattern = lambda text: "[A-Za-z ]+".join(map(re.escape, re.split("{[wN]}", text)))
    ends = re.compile(f"({'|'.join(map(pattern, rambling))})$")
    for index in range(20):
        record = chats.chat("test", 0, index, Making((12,), wordy=1.0))
        for turn in range(1, 12, 2):
            assert bool(ends.search(record["turns"][turn])) == (turn not in record["scored"]), record["turns"][turn]


def test_a_share_of_the_reactions_is_scored():
    """Beside every answer; with all of them nothing is left to ramble."""
    made = lambda **shares: [chats.chat("train", 3, index, Making((12,), **shares)) for index in range(60)]
    assert all(record["scored"] == list(range(1, 12, 2)) for record in made(reactions=1.0, wordy=1.0))
    counts = [sum(len(record["scored"]) for record in made(reactions=share)) for share in (0.0, 0.5, 1.0)]
    assert counts[2] == 360 and 0.4 < (counts[1] - counts[0]) / (counts[2] - counts[0]) < 0.6
    rambling = conversations.wordlist("chats")["train"]["ramble"]
    first = {re.split("{[wN]}", text)[0] for text in rambling}
    for record in made(reactions=0.5, wordy=1.0):
        said = [record["turns"][turn] for turn in record["scored"]]
        assert not any(f" {start}" in text for text in said for start in first if len(start) > 8), said


def test_facts_are_changed_more_often_and_the_newest_value_is_the_answer():
    def held(changes):
        return [chats._hold("train", 5, index, Making((40,), varied=0.5, changes=changes)) for index in range(40)]

    counts = [sum(len(fact.past) for chat, *_ in held(share) for fact in chat.facts) for share in (0.0, 0.2)]
    assert 0 < 2 * counts[0] < counts[1]
    asked = [(fact, answer) for _, fact, answer in held(0.4) if fact.past]
    assert len(asked) > 10
    for fact, answer in asked:
        assert fact.slots["v"].lower() in answer().lower()
        for old in set(fact.past) - {fact.slots["v"]}:
            assert not re.search(rf"(?<!\w){re.escape(old)}(?!\w)", answer(), re.IGNORECASE)


def test_quotes_repeat_an_earlier_turn_and_nothing_that_is_kept_for_last():
    quoted, plain = 0, Making((14,), (2, 5))
    for index in range(60):
        chat, fact, _ = chats._hold("train", 0, index, dataclasses.replace(plain, quoted=1.0))
        kept = [chat.turns[other.told] for other in chat.kept_for_last.values()]
        for turn in chat.scored[:-1]:
            asked = chat.turns[turn - 1]
            if re.match("Repeat|Say|Please|What were|Quote|What did I write", asked):
                said = [text for text in chat.turns[: turn - 1 : 2] if text in chat.turns[turn]]
                assert said and not set(said) & set(kept), (asked, chat.turns[turn])
                if "last message" in asked or "before this" in asked:
                    assert chat.turns[turn - 3] in said
                quoted += 1
        assert fact.slots["v"].lower() in chat.turns[-1].lower() and chat.scored[-1] == len(chat.turns) - 1
    assert quoted > 50


def test_as_a_source():
    (source,) = open_sources(["generated:chats?split=test&size=3&seed=2&turns=8-10&age=2"], "dialogue")
    assert len(source) == 3 and source[1] == chats.chat("test", 2, 1, Making((8, 9, 10), (2,)))
    (asked,) = open_sources(["generated:chat_questions?split=test&size=3&seed=2&turns=8,10"], "online")
    assert asked[2] == chats.question("test", 2, 2, Making((8, 10)))
    for wrong, says in {
        "generated:chats?age=0": "age='0' must be a whole number, at least 1",
        "generated:chats?age=4,4": "age='4,4' must be a whole number, at least 1, or up to 32 different ones",
        "generated:chats?arbitrary=half": "arbitrary='half' must be a number from 0 to 1",
        "generated:chats?arbitrary=1.5": "arbitrary='1.5' must be a number from 0 to 1",
        "generated:chats?turns=4-8&age=4": "takes turns of at least 10",
        "generated:chats?turns=3": "takes turns of at least 4",
        "generated:chats?facts=3": "option of",
        "generated:chats?turns=4-5000": "from 3 to 4000",
        "generated:conversations?age=3": "option of",
    }.items():
        with pytest.raises(UserError, match=says):
            open_sources([wrong], "dialogue")
    with pytest.raises(UserError, match="gives records for format 'dialogue'"):
        open_sources(["generated:chats"], "online")
