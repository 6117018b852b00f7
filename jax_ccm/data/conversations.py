"""Small conversations with facts worth remembering, generated: no download, the same on every machine.

Two people talk. A turn answers what was said and mostly brings up something: a fact about the speaker, a change of
mind, small talk, or a question about a fact from earlier on, the speaker's own or the other's. The last turn answers
such a question, the first about its fact; where a fact was changed, the latest value counts. Train and test share no
template and no entity.

    Good evening. As it happens, I am reading a book about whales.
    Is it well written? Speaking of that, my dentist is Dr. Weber.
    Good to know. Could you repeat who your dentist is? …
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from jax_ccm.errors import UserError

CHOICES = 4
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {"January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31,
          "September": 30, "October": 31, "November": 30, "December": 31}  # fmt: skip


@functools.cache
def wordlist(name: str) -> dict[str, Any]:
    file = importlib.resources.files("jax_ccm.data") / "wordlists" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def split_of(number: int) -> str:
    """The split that entry ``number`` of a list of entities, or a number itself, belongs to."""
    # Of ten entries two, one, and the other seven.
    return {4: "test", 9: "test", 7: "validation"}.get(number % 10, "train")


@functools.cache
def entities(name: str, split: str) -> tuple[str, ...]:
    """All entities of a kind and split: words of a list, or numbers, times and dates."""
    # Every five minutes of a day.
    clock = [f"{n // 12}:{n % 12 * 5:02d}" for n in range(24 * 12)]
    numbers = [str(n) for n in range(1000)]
    calendar = [f"the {_ordinal(day + 1)} of {month}" for month, days in MONTHS.items() for day in range(days)]
    # What there is, from which entry on, and up to which.
    ranges: dict[str, tuple[Sequence[str], int, int]] = {
        "age": (numbers, 20, 100),
        "guests": (numbers, 6, 70),
        "number": (numbers, 2, 100),
        "price": (numbers, 11, 1000),
        "room_number": (numbers, 101, 1000),
        "morning": (clock, 4 * 12, 10 * 12),
        "office_hours": (clock, 8 * 12, 18 * 12),
        "time": (clock, 6 * 12, 22 * 12),
        "date": (calendar, 0, 365),
        "seat": ([f"{1 + n // 6}{'ABCDEF'[n % 6]}" for n in range(240)], 0, 240),
        "code": ([f"{'ABCDEFGHKLMNPRSTVW'[n % 18]}{n}" for n in range(1000)], 100, 1000),
        "spot": ([f"{'ABCDEFGH'[n % 8]}{n}" for n in range(100)], 10, 100),
    }
    words = wordlist("entities").get(name, ())
    everything, first, end = ranges.get(name, (words, 0, len(words)))
    return tuple(everything[n] for n in range(first, end) if split_of(n) == split)


def _ordinal(day: int) -> str:
    return f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def second_person(text: str) -> str:
    """A template about the speaker, said by the other."""
    swaps = {"i'm": "you're", "i am": "you are", "i was": "you were", "i": "you", "my": "your", "me": "you",
             "mine": "yours", "myself": "yourself"}  # fmt: skip
    return re.sub(r"\b(I'm|I am|I was|I|my|me|mine|myself)\b", lambda match: swaps[match[0].lower()], text)


def sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


@dataclasses.dataclass
class Fact:
    """Something that a speaker told: who, what kind, the fillings, when, earlier values, whether it was asked for."""

    owner: int
    kind: str
    slots: dict[str, str]
    told: int
    past: list[str] = dataclasses.field(default_factory=list)
    asked: bool = False

    def fill(self, template: str, **slots: str) -> str:
        return template.format(**self.slots | slots)


class Talk:
    """One conversation in the making."""

    def __init__(self, split: str, rng: random.Random):
        self.split, self.rng = split, rng
        # Validation has entities of its own, for choosing settings, in the templates of training.
        self.templates = "test" if split == "test" else "train"
        self.phrases = wordlist("talk")[self.templates]
        self.facts: list[Fact] = []
        self.turns: list[str] = []
        self.used: set[tuple[str, str]] = set()

    def pick(self, options: Sequence[Any]) -> Any:
        # Of all the draws of `random`, only random() is promised to stay the same between versions of Python.
        return options[int(self.rng.random() * len(options))]

    def entry(self, kind: str) -> dict[str, Any]:
        """What a kind of fact is: ``value``, ``slots`` and the sentences of this split."""
        entry = wordlist("facts")[kind]
        return entry | entry[self.templates]

    def template(self, kind: str, part: str) -> str:
        return self.pick(self.entry(kind)[part])

    def value(self, name: str) -> str:
        """An entity of a kind; some are put together of two."""

        def one(part):
            return self.pick(entities(part, self.split))

        compound: dict[str, Callable[[], str]] = {
            "full_name": lambda: f"{one('first_name')} {one('surname')}",
            "doctor": lambda: f"Dr. {one('surname')}",
            "address": lambda: f"{one('number')} {one('street')}",
            "restaurant": lambda: f"the {one('adjective')} {one('emblem')}",
            "film": lambda: f"The {one('adjective')} {one('emblem')}",
            "day_time": lambda: f"{self.pick(WEEKDAYS)} at {one('office_hours')}",
        }
        return compound[name]() if name in compound else one(name)

    def new_value(self, name: str) -> str:
        """A value that no fact has now, so that a question has one answer."""
        taken = {fact.slots["v"] for fact in self.facts}
        # `iter` with a value that never comes: draws without end.
        return next(value for value in iter(lambda: self.value(name), "") if value not in taken)

    def new_fact(self, speaker: int) -> Fact:
        known = {fact.kind for fact in self.facts if fact.owner == speaker}
        return self.add_fact(speaker, self.pick([kind for kind in wordlist("facts") if kind not in known]))

    def add_fact(self, speaker: int, kind: str) -> Fact:
        entry = self.entry(kind)
        slots = {slot: self.value(name) for slot, name in entry["slots"].items()}
        fact = Fact(speaker, kind, slots | {"v": self.new_value(entry["value"])}, len(self.turns))
        self.facts.append(fact)
        return fact

    def phrase(self, part: str) -> Any:
        """A phrase, a new one as long as there are any."""
        fresh = [phrase for phrase in self.phrases[part] if (part, str(phrase)) not in self.used]
        found = self.pick(fresh or self.phrases[part])
        self.used.add((part, str(found)))
        return found

    def unasked(self) -> Fact:
        """A fact that nobody asked for yet; rather not what was told just now."""
        open = [fact for fact in self.facts if not fact.asked]
        return self.pick([fact for fact in open if fact.told < len(self.turns) - 1] or open)

    # What brings something up. Each gives the words, and the function that gives the other's response.

    def state(self, speaker: int, lead: str) -> tuple[str, Callable[..., str]]:
        fact = self.new_fact(speaker)
        text = fact.fill(self.template(fact.kind, "say"))
        if self.rng.random() < 0.2:
            other = self.new_fact(speaker)
            text += ", and " + other.fill(self.template(other.kind, "say"))
        lead = self.phrase(lead) if self.rng.random() < 0.6 else ""

        def react(plain: bool = False) -> str:
            own = [text for text in self.entry(fact.kind)["react"] if not plain or "{v}" not in text]
            return fact.fill(self.pick(own)) if self.rng.random() < 0.6 else self.phrase("react")

        return sentence(lead + text), react

    def change(self, speaker: int) -> tuple[str, Callable[..., str]] | None:
        own = [fact for fact in self.facts if fact.owner == speaker and self.entry(fact.kind)["change"]]
        if not own:
            return None
        fact = self.pick(own)
        fact.told, fact.asked = len(self.turns), False
        fact.past.append(fact.slots["v"])
        fact.slots["v"] = self.new_value(self.entry(fact.kind)["value"])
        lead = self.phrase("change") if self.rng.random() < 0.7 else ""
        text = fact.fill(self.template(fact.kind, "change"), old=fact.past[-1])
        return sentence(lead + text), lambda plain=False: self.phrase("noted")

    def chat(self) -> tuple[str, Callable[..., str]]:
        said, reply = self.phrase("chat")
        return said, lambda plain=False: reply

    def ask(self, speaker: int, fact: Fact) -> tuple[str, Callable[..., str]]:
        own, fact.asked = fact.owner == speaker, True
        what = self.template(fact.kind, "wh")
        question = self.phrase("ask_own" if own else "ask_other")
        what = fact.fill(what if own else second_person(what))
        bridge = self.phrase("bridge") if self.turns and self.rng.random() < 0.5 else ""
        clause = self.template(fact.kind, "say")
        clause = second_person(clause) if own else clause
        frame = self.phrase("answer_other" if own else "answer_own")

        def answer(plain: bool = False, value: str | None = None) -> str:
            text = fact.fill(clause, **({"v": value} if value else {}))
            return frame.format(s=text, S=text[0].upper() + text[1:])

        return bridge + question.format(w=what), answer

    def choices(self, fact: Fact, answer: Callable[..., str]) -> list[str]:
        """The answer about a fact with `CHOICES` values, in random order: superseded and other told ones first."""
        name = self.entry(fact.kind)["value"]
        heard = [other for other in self.facts if other is not fact and self.entry(other.kind)["value"] == name]
        # The right one first, so that the cut below keeps it.
        values = [fact.slots["v"], *fact.past[::-1], *(other.slots["v"] for other in heard)]
        values = list(dict.fromkeys(values))[:CHOICES]
        while len(values) < CHOICES:
            value = self.value(name)
            if value not in values:
                values.append(value)
        found = [answer(value=value) for value in values]
        # By draws of random(), see `pick`.
        found.sort(key=lambda _: self.rng.random())
        return found

    def hold(self, count: int) -> tuple[Fact, Callable[..., str]]:
        """Writes ``count`` turns; gives the fact that the last one is about, and its answer for any value."""
        respond, asked = None, None
        for number in range(count - 1):
            # ``last`` is the turn with the question; the answer to it is written behind the loop.
            speaker, last = number % 2, number == count - 2
            # What stands before the last question says no value, which could be its answer.
            response = respond(plain=last) if respond else ""
            brings = not response or last or len(response.split()) < 5 or self.rng.random() < 0.6
            if not brings:
                self.turns.append(response)
                respond = None
                continue
            if last:
                asked = self.unasked()
                said, respond = self.ask(speaker, asked)
            else:
                said, respond = self.bring_up(speaker, "counter" if response else "lead")
            if not self.turns and self.rng.random() < 0.6:
                response = self.phrase("greet")
            self.turns.append(f"{response} {said}".strip())
        assert asked is not None and respond is not None
        self.turns.append(respond())
        return asked, respond

    def bring_up(self, speaker: int, lead: str) -> tuple[str, Callable[..., str]]:
        """Something new in a turn: a change of mind, a question, small talk, or most often a fact."""
        draw = self.rng.random()
        if draw < 0.15 and (changed := self.change(speaker)):
            return changed
        # One fact is always left for the last question, whose answer was then not given before.
        if draw < 0.4 and sum(not fact.asked for fact in self.facts) > 1:
            return self.ask(speaker, self.unasked())
        if draw > 0.85 and self.facts:
            return self.chat()
        return self.state(speaker, lead)


def parse_turns(text: str, most: int = 30) -> tuple[int, ...]:
    """The lengths that conversations may have: ``"4-16"``, or ``"3,4,6"``.

    Raises:
      UserError: for anything else, and for lengths outside 3..``most``.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match:
        lengths = tuple(range(int(match[1]), int(match[2]) + 1))
    else:
        lengths = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if not lengths or min(lengths) < 3 or max(lengths) > most:
        raise UserError(f"turns={text!r}: give a range 4-16 or a list 3,4,6 of whole numbers from 3 to {most}")
    return lengths


