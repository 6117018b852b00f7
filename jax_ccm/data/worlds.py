"""Small worlds in which people walk, carry and give things: the tasks 1 to 5 of bAbI (Weston et al. 2016), generated.

Between sentences of books they are what BABILong asks for (Kuratov et al. 2024). Sentences, and for the test the
people, places and things, are those of bAbI; training and validation have others.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from jax_ccm.data import haystack

# People, places and things of each split.
CAST = {
    "train": (
        ("Anna", "Peter", "Nora", "Simon", "Ella", "Victor"),
        ("attic", "cellar", "garage", "library", "pantry", "terrace", "cabin", "workshop"),
        ("lamp", "umbrella", "letter", "basket", "violin", "hammer"),
    ),
    "validation": (
        ("Julie", "Fred", "Bill", "Emily"),
        ("school", "cinema", "park", "station", "harbor", "museum"),
        ("cake", "ticket", "map", "camera"),
    ),
    "test": (
        ("Mary", "John", "Sandra", "Daniel"),
        ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office"),
        ("apple", "football", "milk"),
    ),
}
WALKED = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
TOOK = ("took", "got", "grabbed", "picked up")
LEFT = ("dropped", "left", "put down", "discarded")
GAVE = ("gave", "handed", "passed")
WAYS = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclasses.dataclass
class Asked:
    """A question about a world.

    Attributes:
      query: its text.
      answer: a word.
      choices: what could be the answer.
      facts: numbers of the facts that tell it, the last that is needed behind the others.
    """

    query: str
    answer: str
    choices: Sequence[str]
    facts: list[int]


class World:
    """A world of a split, in which one thing after the other happens.

    Attributes:
      told: what has happened, a sentence each.
      rooms: person -> (place, number of the fact that tells it).
      holders: thing -> (person, number of the fact).
      trails: thing -> the places where it was, in order, with the fact that tells each.
      gifts: (giver, thing, receiver, number of the fact), in order.
    """

    def __init__(self, split: str, rng: random.Random):
        self.people, self.places, self.things = CAST[split]
        self.rng = rng
        self.told: list[str] = []
        self.rooms: dict[str, tuple[str, int]] = {}
        self.holders: dict[str, tuple[str, int]] = {}
        self.trails: dict[str, list[tuple[str, int]]] = {thing: [] for thing in self.things}
        self.gifts: list[tuple[str, str, str, int]] = []

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.random() * len(options))]

    def walk(self) -> None:
        person = self.pick(self.people)
        here = self.rooms.get(person, ("", 0))[0]
        place = self.pick([place for place in self.places if place != here])
        self.rooms[person] = (place, len(self.told))
        for thing, (holder, _) in self.holders.items():
            if holder == person:
                self._is_at(thing, place)
        self.told.append(f"{person} {self.pick(WALKED)} the {place}.")

    def carry(self) -> None:
        """Somebody takes a thing, lays one down, or walks."""
        person, turn = self.pick(self.people), self.rng.random()
        own = [thing for thing, (holder, _) in self.holders.items() if holder == person]
        # What nobody has seen may be anywhere; what lies somewhere is taken there.
        here = self.rooms.get(person, ("", 0))[0]
        free = [thing for thing in self.things if thing not in self.holders and self._lies(thing) in (None, here)]
        if own and turn < 0.2:
            thing = self.pick(own)
            del self.holders[thing]
            self.told.append(f"{person} {self.pick(LEFT)} the {thing}.")
        elif free and here and turn < 0.5:
            thing = self.pick(free)
            self.holders[thing] = (person, len(self.told))
            self._is_at(thing, here)
            self.told.append(f"{person} {self.pick(TOOK)} the {thing} there.")
        else:
            self.walk()

    def give(self) -> None:
        """Somebody takes a thing, or gives one that they hold."""
        held = list(self.holders.items())
        if held and self.rng.random() < 0.6:
            thing, (giver, _) = self.pick(held)
            receiver = self.pick([person for person in self.people if person != giver])
            self.holders[thing] = (receiver, len(self.told))
            self.gifts.append((giver, thing, receiver, len(self.told)))
            self.told.append(f"{giver} {self.pick(GAVE)} the {thing} to {receiver}.")
        else:
            self.carry()

    def _lies(self, thing: str) -> str | None:
        return self.trails[thing][-1][0] if self.trails[thing] else None

    def _is_at(self, thing: str, place: str) -> None:
        if self._lies(thing) != place:
            self.trails[thing].append((place, len(self.told)))


def where_person(world: World, count: int) -> Asked | None:
    for _ in range(count):
        world.walk()
    person = world.pick(sorted(world.rooms))
    place, fact = world.rooms[person]
    return Asked(f"Where is {person}?", place, world.places, [fact])


def where_thing(world: World, count: int) -> Asked | None:
    for _ in range(count):
        world.carry()
    seen = [thing for thing in world.things if world.trails[thing]]
    if not seen:
        return None
    thing = world.pick(seen)
    place, fact = world.trails[thing][-1]
    return Asked(f"Where is the {thing}?", place, world.places, [fact])


def where_before(world: World, count: int) -> Asked | None:
    for _ in range(count):
        world.carry()
    moved = [thing for thing in world.things if len(world.trails[thing]) > 1]
    if not moved:
        return None
    thing = world.pick(moved)
    # The last time that it came there counts.
    (before, first), (place, last) = world.trails[thing][-2:]
    return Asked(f"Where was the {thing} before the {place}?", before, world.places, [first, last])


def directions(world: World, count: int) -> Asked | None:
    """Of three places in a row or around a corner, the first is beside the second, and the second beside the third."""
    first, second, third = (world.pick(world.places) for _ in range(3))
    ways = [world.pick(sorted(WAYS)) for _ in range(2)]
    if len({first, second, third}) < 3 or ways[1] == WAYS[ways[0]]:
        return None
    pairs = [(first, ways[0], second), (second, ways[1], third)]
    if world.rng.random() < 0.5:
        pairs.reverse()
    world.told = [f"The {one} is {way} of the {other}." for one, way, other in pairs]
    fact = int(world.rng.random() * 2)
    one, way, other = pairs[fact]
    if world.rng.random() < 0.5:
        return Asked(f"What is {way} of the {other}?", one, world.places, [fact])
    return Asked(f"What is the {one} {way} of?", other, world.places, [fact])


def gifts(world: World, count: int) -> Asked | None:
    for _ in range(count):
        world.give()
    if not world.gifts:
        return None
    giver, thing, receiver, fact = world.pick(world.gifts)
    asked = [
        (f"What did {giver} give to {receiver}?", thing, world.things, lambda gift: (gift[0], gift[2])),
        (f"Who gave the {thing} to {receiver}?", giver, world.people, lambda gift: (gift[1], gift[2])),
        (f"Who did {giver} give the {thing} to?", receiver, world.people, lambda gift: (gift[0], gift[1])),
        (f"Who received the {thing}?", receiver, world.people, lambda gift: gift[1]),
    ]
    query, answer, choices, key = world.pick(asked)
    # A question with two answers would be none.
    if sum(key(gift) == key((giver, thing, receiver)) for gift in world.gifts) > 1:
        return None
    return Asked(query, answer, choices, [fact])


# bAbI's name of a task -> what happens and is asked.
TASKS: dict[str, Callable[[World, int], Asked | None]] = {
    "qa1": where_person, "qa2": where_thing, "qa3": where_before, "qa4": directions, "qa5": gifts,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Making:
    """How questions about worlds are made.

    Attributes:
      tasks: keys of `TASKS`, taken in turn.
      facts: what happens in a world; task 4 always tells two.
      words: of a record, about; none but those of the facts if these are more.
      chunk: most words of a context.
      books: a file or folder with books, as ``pg19:`` reads them, for the sentences in between; "" for small talk.
    """

    tasks: tuple[str, ...]
    facts: int
    words: int
    chunk: int
    books: str


def question(split: str, seed: int, index: int, making: Making) -> dict[str, Any]:
    """Record number ``index``: ``{"contexts", "query", "target", "choices", "age", "task"}``.

    ``age`` counts contexts, from that of the first fact that the answer needs.
    """
    task = making.tasks[index % len(making.tasks)]
    rng = random.Random(f"babi/{task}/{split}/{seed}/{index}")
    asked = None
    while asked is None:
        world = World(split, rng)
        asked = TASKS[task](world, making.facts)
    said, places = haystack.hidden(world.told, making.books, split, making.words, rng)
    contexts, at = haystack.contexts(said, places, making.chunk)
    return {
        "contexts": contexts, "query": asked.query, "target": asked.answer, "choices": list(asked.choices),
        "age": len(contexts) - at[asked.facts[0]], "task": task,
    }  # fmt: skip
