"""Conversations that each ask for one thing which long memories are known to get wrong, generated.

Each record is an online example of a user who tells and an assistant who confirms, and ends with a question that only
this conversation answers: what is asked for is a word that nobody has seen, put together for it, or any English word.
Invented words, English words and the words of the templates differ between training and test.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from jax_ccm.data.chats import ENDINGS, ONSETS, VOWELS, words
from jax_ccm.data.conversations import CHOICES, wordlist

NUMBERS = ("one", "two", "three", "four", "five", "six")
# How things are told and asked for. Validation has words of its own in the templates of training.
TEMPLATES = {
    "train": {
        "fact": "The code of {k} is {v}.", "changed": "The code of {k} has changed, it is {v} now.",
        "asked": "What is the code of {k}?", "of_two": "For the {w}, {k} uses the code {v}.",
        "asked_of_two": "Which code does {k} use for the {w}?", "given": "The {w} went to {k}.",
        "lives": "{k} lives in {v}.", "asked_of_given": "In which town is the {w} now?",
        "seen": "I met {k} today.", "asked_seen": "How many times have I met {k}?",
        "answer": "It is {v}.", "count": "You met {k} {v} {times}.",
    },
    "test": {
        "fact": "Remember that {k} goes by the word {v}.", "changed": "From now on {k} goes by {v} instead.",
        "asked": "By which word does {k} go at present?", "of_two": "{k} told me {v} when I asked about the {w}.",
        "asked_of_two": "What did {k} tell me when I asked about the {w}?", "given": "It is {k} who has the {w}.",
        "lives": "You find {k} in a place called {v}.", "asked_of_given": "Where do I find the person who has the {w}?",
        "seen": "There was a letter from {k} this morning.", "asked_seen": "How many letters did {k} send me?",
        "answer": "That would be {v}.", "count": "There came {v} from {k}.",
    },
}  # fmt: skip


class Words:
    """Draws of one conversation; no word is drawn twice."""

    def __init__(self, split: str, rng: random.Random):
        self.split, self.rng = split, rng
        side = "test" if split == "test" else "train"
        self.templates, self.small_talk = TEMPLATES[side], wordlist("chats")[side]["chat"]
        self.replies = wordlist("talk")[side]["react"]
        # A word of the templates would be no answer to tell from the question.
        self.used = set(re.findall("[a-z]+", " ".join(self.templates.values()).lower()))

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.random() * len(options))]

    def say(self, template: str, **slots: str) -> str:
        text = self.templates[template].format(**slots)
        return text[0].upper() + text[1:]

    def _unused(self, draw: Callable[[], str]) -> str:
        while (word := draw()) in self.used:
            pass
        self.used.add(word)
        return word

    def name(self) -> str:
        """An invented name."""

        def syllable():
            return self.pick(ONSETS) + self.pick(VOWELS)

        def several():
            return "".join(syllable() for _ in range(self.pick((2, 3))))

        return self._unused(lambda: (several() + self.pick(ENDINGS[self.split])).capitalize())

    def word(self) -> str:
        """An English word."""
        return self._unused(lambda: self.pick(words(self.split)))

    def places(self, options: Sequence[int], count: int) -> list[int]:
        """So many different ones of the options, in order."""
        left = list(options)
        return sorted(left.pop(int(self.rng.random() * len(left))) for _ in range(count))


@dataclasses.dataclass
class Told:
    """What a conversation tells, and asks for.

    Attributes:
      said: exchange -> what the user says in it; small talk in the others.
      query: the question.
      answers: the right answer, and then wrong ones, the most tempting first.
      value: what the right one comes to, in a word.
    """

    said: dict[int, str]
    query: str
    answers: list[str]
    value: str


# What a task tells in so many exchanges, if what decides the answer is told in this one of them.
Task = Callable[[Words, int, int], Told]


def _answers(draw: Words, values: Sequence[str]) -> list[str]:
    # The right one stands first, so that it is never cut off; words that were not told fill up.
    found = list(dict.fromkeys(values))[:CHOICES]
    return [draw.say("answer", v=value) for value in [*found, *(draw.word() for _ in range(CHOICES - len(found)))]]


def needle(draw: Words, count: int, told: int) -> Told:
    key, value = draw.name(), draw.word()
    return Told({told: draw.say("fact", k=key, v=value)}, draw.say("asked", k=key), _answers(draw, [value]), value)


def key_value(draw: Words, count: int, told: int) -> Told:
    pairs = [(draw.name(), draw.word()) for _ in range(count)]
    key, value = pairs[told]
    others = [other for place, (_, other) in enumerate(pairs) if place != told]
    said = {place: draw.say("fact", k=k, v=v) for place, (k, v) in enumerate(pairs)}
    return Told(said, draw.say("asked", k=key), _answers(draw, [value, *draw_some(draw, others)]), value)


def draw_some(draw: Words, options: Sequence[str]) -> list[str]:
    """As many of the options as make wrong choices."""
    return [options[place] for place in draw.places(range(len(options)), min(CHOICES - 1, len(options)))]


def updates(draw: Words, count: int, told: int) -> Told:
    key = draw.name()
    before = draw.places(range(told), 1 + int(draw.rng.random() * min(told, 3)))
    values = [draw.word() for _ in (*before, told)]
    said = {
        place: draw.say("changed" if number else "fact", k=key, v=value)
        for number, (place, value) in enumerate(zip((*before, told), values, strict=True))
    }
    return Told(said, draw.say("asked", k=key), _answers(draw, values[::-1]), values[-1])


def distractors(draw: Words, count: int, told: int) -> Told:
    key, thing, value = draw.name(), draw.word(), draw.word()
    said, others = {}, []
    for place in range(count):
        if place == told:
            said[place] = draw.say("of_two", k=key, w=thing, v=value)
            continue
        # Half of what is asked for, and something else.
        other = (key, draw.word()) if draw.rng.random() < 0.5 else (draw.name(), thing)
        others.append(draw.word())
        said[place] = draw.say("of_two", k=other[0], w=other[1], v=others[-1])
    values = [value, *draw_some(draw, others)]
    return Told(said, draw.say("asked_of_two", k=key, w=thing), _answers(draw, values), value)


def multi_hop(draw: Words, count: int, told: int) -> Told:
    key, thing, value = draw.name(), draw.name().lower(), draw.word()
    # In either order: the question may need the later one first.
    links = [draw.say("given", k=key, w=thing), draw.say("lives", k=key, v=value)]
    if draw.rng.random() < 0.5:
        links.reverse()
    # The other link is told later, so that the age is that of the first.
    said = {told: links[0], draw.pick(range(told + 1, count)): links[1]}
    free = [place for place in range(count) if place not in said]
    others = []
    for first, second in zip(free[::2], free[1::2], strict=False):
        other = draw.name()
        others.append(draw.word())
        said |= {
            first: draw.say("given", k=other, w=draw.name().lower()),
            second: draw.say("lives", k=other, v=others[-1]),
        }
    return Told(said, draw.say("asked_of_given", w=thing), _answers(draw, [value, *draw_some(draw, others)]), value)


def counting(draw: Words, count: int, told: int) -> Told:
    key = draw.name()
    # One to six times, each as likely as the length allows.
    before = draw.places(range(told), int(draw.rng.random() * min(1 + told, len(NUMBERS))))
    others = [draw.name() for _ in range(2)]
    said = {place: draw.say("seen", k=draw.pick(others)) for place in range(count) if draw.rng.random() < 0.5}
    said |= dict.fromkeys((*before, told), draw.say("seen", k=key))
    right = len(before)
    wrong = sorted((number for number in range(len(NUMBERS)) if number != right), key=lambda n: abs(n - right))

    def answer(n):
        return draw.say("count", k=key, v=NUMBERS[n], times="times" if n else "time")

    answers = [answer(n) for n in (right, *wrong[: CHOICES - 1])]
    return Told(said, draw.say("asked_seen", k=key), answers, NUMBERS[right])


# Name -> the task, exchanges that it needs before and behind the one that decides, and what it is.
TASKS: dict[str, tuple[Task, int, int, str]] = {
    "needle": (needle, 0, 0, "one fact in small talk"),
    "key_value": (key_value, 0, 0, "a fact in every exchange, one of them asked for"),
    "updates": (updates, 1, 0, "a fact that changed one to three times; the old values are choices"),
    "distractors": (distractors, 0, 0, "a fact among others that share half of its key"),
    "multi_hop": (
        multi_hop,
        0,
        1,
        "two facts that answer together, and others of their kind; age is that of the first",
    ),
    "counting": (counting, 0, 0, "how many times something was told, one to six"),
}


def question(
    name: str, split: str, seed: int, index: int, turns: Sequence[int], ages: Sequence[int] = ()
) -> dict[str, Any]:
    """Record number ``index``: ``{"contexts", "query", "target", "choices", "answers", "age", "task"}``.

    Args:
      name: a key of `TASKS`.
      split: "train", "validation" or "test".
      seed: another seed gives other conversations.
      index: any whole number from 0.
      turns: the lengths to draw from, the question and its answer among them; those too short are left out.
      ages: how many exchanges ago was told what decides the answer, taken in turn; () for any.
    """
    task, before, behind, _ = TASKS[name]
    draw = Words(split, random.Random(f"{name}/{split}/{seed}/{index}"))
    age = ages[index % len(ages)] if ages else None
    # Exchanges before the question.
    count = draw.pick([n // 2 - 1 for n in turns if n >= fewest(name, [age] if age else [])])
    told = count - age if age else draw.pick(range(before, count - behind))
    made = task(draw, count, told)
    contexts = []
    for place in range(count):
        contexts += [made.said[place], draw.pick(draw.replies)] if place in made.said else draw.pick(draw.small_talk)
    # By draws of random(), which alone stays the same between versions of Python.
    choices = sorted(made.answers, key=lambda _: draw.rng.random())
    shown = {"contexts": contexts, "query": made.query, "target": made.answers[0], "choices": choices}
    return shown | {"answers": [made.value], "age": count - told, "task": name}


def fewest(name: str, ages: Sequence[int]) -> int:
    """Turns that it takes to tell what decides the answer so long ago, and to ask."""
    _, before, behind, _ = TASKS[name]
    return 2 * (before + max([1 + behind, *ages]) + 1)
