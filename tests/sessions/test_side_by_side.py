"""Turns that join, go on and leave in any order: each session is what it is alone, and nothing compiles."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from jax_ccm.errors import UserError
from jax_ccm.memory.generation import Sampling
from jax_ccm.sessions import conversations, scratch, turns
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.scratch import Scratch
from jax_ccm.sessions.turns import Turn, Turns
from tests.sessions.test_conversations import row, through
from tests.test_chat import LAID_OUT, experiment

ROWS = 3
PIECES = (4, 16)
ALL = (
    scratch.reading("cpu"),
    scratch._close,
    scratch._make,
    scratch._put,
    scratch.take,
    conversations._put,
)
programs = lambda: [program._cache_size() for program in ALL]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that turns are read in several."""
    monkeypatch.setattr(scratch, "PIECES", PIECES)
    monkeypatch.setattr(turns, "PIECES", PIECES)


HOW = st.builds(
    Answering,
    max_tokens=st.integers(1, 9),
    sampling=st.sampled_from([Sampling(), Sampling(1.5), Sampling(0.9, top_k=20), Sampling(1.2, top_p=0.8)]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e",), ("q", "T"), ("never said",)]),
    logprobs=st.sampled_from([None, 0, 2]),
)
TEXTS = ["x", "hello there", "what is it", "a text of more than one piece"]
TEXT = st.sampled_from(TEXTS)
ROW, PAIRS = st.integers(0, ROWS - 1), st.sampled_from([(), (("I am Ann", "hi"),)])
TOO_LONG = "x" * 400


class Machine(RuleBasedStateMachine):
    """Some conversations, and the same ones of which one does one thing at a time."""

    talk: Conversations
    alone: Conversations

    def __init__(self):
        super().__init__()
        for number in range(ROWS):
            self.talk.reset(number)
            self.alone.reset(number)
        self.going, self.asked = Turns(self.talk.scratch), {}
        self.before = programs()

    def teardown(self):
        for number in list(self.asked):
            self.going.leave(number)

    def idle(self, *rows):
        hypothesis.assume(not self.asked.keys() & set(rows))

    def same(self, *rows):
        """Bit for bit: the programs, the sizes and the rows are the same."""
        for number in rows:
            assert all(map(np.array_equal, row(self.talk, number), row(self.alone, number)))
            mine, theirs = self.talk.state, self.alone.state
            assert mine.turns[number] == theirs.turns[number] and mine.tokens[number] == theirs.tokens[number]

    def does(self, act):
        """What both do, or refuse."""
        found = []
        for talk in (self.talk, self.alone):
            try:
                found.append(act(talk))
            except UserError as e:
                found.append(str(e))
        assert found[0] == found[1]

    @rule(number=ROW, text=TEXT | st.just(TOO_LONG), how=HOW, told=PAIRS)
    def joins(self, number, text, how, told):
        self.idle(number)
        self.going.join(self.talk.turn(number, text, how, told=told))
        self.asked[number] = text, how, told

    @precondition(lambda self: self.asked)
    @rule(count=st.integers(1, 6), most=st.integers(1, 3))
    def goes_on(self, count, most):
        for _ in range(count):
            self.going.step(most)

    @precondition(lambda self: self.asked)
    @rule(number=ROW)
    def ends(self, number):
        hypothesis.assume(number in self.asked)
        turn = self.going.running[number]
        while not turn.over:
            self.going.step()
        text, how, told = self.asked.pop(number)
        other = self.alone.turn(number, text, how, told=told)
        if turn.refused is None:
            self.talk.keep([turn])
            through(self.alone, other)
            assert turn.reply == other.reply
        else:
            assert isinstance(turn.refused, UserError)
            with pytest.raises(UserError) as refused:
                through(self.alone, other)
            assert str(refused.value) == str(turn.refused)
        self.going.leave(number)
        self.same(number)

    @precondition(lambda self: self.asked)
    @rule(number=ROW)
    def leaves(self, number):
        hypothesis.assume(number in self.asked)
        self.going.leave(number)
        del self.asked[number]
        self.same(number)

    @rule(number=ROW, text=TEXT)
    def reads(self, number, text):
        self.idle(number)
        self.does(lambda talk: talk.read({number: text}))
        self.same(number)

    @rule(number=ROW, to=ROW)
    def forks(self, number, to):
        self.idle(number, to)
        self.does(lambda talk: talk.fork(number, to))
        self.same(to)

    @rule(number=ROW)
    def resets(self, number):
        self.idle(number)
        self.does(lambda talk: talk.reset(number))
        self.same(number)

    @rule(number=ROW, to=ROW)
    def goes_to_disk_and_back(self, number, to):
        self.idle(number, to)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "session.ccm")
            self.does(lambda talk: talk.save(number, path))
            self.does(lambda talk: talk.load(to, path) and None)
        self.same(to)

    @invariant()
    def nothing_was_compiled(self):
        assert programs() == self.before