def _make(split: str, seed: int, index: int, turns: Sequence[int]) -> tuple[Talk, Fact, Callable[..., str]]:
    talk = Talk(split, random.Random(f"conversations/{split}/{seed}/{index}"))
    return talk, *talk.hold(talk.pick(turns))


def dialogue(split: str, seed: int, index: int, turns: Sequence[int]) -> dict[str, Any]:
    """Conversation number ``index``: ``{"turns": [str, …]}``; the last turn can be known only from the ones before.

    Args:
      split: "train", "validation" or "test".
      seed: another seed gives other conversations.
      index: any whole number from 0.
      turns: the lengths to draw from.
    """
    return {"turns": _make(split, seed, index, turns)[0].turns}


def question(split: str, seed: int, index: int, turns: Sequence[int]) -> dict[str, Any]:
    """The same conversation as an online example: ``{"contexts", "query", "target", "choices", "answers"}``.

    The choices are the answer with other values: superseded ones and others from the conversation first; ``answers`` is
    its value alone. Arguments as for `dialogue`.
    """
    talk, fact, answer = _make(split, seed, index, turns)
    *contexts, query, target = talk.turns
    shown = {"contexts": contexts, "query": query, "target": target, "choices": talk.choices(fact, answer)}
    return shown | {"answers": [fact.slots["v"]]}
