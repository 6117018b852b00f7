"""Generated questions that only their own conversation answers, one task after the other."""

from __future__ import annotations

import re

import pytest

from jax_ccm.data import suite
from jax_ccm.data.conversations import CHOICES
from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError

VALUE = {"train": r"It is (.*)\.", "test": r"That would be (.*)\."}
MANY = 60


def records(name: str, split: str = "train", options: str = "turns=8-16") -> list[dict]:
    (source,) = open_sources([f"generated:{name}?split={split}&size={MANY}&{options}"], "online")
    return [source[index] for index in range(MANY)]


def value(text: str, split: str) -> str:
    found = re.fullmatch(VALUE[split], text)
    assert found
    return found[1]


@pytest.mark.parametrize("name", suite.TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_records(name, split):
    made = records(name, split)
    assert made == records(name, split) and made != records(name, split, "seed=1")
    # How alike the questions of different conversations are: none is asked twice.
    assert len({record["query"] for record in made}) == MANY
    assert {len(record["contexts"]) for record in made} == {6, 8, 10, 12, 14}
    places = {record["choices"].index(record["target"]) for record in made}
    assert places == set(range(CHOICES))
    for record in made:
        assert len(set(record["choices"])) == CHOICES
        assert all(text.strip() for text in (*record["contexts"], record["query"]))
        if name != "counting":
            said = record["contexts"][len(record["contexts"]) - 2 * record["age"] :]
            answer = value(record["target"], split)
            assert record["answers"] == [answer]
            assert any(re.search(rf"\b{answer}\b", text) for text in said) and answer not in record["query"]


@pytest.mark.parametrize("name", suite.TASKS)
def test_splits_share_nothing(name):
    names = {}
    for split in ("train", "validation", "test"):
        made = records(name, split)
        names[split] = {word for record in made for word in re.findall(r"\w+", record["query"])[1:] if len(word) > 5}
        names[split] -= {"person", "letters", "present"}
    assert not names["train"] & names["test"] and not names["validation"] & names["test"]
    assert names["train"] and not set(suite.TEMPLATES["train"].values()) & set(suite.TEMPLATES["test"].values())


@pytest.mark.parametrize("name", suite.TASKS)
def test_ages_and_lengths(name):
    made = records(name, options="turns=64&age=2,8,30")
    assert [record["age"] for record in made[:6]] == [2, 8, 30, 2, 8, 30]
    assert all(len(record["contexts"]) == 62 for record in made)


def test_updates_offer_the_old_values():
    for record in records("updates", options="turns=8-16"):
        key = re.search(r"code of (\w+)", record["query"])
        assert key
        told = [text for text in record["contexts"][::2] if key[1] in text]
        values = [re.search(r"(?:is|it is) (\w+)(?: now)?\.$", text) for text in told]
        values = [found[1] for found in values if found]
        assert 2 <= len(values) == len(told) <= 4 and len(set(values)) == len(values)
        assert value(record["target"], "train") == values[-1]
        assert set(values) <= {value(choice, "train") for choice in record["choices"]}
        place = len(record["contexts"]) - 2 * record["age"]
        assert record["contexts"][place] == told[-1]


def test_distractors_share_half_of_the_key():
    for record in records("distractors"):
        asked = re.fullmatch(r"Which code does (\w+) use for the (\w+)\?", record["query"])
        assert asked
        said = [re.fullmatch(r"For the (\w+), (\w+) uses the code (\w+)\.", t) for t in record["contexts"][::2]]
        shared = [(found[2] == asked[1]) + (found[1] == asked[2]) for found in said if found]
        assert sorted(shared) == [1] * (len(said) - 1) + [2]


def test_two_facts_answer_together():
    for record in records("multi_hop"):
        thing = re.search(r"the (\w+) now", record["query"])
        assert thing
        (given,) = [text for text in record["contexts"] if f"The {thing[1]} went" in text]
        person = given.split()[-1].rstrip(".")
        (lives,) = [text for text in record["contexts"] if text.startswith(f"{person} lives in ")]
        assert lives.split()[-1].rstrip(".") == value(record["target"], "train")
        first = min(map(record["contexts"].index, (given, lives)))
        assert len(record["contexts"]) - 2 * record["age"] == first


def test_counting_counts():
    counts = set()
    for record in records("counting", options="turns=40"):
        key = re.search(r"met (\w+)", record["query"])
        assert key
        met = [place for place, text in enumerate(record["contexts"]) if key[1] in text]
        times = "times" if len(met) > 1 else "time"
        assert record["target"] == f"You met {key[1]} {suite.NUMBERS[len(met) - 1]} {times}."
        assert len(record["contexts"]) - 2 * record["age"] == met[-1]
        counts.add(len(met))
    assert counts == set(range(1, 7))


@pytest.mark.parametrize(
    "source, says",
    [
        ("generated:multi_hop?age=1", "age=1 leaves no exchange .* at least 2"),
        ("generated:updates?turns=8&age=3", "takes turns of at least 10"),
        ("generated:needle?turns=3", "takes turns of at least 4"),
        ("generated:needel", "did you mean 'needle'"),
        ("generated:needle?hops=2", "option of"),
    ],
)
def test_mistakes(source, says):
    with pytest.raises(UserError, match=says):
        open_sources([source], "online")
