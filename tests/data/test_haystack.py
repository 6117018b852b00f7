"""Worlds and needles between sentences of books: what is asked for follows from what is told, at any length."""

from __future__ import annotations

import collections
import json
import re

import pytest

from jax_ccm.data import ruler, worlds
from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError

MANY = 80
WALK = re.compile(rf"(\w+) (?:{'|'.join(worlds.WALKED)}) the (\w+)\.")
TAKE = re.compile(rf"(\w+) (?:{'|'.join(worlds.TOOK)}) the (\w+) there\.")
LEAVE = re.compile(rf"(\w+) (?:{'|'.join(worlds.LEFT)}) the (\w+)\.")
GIVE = re.compile(rf"(\w+) (?:{'|'.join(worlds.GAVE)}) the (\w+) to (\w+)\.")
SIDE = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")


def records(source: str, split: str = "test") -> list[dict]:
    (opened,) = open_sources([f"generated:{source}&split={split}&size={MANY}"], "online")
    return [opened[index] for index in range(MANY)]


def answer(query: str, told: list[str]) -> str:
    """Worked out from the sentences alone."""
    rooms, holders, trails, gifts, sides = {}, {}, collections.defaultdict(list), [], []

    def at(thing):
        place = rooms[holders[thing]]
        if trails[thing][-1:] != [place]:
            trails[thing].append(place)

    for sentence in told:
        if found := WALK.fullmatch(sentence):
            rooms[found[1]] = found[2]
            for thing in [thing for thing, person in holders.items() if person == found[1]]:
                at(thing)
        elif found := TAKE.fullmatch(sentence):
            assert found[2] not in holders and trails[found[2]][-1:] in ([], [rooms[found[1]]])
            holders[found[2]] = found[1]
            at(found[2])
        elif found := LEAVE.fullmatch(sentence):
            assert holders.pop(found[2]) == found[1]
        elif found := GIVE.fullmatch(sentence):
            assert holders[found[2]] == found[1] != found[3]
            holders[found[2]] = found[3]
            gifts.append(found.groups())
        elif found := SIDE.fullmatch(sentence):
            sides.append(found.groups())
    if found := re.fullmatch(r"Where is (\w+)\?", query):
        return rooms[found[1]]
    if found := re.fullmatch(r"Where is the (\w+)\?", query):
        return trails[found[1]][-1]
    if found := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", query):
        assert trails[found[1]][-1] == found[2]
        return trails[found[1]][-2]
    if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", query):
        return one(side[0] for side in sides if side[1:] == found.groups())
    if found := re.fullmatch(r"What is the (\w+) (\w+) of\?", query):
        return one(side[2] for side in sides if side[:2] == found.groups())
    if found := re.fullmatch(r"What did (\w+) give to (\w+)\?", query):
        return one(thing for giver, thing, to in gifts if (giver, to) == found.groups())
    if found := re.fullmatch(r"Who gave the (\w+) to (\w+)\?", query):
        return one(giver for giver, thing, to in gifts if (thing, to) == found.groups())
    if found := re.fullmatch(r"Who did (\w+) give the (\w+) to\?", query):
        return one(to for giver, thing, to in gifts if (giver, thing) == found.groups())
    found = re.fullmatch(r"Who received the (\w+)\?", query)
    assert found
    return one(to for _, thing, to in gifts if thing == found[1])


def one(options) -> str:
    (found,) = options
    return found


def sentences(record: dict) -> list[str]:
    return re.split(r"(?<=[.!?]) ", " ".join(record["contexts"]))


