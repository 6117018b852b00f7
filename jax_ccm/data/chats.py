"""Conversations of a user and an assistant in which nearly every answer can be known only from memory, generated.

The user tells facts about themselves, corrects some, chats, and asks for what was told before, at any age; the
assistant answers. Half of the proper names are words that nobody has seen, put together from syllables, so that neither
the base nor the training data give them away: only what was said does. Facts, templates and names are those of
`jax_ccm.data.conversations`, in disjoint splits; invented words differ between splits by their endings.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from jax_ccm.data import varied
from jax_ccm.data.conversations import Fact, Talk, second_person, sentence, split_of, wordlist

USER = 0
# The longest conversations.
MOST_TURNS = 4_000
# The most facts that are kept for last questions: each is of another kind.
MOST_AGES = 32
# Proper names, of which half are invented.
NAMES = frozenset(["first_name", "surname", "city", "pet_name", "street", "code_word"])
# Values that may be arbitrary words instead, and how these are written; numbers, times and codes are arbitrary anyway.
PROPER = NAMES | {"full_name", "doctor", "restaurant", "film", "language", "country"}
WORDS = {
    **dict.fromkeys((*NAMES, "full_name", "language"), "{}"),
    **dict.fromkeys(("dish", "drink", "color", "hobby", "allergen", "sport", "subject", "plant", "lost"), "{}"),
    **dict.fromkeys(("animal", "produce", "snack", "game", "garment", "country"), "{}"), "car": "a {}", "thing": "a {}",
    "place": "the {}",
    "doctor": "Dr. {}", "restaurant": "the {}", "film": "The {}", "job": "a {}", "gift": "a {}",
    "instrument": "the {}", "hiding": "in the {}",
}  # fmt: skip
ONSETS = ("b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w y z").split()
VOWELS = ("a e i o u a e i o ai ea io ou").split()
ENDINGS = {
    "train": ("n", "r", "s", "th", "nd", "x", "m", "", "", "na", "lo", "rin"),
    "validation": ("sk", "lia", "ndo", "p"),
    "test": ("l", "rt", "ck", "ft", "vy"),
}


@functools.cache
def words(split: str) -> tuple[str, ...]:
    """English words of a split, any of which may be the value of a fact."""
    return tuple(word for n, word in enumerate(wordlist("words")["words"]) if split_of(n) == split)


@dataclasses.dataclass(frozen=True)
class Making:
    """How conversations are made.

    Attributes:
      turns: the lengths to draw from; odd ones are one turn shorter, and those below ``fewest`` are left out.
      ages: how many exchanges ago the last question's fact was told; () for any. Of several, conversation after
        conversation is given once for each age, with another last question.
      arbitrary: share of the values that are any English or invented word in place of one that fits, so that they
        cannot be guessed ("my favorite dish is cobblestones"). A memory learns from these to hold what was said.
      wordy: share of the assistant's turns, answers to questions left out, that go on with one to four sentences about
        nothing that was said.
      quoted: share of the questions that ask for the words in which a fact was told, beside a few that ask for the last
        turn: the answer repeats it, so that all of its words are learned from and not a value alone.
      reactions: share of the assistant's turns that answer no question and are scored, too. Where none are, a memory
        learns to have everything answered from it, what the user says just now included.
      changes: share of the exchanges, beside one in twelve, in which the user corrects what they have told, where there
        is something. What was corrected may be asked for again, so that a memory learns which value is the newest.
      varied: share of the facts that are of the several hundred kinds of `jax_ccm.data.varied` instead of the few dozen
        that all conversations share. Validation has sentences of its own for them.
      wide: share of the conversations, in training, whose varied facts are told and asked for in several times as many
        wordings, and of more kinds, some of which are any words in any order.
    """

    turns: tuple[int, ...]
    ages: tuple[int, ...] = ()
    arbitrary: float = 0.0
    wordy: float = 0.0
    quoted: float = 0.0
    reactions: float = 0.0
    changes: float = 0.0
    varied: float = 0.0
    wide: float = 0.0

    @property
    def fewest(self) -> int:
        """Turns that it takes to tell something so long ago, and to ask for it."""
        return 2 * (max(self.ages, default=1) + 1)


class _Chat(Talk):
    """One conversation in the making: the user tells and asks, the assistant answers."""

    def __init__(self, split: str, rng: random.Random, making: Making):
        super().__init__(split, rng)
        self.making = making
        own = wordlist("chats")[self.templates]
        self.questions, self.sayings, self.small_talk, self.short = (own[k] for k in ("ask", "say", "chat", "short"))
        self.rambling, self.quotes, self.echoes = (own[k] for k in ("ramble", "quote", "echo"))
        self.wide = self.chance(making.wide)
        self.varied = varied.kinds(split, self.wide) if making.varied else {}
        self.kept_for_last: dict[int, Fact] = {}
        self.scored: list[int] = []
        # How many facts must still be told for last questions.
        self.due = 0

    def entry(self, kind: str) -> dict[str, Any]:
        return self.varied[kind] if kind in self.varied else super().entry(kind)

    def asked(self, kind: str) -> list[str]:
        """Questions for a kind of fact."""
        return self.varied[kind]["ask"] if kind in self.varied else self.questions[kind]

    def wrapped(self, question: str) -> str:
        if not self.chance(self.making.varied / 2):
            return question
        return self.pick(varied.wrappers(self.split, self.wide)).format(
            q=question, p=question[0].lower() + question[1:]
        )

    def new_fact(self, speaker: int) -> Fact:
        """A fact of a kind that was not told; of varied ones, half are easily taken for another that was."""
        if not self.chance(self.making.varied):
            return super().new_fact(speaker)
        told = {fact.kind for fact in self.facts}
        # "My sister is called …" twice would leave no answer that is right.
        # Whom or what is spoken of already, in varied facts and in the slots of others.
        about = {text for fact in self.facts for name, text in fact.slots.items() if name != "v"}
        about |= {self.varied[kind]["member"] for kind in told & self.varied.keys()}
        options = [kind for kind, entry in self.varied.items() if entry["member"] not in about and kind not in told]
        if not options:
            return super().new_fact(speaker)
        # Another fact whose value is of the same kind is the harder question: a town for a town.
        values = {self.entry(kind)["value"] for kind in told}
        alike = [kind for kind in options if self.varied[kind]["value"] in values]
        return self.add_fact(speaker, self.pick(alike if alike and self.rng.random() < 0.5 else options))

    def chance(self, share: float) -> bool:
        """True in that share of the draws. Nothing is drawn for 0, so that an option without effect changes nothing."""
        return bool(share) and self.rng.random() < share

    def value(self, name: str) -> str:
        if name == "invented":
            return self.invented()
        if name == "phrase":
            return " ".join(self.word() for _ in range(2 + int(self.rng.random() * 4)))
        if name in WORDS and self.rng.random() < self.making.arbitrary:
            text = self.word() if self.rng.random() < 0.7 else self.invented().lower()
            return WORDS[name].format(text.capitalize() if name in PROPER else text)
        if name == "full_name" and self.rng.random() < 0.6:
            return self.value("first_name")
        if name in NAMES and self.rng.random() < 0.5:
            return self.invented()
        return super().value(name)

    def word(self) -> str:
        """Any English word, now and then two."""
        count = 2 if self.rng.random() < 0.2 else 1
        return " ".join(self.pick(words(self.split)) for _ in range(count))

    def ramble(self) -> Iterator[str]:
        """One to four sentences that are about nothing that was said, as small models like to make them."""
        for _ in range(1 + int(self.rng.random() * 4)):
            text = re.sub("{w}", lambda _: self.word(), self.pick(self.rambling))
            yield re.sub("{N}", lambda _: self.invented(), text)

    def invented(self) -> str:
        """A word of two or three syllables."""

        def syllable():
            return self.pick(ONSETS) + self.pick(VOWELS)

        middle = syllable() if self.rng.random() < 0.4 else ""
        return (syllable() + middle + syllable() + self.pick(ENDINGS[self.split])).capitalize()

    def clause(self, fact: Fact) -> str:
        """The fact in the words of its speaker."""
        own = self.sayings.get(fact.kind, [])
        if own and self.rng.random() < 0.5:
            return fact.fill(self.pick(own))
        return fact.fill(self.template(fact.kind, "say"))

    def tell(self) -> tuple[str, str]:
        """A turn that tells one to three facts, and the response to the last of them."""
        count = 1 + (self.rng.random() < 0.4) + (self.rng.random() < 0.15)
        facts = [self.new_fact(USER) for _ in range(min(count, self.room))]
        lead = self.phrase("lead") if self.rng.random() < 0.3 else ""
        clauses = [self.clause(fact) for fact in facts]
        if len(clauses) > 1 and self.rng.random() < 0.5:
            text = ", and ".join([", ".join(clauses[:-1]), clauses[-1]])
            said = sentence(lead + text)
        else:
            said = " ".join([sentence(lead + clauses[0]), *map(sentence, clauses[1:])])
        return said, self.react(facts[-1])

    @property
    def room(self) -> int:
        """How many more facts may be told."""
        return len(wordlist("facts")) - len(self.facts) - self.due

    def react(self, fact: Fact) -> str:
        """What the assistant says to a fact; sometimes it says it back."""
        draw = self.rng.random()
        if draw < 0.25:
            return sentence(f"{self.pick(['Okay', 'I see', 'Noted', 'Good'])}, {second_person(self.clause(fact))}")
        if draw < 0.6:
            return fact.fill(self.pick(self.entry(fact.kind)["react"]))
        return self.phrase("react")

    def correct(self) -> tuple[str, str] | None:
        """A turn that changes a fact, and the response, or None where nothing can change."""

        def changes(fact):
            return self.entry(fact.kind)["change"]

        able = [fact for fact in self.known() if changes(fact)]
        if not able:
            return None
        fact = self.pick(able)
        fact.past.append(fact.slots["v"])
        fact.slots["v"] = self.new_value(self.entry(fact.kind)["value"])
        # A fact is as old as its last change.
        fact.told, fact.asked = len(self.turns), False
        lead = self.phrase("change") if self.rng.random() < 0.7 else ""
        return sentence(lead + fact.fill(self.pick(changes(fact)), old=fact.past[-1])), self.phrase("noted")

    def inquire(self, fact: Fact) -> tuple[str, Callable[..., str]]:
        """A turn that asks for a fact, and the answer as a function of its value."""
        fact.asked = True
        # The answer is the turn behind this one, which is not written yet.
        self.scored.append(len(self.turns) + 1)
        # What is kept for a last question is not repeated before it.
        kept = {other.told for other in self.kept_for_last.values() if other is not fact}
        if fact.told not in kept and self.chance(self.making.quoted):
            return self.quote(fact)
        if self.rng.random() < 0.65:
            question = self.wrapped(fact.fill(self.pick(self.asked(fact.kind))))
        else:
            question = self.phrase("ask_own").format(w=fact.fill(self.template(fact.kind, "wh")))
        bridge = self.phrase("bridge") if self.turns and self.rng.random() < 0.15 else ""
        draw, clause = self.rng.random(), self.template(fact.kind, "say")
        frame = self.phrase("answer_other") if draw < 0.25 else self.pick(self.short) if draw < 0.5 else "{S}."

        def answer(value: str | None = None) -> str:
            text = second_person(fact.fill(clause, **({"v": value} if value else {})))
            said = value or fact.slots["v"]

            def upper(text):
                return text[0].upper() + text[1:]

            return frame.format(s=text, S=upper(text), v=said, V=upper(said))

        return bridge + question, answer

    def quote(self, fact: Fact) -> tuple[str, Callable[..., str]]:
        """A turn that asks for the words in which a fact was told, and the answer as a function of its value."""
        question, frame = self.pick(self.quotes)
        told, own = self.turns[fact.told], fact.slots["v"]
        # The turn may begin with the value, which then has a capital.
        # As a word: "storms" is not what "thunderstorms" tells.
        found = re.search(rf"(?<!\w){re.escape(own)}(?!\w)", told, re.IGNORECASE)
        start = found.start() if found else told.lower().index(own.lower())

        def answer(value: str | None = None) -> str:
            text = value or own
            if told[start].isupper():
                text = text[0].upper() + text[1:]
            return frame.format(q=told[:start] + text + told[start + len(own) :])

        return question.format(w=fact.fill(self.template(fact.kind, "wh"))), answer

    def echo(self) -> tuple[str, str]:
        """A turn that asks for the last one word for word, and the answer."""
        self.scored.append(len(self.turns) + 1)
        question, frame = self.pick(self.echoes)
        return question, frame.format(q=self.turns[-2])

    def known(self) -> list[Fact]:
        """The facts that may be asked for and changed."""
        # By identity: what is kept for last questions is neither asked for nor changed before.
        return [fact for fact in self.facts if not any(fact is kept for kept in self.kept_for_last.values())]

    def exchange(self) -> tuple[str, str]:
        """A turn of the user, and the answer to it."""
        kept = {fact.told for fact in self.kept_for_last.values()}
        if self.turns and len(self.turns) - 2 not in kept and self.chance(self.making.quoted / 8):
            return self.echo()
        if self.chance(self.making.changes) and (corrected := self.correct()):
            return corrected
        draw, known = self.rng.random(), self.known()
        open = [fact for fact in known if not fact.asked]
        if known and draw < 0.45:
            # Rather what was not asked before, and of any age.
            said, answer = self.inquire(self.pick(open if open and self.rng.random() < 0.7 else known))
            return said, answer()
        if draw < 0.53 and (corrected := self.correct()):
            return corrected
        if (0.53 <= draw < 0.62) or (not known and draw < 0.2) or not self.room:
            return self.pick(self.small_talk) if self.rng.random() < 0.5 else self.phrase("chat")
        return self.tell()

    def hold_exchanges(self, count: int) -> None:
        """Writes ``count`` exchanges that leave a fact of each age to be asked for; it is not spoken of in between."""
        ages = self.making.ages
        self.due = len(ages)
        for left in range(count, 0, -1):
            # ``left`` exchanges from here to the last question, this one included, are the age of what is told now.
            self.due -= left in ages
            # There must be something to ask for in the end.
            due = left in ages or (left == 1 and not self.facts)
            said, reply = self.tell() if due else self.exchange()
            if left in ages:
                self.kept_for_last[left] = self.pick([fact for fact in self.facts if fact.told == len(self.turns)])
            if len(self.turns) + 1 not in self.scored:
                if self.chance(self.making.reactions):
                    self.scored.append(len(self.turns) + 1)
                elif self.chance(self.making.wordy):
                    reply = " ".join([reply, *self.ramble()])
            if not self.turns and self.rng.random() < 0.4:
                said = f"{self.phrase('greet')} {said}"
            self.turns += [said, reply]

    def ask_last(self, age: int | None) -> tuple[Fact, Callable[..., str]]:
        """Writes the last exchange; gives the fact that it asks for, and its answer for any value."""
        fact = self.pick(self.facts) if age is None else self.kept_for_last[age]
        said, answer = self.inquire(fact)
        self.turns += [said, answer()]
        return fact, answer


def _hold(split: str, seed: int, index: int, making: Making) -> tuple[_Chat, Fact, Callable[..., str]]:
    """The conversation, the fact that its last question asks for, and the answer."""
    # With several ages neighbouring records are one conversation with different last questions.
    number, own = divmod(index, max(len(making.ages), 1))
    # A string seeds the generator through SHA-512, and so the same on every machine.
    chat = _Chat(split, random.Random(f"chats/{split}/{seed}/{number}"), making)
    # Two turns each; the last exchange is the question.
    exchanges = [count // 2 - 1 for count in making.turns if count >= making.fewest]
    chat.hold_exchanges(chat.pick(exchanges))
    return chat, *chat.ask_last(making.ages[own] if making.ages else None)


def chat(split: str, seed: int, index: int, making: Making) -> dict[str, Any]:
    """Conversation number ``index``: ``{"turns": [str, …], "scored": [int, …]}``.

    There is an even number of turns, and the last answers a question. ``scored`` are the turns that answer one, what
    can be known only from memory, and of the others as many as `Making.reactions` says.

    Args:
      split: "train", "validation" or "test".
      seed: another seed gives other conversations.
      index: any whole number from 0.
      making: how it is made.
    """
    made = _hold(split, seed, index, making)[0]
    return {"turns": made.turns, "scored": made.scored}


def question(split: str, seed: int, index: int, making: Making) -> dict[str, Any]:
    """The same conversation as an online example: ``{"contexts", "query", "target", "choices", "answers", "age"}``.

    The choices are the answer with other values: superseded ones and others from the conversation first; ``answers`` is
    its value alone. Arguments as for `chat`.
    """
    made, fact, answer = _hold(split, seed, index, making)
    *contexts, query, target = made.turns
    # Turns since then, in exchanges.
    age = (len(contexts) - fact.told) // 2
    shown = {"contexts": contexts, "query": query, "target": target, "choices": made.choices(fact, answer)}
    return shown | {"answers": [fact.slots["v"]], "age": age}
