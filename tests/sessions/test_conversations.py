"""Many sessions on one cache: each is what it is alone, and none touches another."""

from __future__ import annotations

import dataclasses

import jax
import jax.monitoring
import numpy as np
import pytest

from jax_ccm.data.formats import session
from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.memory.cache import select
from jax_ccm.memory.generation import Sampling
from jax_ccm.rules.types import Kind
from jax_ccm.sessions import conversations
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.turns import Turn, Turns
from tests import cases
from tests.test_chat import LAID_OUT, experiment


def row(talk: Conversations, number: int) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(select(talk.state.cache, np.asarray([number])))]


def through(talk: Conversations, *turns: Turn) -> None:
    """Goes through with turns that were made by hand."""
    list(talk._shared.replies([turn.row for turn in turns], lambda: turns, talk.keep))


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
    assert [len(turns) for turns in together.state.turns] == [2, 0, 2]


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
    assert other.state.turns[1] == ((0, 2),)
    assert other.say({1: "who am i"}, max_tokens=4)[1] == asked[0] and close(row(other, 1), row(talk, 0))
    talk.reset(2)
    assert all(map(np.array_equal, row(talk, 2), row(Conversations(made, 3), 2)))
    assert talk.memory_bytes(2)[::2] == (0, 0)
    assert talk.say({2: "hi"}, max_tokens=4) == Conversations(made, 3).say({2: "hi"}, max_tokens=4)