@pytest.mark.parametrize("task", worlds.TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_worlds(task, split):
    """Nothing that cannot be happens in a world, and its question has the one answer that follows."""
    made = records(f"babi?task={task}&words=150&chunk=30", split)
    for record in made:
        assert record["target"] == answer(record["query"], sentences(record)) and record["task"] == task
        assert record["target"] in record["choices"] and len(set(record["choices"])) == len(record["choices"])
        assert max(len(context.split()) for context in record["contexts"]) <= 30
        assert 130 < sum(len(context.split()) for context in record["contexts"]) < 170
        # What is forgotten before the age cannot be answered any more, or at least not for certain.
        assert 1 <= record["age"] <= len(record["contexts"])
    assert made == records(f"babi?task={task}&words=150&chunk=30", split)
    assert len({record["query"] + record["target"] for record in made}) > 5
    assert len({record["age"] for record in made}) > 1


def test_age_is_that_of_the_first_fact_that_is_needed():
    for record in records("babi?task=qa1&words=100&chunk=8"):
        name = record["query"].split()[-1].rstrip("?")
        said = record["contexts"][-record["age"]]
        assert f"{name} " in said and record["target"] in said
        assert not any(WALK.match(text) and text.startswith(name) for text in record["contexts"][-record["age"] :][1:])


def test_splits_of_worlds_share_nothing():
    for kind in range(3):
        casts = [set(worlds.CAST[split][kind]) for split in ("train", "validation", "test")]
        assert len(set.union(*casts)) == sum(map(len, casts))


def test_books(tmp_path):
    """Sentences of books stand in between, in their order from somewhere on."""
    book = tmp_path / "books.jsonl"
    said = [f"Sentence number\n{number} of it." for number in range(50)]
    book.write_text(json.dumps({"text": " ".join(said)}), encoding="utf-8")
    starts = set()
    for record in records(f"babi?task=qa1&words=200&books={book}"):
        numbers = [int(found) for found in re.findall(r"Sentence number (\d+) of it\.", " ".join(record["contexts"]))]
        assert len(numbers) > 20 and numbers == [(numbers[0] + place) % 50 for place in range(len(numbers))]
        starts.add(numbers[0])
    assert len(starts) > 5
    with pytest.raises(UserError, match="nowhere.txt cannot be read"):
        open_sources(["generated:babi?books=nowhere.txt"], "online")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="there is no text in it"):
        open_sources([f"generated:ruler?books={tmp_path / 'empty.txt'}"], "online")


@pytest.mark.parametrize("task", ruler.TASKS)
def test_ruler(task):
    """The answers follow from the text by what the task says of it."""
    for record in records(f"ruler?task={task}&words=240&chunk=40"):
        text, answers = " ".join(record["contexts"]), record["target"].split(", ")
        assert max(len(context.split()) for context in record["contexts"]) <= 40
        if task.startswith("niah"):
            keys = record["query"].split(" for ")[1].removesuffix(" mentioned in the provided text?").split(", ")
            assert answers == [
                value
                for key, value in re.findall(r"One of the special magic numbers for (\w+) is: (\d+)\.", text)
                if key in keys
            ]
            assert len(answers) == (1 if task in ("niah_single", "niah_multikey") else ruler.NEEDLES)
            assert ("choices" in record) == (len(answers) == 1)
        elif task == "vt":
            (value,) = re.findall(r"the value (\d+) ", record["query"])
            held = {}
            for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
                held[name] = held.get(given, given)
            assert answers == [name for name, given in held.items() if given == value]
            assert len(answers) == ruler.HOPS + 1 and len(held) == (1 + ruler.CHAINS) * len(answers)
        else:
            listed = re.findall(r"\d+\. (\w+)" if task == "cwe" else r"(\w+) \.\.\.", text)
            counted, count = collections.Counter(listed).most_common(), len(answers)
            assert {word for word, _ in counted[:count]} == set(answers)
            assert counted[count - 1][1] > counted[count][1]
            # In their order where they differ.
            assert task == "cwe" or answers == [word for word, _ in counted[:count]]


def test_lengths_beyond_those_of_training():
    (short,), (long,) = (
        [records(f"ruler?task=niah_single&words={words}")[0] for _ in range(1)] for words in (100, 6000)
    )
    assert len(short["contexts"]) < 4 and len(long["contexts"]) > 90


def test_options_that_cannot_be():
    for options, why in (
        ("babi?task=qa6", "did you mean|qa5"), ("ruler?task=vt,nothing", "'nothing'"),
        ("babi?facts=2", "facts='2' must be a whole number, at least 4"), ("ruler?words=0", "at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            records(options)