@pytest.mark.once
@pytest.mark.parametrize("name", ["ccm_concat", "loma"])
def test_any_order_is_as_good_as_one_by_one(name, tmp_path):
    made = experiment(name, "turn", {"max_turn_tokens": 64}, **LAID_OUT[name])
    talk, alone = Conversations(made, ROWS), Conversations(made, ROWS)
    for each in (talk, alone):  # whatever there is to compile
        for text in TEXTS:
            each.reset(1)
            each.say({1: text}, max_tokens=2)
            each.read({1: text})
        each.tell({1: [("I am Ann", "hi")]})
        each.save(1, tmp_path / "session.ccm")
        each.load(2, tmp_path / "session.ccm")
        each.fork(2, 1)
        each.say({1: "x"}, max_tokens=2)
        row(each, 1)
    machine = type("Talking", (Machine,), {"talk": talk, "alone": alone})
    few = hypothesis.settings(max_examples=12, stateful_step_count=25, deadline=None, database=None, derandomize=True,
                              suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    run_state_machine_as_test(machine, settings=few)


@pytest.mark.once
@pytest.mark.parametrize("readers, between", [(2, 1), (12, 3)])
def test_a_long_text_keeps_nobody_waiting(readers, between, monkeypatch):
    """Between two tokens of a row a piece of one that reads is read, of many a quarter; each is what it is alone."""
    made = experiment("ccm_concat", comp_tokens=2)
    talk, alone = Conversations(made, readers + 1), Conversations(made, readers + 1)
    read, pieces = Scratch.read, []
    monkeypatch.setattr(Scratch, "read", lambda self, number, *given, **how: (pieces.append(number), read(
        self, number, *given, **how)) and None)  # fmt: skip
    going = Turns(talk.scratch)
    going.join(talk.turn(0, "hi", Answering(9, Sampling(1.0), seed=5)))
    while not going.running[0].wants:
        going.step()
    said = {number: f"a text of some pieces, such as these of {number}" for number in range(1, readers + 1)}
    for number, text in said.items():
        going.join(talk.turn(number, text, Answering(2)))
    pieces.clear()
    for count in range(1, 5):
        before = len(going.running[0].made)
        going.step(8)
        assert len(going.running[0].made) == before + 1 and len(pieces) == between * count
    assert pieces == (2 * list(said))[: 4 * between] and not going.running[1].wants
    while not going.over:
        going.step()
    found = {number: going.running[number].reply.text for number in said}
    assert found == {number: alone.say({number: text}, max_tokens=2)[number] for number, text in said.items()}


def test_a_turn_may_leave_while_others_read(monkeypatch):
    """As a stream does that was given up, whenever the collector finds it: the others go on."""
    talk = Conversations(experiment("ccm_concat", comp_tokens=2), 13)
    going, go_on = Turns(talk.scratch), Turn.go_on

    def left(turn, *made):
        if turn.row == 0:
            going.leave(1)
        go_on(turn, *made)

    monkeypatch.setattr(Turn, "go_on", left)
    turns = [talk.turn(number, "a text of some pieces, such as these", Answering(2)) for number in range(13)]
    for turn in turns:
        going.join(turn)
    while not going.over:
        going.step()
    assert 1 not in going.running and not turns[1].made.size and turns[1].refused is None
    assert all(turn.made.size == 2 for turn in turns if turn.row != 1)