def test_a_change_costs_a_row():
    """All other rows stay where they are in memory; a session that was taken out stays as it was."""
    talk = Conversations(experiment("ccm_concat", comp_tokens=2), 32)
    talk.tell({3: [("my name is Clara", "hi")], 7: [("hello", "hi")]})
    place = lambda: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(talk.state.cache)]
    here, taken, kept = place(), talk.session(3), row(talk, 3)
    for act in (
        lambda: talk.tell({5: [("hello", "hi")]}),
        lambda: talk.fork(3, 31),
        lambda: talk.forget(3, 0),
        lambda: talk.reset(3),
        lambda: talk.restore(3, taken),
    ):
        old = talk.state
        act()
        assert place() == here and old.cache.k.is_deleted()
    assert all(map(np.array_equal, row(talk, 3), kept)) and talk.state.turns[3] == taken.turns
    all_rows = sum(x.nbytes for x in jax.tree.leaves(talk.state.cache))
    memory = conversations._put.lower(talk.state.cache, taken.cache, np.int32(0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= all_rows and memory.temp_size_in_bytes < all_rows / 8


@pytest.fixture
def compilations():
    """The programs that are compiled while the test runs, or taken from a folder of compiled ones."""
    found = []

    def hear(event, seconds, **what):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(what)

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield found
    jax.monitoring.unregister_event_duration_listener(hear)


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge"])
def test_files_are_loaded_without_compiling(name, tmp_path, compilations):
    """However many slots are in them: what is made of a file on the host has the sizes of the row that it goes to."""
    made = experiment(name, comp_tokens=2)
    talk, other = Conversations(made, 2), Conversations(made, 2)
    for number in range(4):
        talk.tell({0: [("hello", "hi")]})
        talk.save(0, tmp_path / f"{number}.ccm")
    other.load(1, tmp_path / "0.ccm")
    assert compilations, "what is to be heard is heard"
    compilations.clear()
    for number in range(1, 4):
        other.load(1, tmp_path / f"{number}.ccm")
        talk.save(0, tmp_path / "again.ccm")
    assert compilations == [] and close(row(other, 1), row(talk, 0))


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
    assert count > 2 and list(map(len, talk.state.turns)) == [1, 1]


@pytest.mark.parametrize("name", ["ccm_concat", "loma"])
def test_a_text_that_ends_an_answer(name):
    """What stands in front of it is the answer, and what becomes memory; later tokens were never read."""
    made = experiment(name, "exchange", **LAID_OUT[name])
    talk = Conversations(made)

    def said(how):
        """The tokens of an answer, and what the session has become."""
        talk.reset(0)
        (turn,) = turns = [talk.turn(0, "hello", how)]
        through(talk, *turns)
        return turn.made, row(talk, 0)

    tokens, _ = said(Answering(8))
    words = made.tokenizer.convert_ids_to_tokens(tokens)
    at = next(n for n in range(1, 8) if words[n] not in words[:n] and words[n].isascii())
    stop = made.tokenizer.decode(tokens[at : at + 1])
    short, after = said(Answering(8, stop=("never said", stop)))
    np.testing.assert_array_equal(short, tokens[:at])
    assert close(after, said(Answering(at))[1])
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


def test_a_turn_is_forgotten():
    """Its slots go, nothing else does, and what it said is gone; a mixture says why it cannot."""
    made = experiment("ccm_concat", comp_tokens=2, independent=True)
    talk, never = Conversations(made, 2), Conversations(made, 2)
    talk.tell({1: [("my name is Clara", "hi"), ("i live in Lisbon", "ah")]})
    assert talk.state.turns[1] == ((0, 2), (2, 4))
    other = row(talk, 0)
    assert talk.forget(1, 0) == 4 and all(map(np.array_equal, row(talk, 0), other))
    never.tell({1: [("your name is Henrik", "yo"), ("i live in Lisbon", "ah")]})
    never.forget(1, 0)
    # Chunks are independent of each other here: the same is left, at its own positions.
    ours, theirs = (np.asarray(x.state.cache.v)[:, 1] for x in (talk, never))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours).max() > 0.1 and talk.memory_bytes(1)[0] == 4
    talk.say({1: "what"}, max_tokens=3)
    assert talk.forget(1, 2) == 4
    with pytest.raises(UserError, match="there is no turn 4; the session has 3"):
        talk.forget(1, 3)
    with pytest.raises(UserError, match="blends all turns into the same slots"):
        Conversations(experiment("ccm_merge", comp_tokens=2)).forget(0, 0)


def test_recent_turns_stay_as_text():
    """They count in the bytes and in the room, become memory in their turn, and are forgotten like memory."""
    made = experiment("ccm_concat", "exchange", {"max_turn_tokens": 64}, comp_tokens=2, sink=True, recent=1)
    talk = Conversations(made, 2)
    for number in range(3):
        talk.say({0: "hello there"}, max_tokens=4)
        slots = talk.state.cache.slots.map(lambda x: np.asarray(x)[0])
        text = slots.live & (slots.kind != Kind.MEMORY) & (slots.kind != Kind.SINK)
        assert set(slots.segment[text]) == {number} and (slots.kind == Kind.MEMORY).sum() == 2 * number
        assert talk.memory_bytes(0)[0] == 1 + 2 * number + text.sum()
    assert talk.forget(0, 2) == text.sum() and talk.forget(0, 0) == 2
    talk.say({0: "what"}, max_tokens=4)
    room = made.config.cache.raw_capacity
    with pytest.raises(UserError, match="do not fit cache.raw_capacity"):
        talk.say({0: "x"}, max_tokens=room - 8)
    talk.say({1: "x"}, max_tokens=room - 8)  # a session that has said nothing has room


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge", "full"])
def test_a_system_message_stays_as_it_is(name, tmp_path):
    """It is what training lays out, is seen in all turns, takes room, and goes with copies and files."""
    sink = {} if name == "full" else {"comp_tokens": 2, "sink": True}
    made = experiment(name, "exchange", {"max_turn_tokens": 64, "chat_template": True}, **sink)
    talk = Conversations(made, 3)
    talk.instruct({1: "be brief"})
    start = talk.engine.instruction("be brief")
    assert talk.state.tokens[1] == len(start) and talk.state.turns[1] == ()
    pairs = [("hello", "yes"), ("what", "that")]
    talk.tell({1: pairs})
    if name != "full":
        kind = np.asarray(talk.state.cache.slots.kind)[1]
        assert (kind == Kind.SINK).sum() == len(start) and not (kind == Kind.TEXT).any()
    # The parallel form of the same conversation, as the data write it.
    text = [text for pair in (*pairs, ("and", "x")) for text in pair]
    template = talk.engine.template
    tokens = [*template.first(text[:1]), *template.later(text[1:-1]), *template.target(text[-1:])]
    example = session(template, tokens, every=False, unit=2, start=start)
    (logits,) = parity.parallel_logits(made.model, made.method, [example])
    (_, reply) = next(iter(talk.stream({1: "and"}, max_tokens=1)), (1, ""))
    assert reply == made.tokenizer.decode(np.argmax(logits[:1], axis=1)).strip()
    talk.fork(1, 2)
    talk.save(1, tmp_path / "brief.ccm")
    other = Conversations(made, 3)
    other.load(0, tmp_path / "brief.ccm")
    assert close(row(other, 0), row(talk, 1)) and close(row(talk, 2), row(talk, 1))
    # In one go, and alone.
    again = Conversations(made, 3)
    through(again, again.turn(1, None, system="be brief", told=pairs))
    assert again.state.tokens[1] == len(start) + sum(len(s.tokens) for s in example.segments[:-1])
    assert talk.say_alone({0: "and"}, max_tokens=4) != talk.say_alone({0: "and"}, system="be brief", max_tokens=4)
    with pytest.raises(UserError, match="a system message begins a conversation, and this one has begun"):
        talk.instruct({1: "be long"})
    if name != "full":
        with pytest.raises(UserError, match=f"of which {len(start) - 1} are taken"):
            talk.say({1: "x" * 40}, max_tokens=40)


def test_system_messages_where_there_are_none():
    for name, data, options, message in (
        ("ccm_concat", {"chat_template": True}, {}, "keeps no text as it is.*with method.sink: true"),
        ("ccm_concat", {}, {"sink": True}, "turns are lines of text; set data.chat_template: true"),
        ("none", {"chat_template": True}, {}, "keeps no text as it is"),
    ):
        talk = Conversations(experiment(name, "exchange", data, **options))
        with pytest.raises(UserError, match=message):
            talk.instruct({0: "be brief"})
        assert not talk.state.tokens[0]


def test_turns_of_elsewhere_are_what_they_would_have_been():
    """Told turns are the memory of the same turns when they are answered here."""
    made = experiment("ccm_concat", "exchange", comp_tokens=2)
    talk, told = Conversations(made, 2), Conversations(made, 2)
    pairs = [(text, talk.say({1: text}, max_tokens=4)[1]) for text in ("hello", "what is it")]
    told.tell({1: pairs})
    before = told.state
    if all(text.isascii() and text for _, text in pairs):  # bytes that are no text are other tokens when read
        assert close(row(told, 1), row(talk, 1))
    assert told.state.turns[1] == talk.state.turns[1] == ((0, 1), (1, 2))
    with pytest.raises(UserError, match="turn is empty"):
        told.tell({1: [("fine", "yes"), (" ", "no")]})
    assert told.state is before


def test_rows_are_answered_each_in_its_own_way():
    """Limits, stop texts and sampling of a row are its own; whoever leaves, or has no room, changes nothing else."""
    made = experiment("ccm_concat", comp_tokens=2)
    turns = {0: "hello", 1: "what", 2: "who"}
    how = {0: Answering(3), 1: Answering(6, Sampling(1.5), seed=4), 2: Answering(5)}
    together = Conversations(made, 3)
    *_, replies = together.replies(turns, how)
    for number in turns:
        *_, alone = Conversations(made, 3).replies({number: turns[number]}, how)
        assert alone[number] == replies[number]
    reply = replies[0]
    assert reply.ended in ("stop", "length") and reply.tokens <= 3 and reply.known == 0
    opened = len(together.engine.question("hello", first=True)) + len(together.engine.template.answer)
    assert reply.read == opened
    # One leaves after the first token; one has a full memory.
    talk = Conversations(made, 3)
    talk.tell({2: [("a", "b")] * 6})
    before = [row(talk, number) for number in range(3)]
    going = Turns(talk.scratch)
    for number, text in turns.items():
        going.join(talk.turn(number, text, how[number]))
    with pytest.raises(UserError, match="session 1 is in the middle of a turn"):
        talk.say({1: "more"})
    while not going.running[0].reply.tokens:
        going.step()
    going.leave(0)
    while not going.over:
        going.step()
    assert "larger memory_capacity" in str(going.running[2].refused)
    talk.keep([going.running[1]])
    assert all(map(np.array_equal, row(talk, 0), before[0])) and all(map(np.array_equal, row(talk, 2), before[2]))
    assert close(row(talk, 1), row(together, 1)) and list(map(len, talk.state.turns)) == [0, 1, 6]


def test_mistakes_change_nothing(tmp_path):
    """One bad turn refuses the whole call; each error names the row, the file or the method."""
    made = experiment("ccm_concat", comp_tokens=2)
    talk = Conversations(made, 2)
    talk.say({0: "hello"}, max_tokens=4)
    talk.save(0, tmp_path / "one.ccm")
    before = talk.state
    small = dataclasses.replace(made, config=dataclasses.replace(
        made.config, cache=dataclasses.replace(made.config.cache, memory_capacity=2)))  # fmt: skip
    joined = Conversations(experiment("gist", comp_tokens=2))
    for act, message in (
        (lambda: talk.say({0: "fine", 1: "x" * 70}), "do not fit cache.raw_capacity"),
        (lambda: talk.say({0: "fine", 1: " "}), "turn is empty"),
        (lambda: talk.say({2: "hi"}), "no session 2; they are numbered from 0 to 1"),
        (lambda: talk.say({}), "there are no turns"),
        (lambda: talk.say({0: "hi"}, max_tokens=0), "max_tokens is 0"),
        (lambda: talk.read({0: ""}), "the text is empty"),
        (lambda: talk.fork(0, 5), "no session 5"),
        (lambda: talk.reset(-1), "no session -1"),
        (lambda: talk.load(1, tmp_path / "none.ccm"), "cannot be read"),
        (lambda: Conversations(small).load(0, tmp_path / "one.ccm"), "4 slots of memory .* memory_capacity=2 "),
        (lambda: joined.save(0, tmp_path / "x"), "compresses all text anew"),
        (lambda: Conversations(experiment("none")).read({0: "a"}), "keeps nothing"),
        (lambda: Conversations(made, 0), "0 rows"),
    ):
        with pytest.raises(UserError, match=message):
            act()
        assert talk.state is before


@pytest.mark.filterwarnings("error:.*goes beyond the")
def test_a_conversation_goes_on_beyond_the_positions_of_the_base(tmp_path):
    """Nobody is warned, what was read is counted, and a file goes on as the conversation does."""
    made = experiment()
    cache = dataclasses.replace(made.config.cache, memory_capacity=8, overflow="evict")
    model = cases.model(tokens=2, vocab_size=made.model_config.vocab_size, max_position=160)
    talk = Conversations(
        dataclasses.replace(made, model=model, config=dataclasses.replace(made.config, cache=cache)), rows=2
    )
    for turn in range(12):
        talk.say({0: f"the hen {turn}", 1: "hi"} if turn % 2 else {0: "the dog sat"}, max_tokens=4)
    cache = talk.state.cache
    assert talk.state.tokens == tuple(np.asarray(cache.tokens)) and talk.state.tokens[0] > 160
    assert int(cache.next_position.max()) < 160 < int(cache.rebased[0])
    talk.save(0, tmp_path / "long.ccm")
    talk.load(1, tmp_path / "long.ccm")
    assert talk.state.tokens[0] == talk.state.tokens[1]
    assert talk.say({0: "go on"}, max_tokens=6)[0] == talk.say({1: "go on"}, max_tokens=6)[1]
