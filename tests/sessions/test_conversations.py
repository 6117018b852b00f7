"""Many sessions on one cache: each is what it is alone, and none touches another."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory.cache import select
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Engine
from tests.test_chat import LAID_OUT, experiment


def row(talk: Conversations, number: int) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(select(talk.state.cache, np.asarray([number])))]


def close(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(np.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_row_is_what_it_is_alone(name):
    """Sessions of different ages and lengths, of which some speak at a time; the others stay bit for bit."""
    unit = ("turn", "exchange")[list(LAID_OUT).index(name) % 2]
    made = experiment(name.split(",")[0], unit, {"max_turn_tokens": 64}, **LAID_OUT[name])
    together = Conversations(made, 3)
    alone = {number: Conversations(made, 3) for number in (0, 2)}  # the others never speak
    for turns in ({0: "hello there"}, {0: "x", 2: "what is it"}, {2: "and"}):
        before = {number: row(together, number) for number in range(3)}
        replies = together.say(turns, max_tokens=5)
        expected = [alone[number].say({number: text}, max_tokens=5) for number, text in turns.items()]
        assert replies == {number: text for reply in expected for number, text in reply.items()}
        for number in range(3):
            waited = number not in turns
            assert waited == all(map(np.array_equal, row(together, number), before[number]))
    for number, other in alone.items():
        assert close(row(together, number), row(other, number))
        assert together.memory_bytes(number) == other.memory_bytes(number)
    assert together.state.turns == (2, 0, 2)


def test_sessions_are_forked_reset_saved_and_loaded(tmp_path):
    """A copy goes on as its original does; a file brings a session back, elsewhere, too."""
    made = experiment("ccm_merge", comp_tokens=2)
    talk = Conversations(made, 3)
    talk.say({0: "my name is Clara"}, max_tokens=4)
    talk.fork(0, 2)
    talk.save(0, tmp_path / "clara.ccm")
    asked = talk.say({0: "who am i", 2: "who am i"}, max_tokens=4)
    assert asked[0] == asked[2] and close(row(talk, 0), row(talk, 2))
    other = Conversations(made, 3)
    other.load(1, tmp_path / "clara.ccm")
    assert other.say({1: "who am i"}, max_tokens=4)[1] == asked[0] and close(row(other, 1), row(talk, 0))
    talk.reset(2)
    assert all(map(np.array_equal, row(talk, 2), row(Conversations(made, 3), 2)))
    assert talk.memory_bytes(2)[::2] == (0, 0)
    assert talk.say({2: "hi"}, max_tokens=4) == Conversations(made, 3).say({2: "hi"}, max_tokens=4)


def test_answers_come_as_they_are_made():
    """The pieces are the answer; a stream that is given up has changed nothing."""
    made = experiment(comp_tokens=2)
    whole, pieces = Conversations(made, 2).say({0: "hello", 1: "what"}, max_tokens=7), {0: "", 1: ""}
    talk = Conversations(made, 2)
    before = talk.state
    given_up = talk.stream({0: "hello", 1: "what"}, max_tokens=7)
    next(given_up)
    given_up.close()
    assert talk.state is before
    count = 0
    for number, piece in talk.stream({0: "hello", 1: "what"}, max_tokens=7):
        pieces[number] += piece
        count += 1
    assert {number: text.strip() for number, text in pieces.items()} == whole
    assert count > 2 and talk.state.turns == (1, 1)


@pytest.mark.parametrize("name", ["ccm_concat", "loma"])
def test_a_text_that_ends_an_answer(name):
    """What stands in front of it is the answer, and what becomes memory; later tokens were never read."""
    made = experiment(name, "exchange", **LAID_OUT[name])
    engine = Engine(made, 1)
    question = engine.question("hello", first=True)
    *_, (tokens, _) = engine.answers(engine.empty(), {0: question}, max_tokens=8)
    words = made.tokenizer.convert_ids_to_tokens(tokens[0])
    at = next(n for n in range(1, 8) if words[n] not in words[:n] and words[n].isascii())
    stop = made.tokenizer.decode(tokens[0][at : at + 1])
    stopped = Engine(made, 1, stop=("never said", stop))
    *_, (short, after) = stopped.answers(stopped.empty(), {0: question}, max_tokens=8)
    np.testing.assert_array_equal(short[0], tokens[0][:at])
    *_, (_, expected) = engine.answers(engine.empty(), {0: question}, max_tokens=at)
    assert close(*([np.asarray(x) for x in jax.tree.leaves(cache)] for cache in (after, expected)))
    assert stop not in Conversations(made, stop=(stop,)).say({0: "hello"}, max_tokens=8)[0]


def test_a_text_is_read_as_memory():
    """In chunks as long as the data's turns may be, closed one by one: as the same chunks said one after another."""
    made = experiment("ccm_concat", data={"max_turn_tokens": 6}, comp_tokens=2)
    talk = Conversations(made, 2)
    talk.read({1: "a text of some length"})
    cache = talk.state.cache
    assert cache.chunks.tolist() == [0, 4] and np.asarray(cache.slots.live).sum(axis=1).tolist() == [0, 8]
    assert talk.memory_bytes(1)[2] > 0 == talk.memory_bytes(0)[2]
    assert talk.say({1: "what"}, max_tokens=4)[1] != Conversations(made, 2).say({1: "what"}, max_tokens=4)[1]


def test_mistakes_change_nothing(tmp_path):
    """One bad turn refuses the whole call; each error names the row, the file or the method."""
    made = experiment("ccm_concat", comp_tokens=2)
    talk = Conversations(made, 2)
    talk.say({0: "hello"}, max_tokens=4)
    talk.save(0, tmp_path / "one.ccm")
    before = talk.state
    small = dataclasses.replace(made, config=dataclasses.replace(
        made.config, cache=dataclasses.replace(made.config.cache, memory_capacity=12)))  # fmt: skip
    joined = Conversations(experiment("gist", comp_tokens=2))
    for act, message in (
        (lambda: talk.say({0: "fine", 1: "x" * 70}), "do not fit cache.raw_capacity"),
        (lambda: talk.say({0: "fine", 1: " "}), "turn is empty"),
        (lambda: talk.say({2: "hi"}), "no session 2; they are numbered from 0 to 1"),
        (lambda: talk.say({}), "there are 0 turns"),
        (lambda: talk.say({0: "hi"}, max_tokens=0), "max_tokens is 0"),
        (lambda: talk.read({0: ""}), "the text is empty"),
        (lambda: talk.fork(0, 5), "no session 5"),
        (lambda: talk.reset(-1), "no session -1"),
        (lambda: talk.load(1, tmp_path / "none.ccm"), "cannot be read as a memory file"),
        (lambda: Conversations(small).load(0, tmp_path / "one.ccm"), "memory_capacity 24.*memory_capacity 12"),
        (lambda: joined.save(0, tmp_path / "x"), "compresses all text anew"),
        (lambda: Conversations(experiment("none")).read({0: "a"}), "keeps nothing"),
        (lambda: Conversations(made, 0), "0 rows"),
    ):
        with pytest.raises(UserError, match=message):
            act()
        assert talk.state is before
