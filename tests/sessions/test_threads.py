"""Conversations that several threads use at once, and streams beside other calls: what each is alone, bit for bit."""

from __future__ import annotations

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.memory.generation import Sampling
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.scratch import Scratch
from jax_ccm.sessions.sharing import FairLock
from tests.sessions.conftest import BUSY, ROWS, same
from tests.sessions.test_conversations import row


def elsewhere(act):
    """What something comes to in another thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(act).result(300)


def talks(talk: Conversations, number: int, folder) -> list:
    """A conversation of all that there is, in a row of its own; what comes of it."""
    path, heard = folder / f"{number}.ccm", []
    heard.append(talk.say({number: f"I am number {number}"}, max_tokens=5 + number))
    heard.append("".join(piece for _, piece in talk.stream({number: "what"}, max_tokens=9)))
    talk.save(number, path)
    kept = talk.session(number)
    with contextlib.closing(talk.stream({number: "this is given up"}, max_tokens=9)) as pieces:
        next(pieces)
    with pytest.raises(UserError, match="do not fit"):
        talk.say({number: "x" * 100})
    talk.read({number: "a text to read"})
    heard.append(talk.say_alone({number: "what"}, max_tokens=4))
    talk.load(number, path)
    heard.append(talk.forget(number, 0))
    heard.append(talk.say({number: "and now"}, max_tokens=4))
    talk.reset(number)
    talk.tell({number: [(f"this is {number}", "yes")]})
    if number % 2:
        talk.restore(number, kept)
    how = Answering(max_tokens=6, sampling=Sampling(1.2), seed=number, stop=("e",), logprobs=2)
    *_, replies = talk.replies({number: "who"}, {number: how})
    return [*heard, replies[number], talk.memory_bytes(number)]


def test_threads_hear_what_each_hears_alone(talk, alone, tmp_path):
    """One after the other, and all at once: replies, log-probabilities and memories are the same bits."""
    (tmp_path / "alone").mkdir()
    expected = [talks(alone, number, tmp_path / "alone") for number in range(ROWS)]
    begin = threading.Barrier(ROWS)

    def act(number):
        begin.wait(300)
        return talks(talk, number, tmp_path)

    with ThreadPoolExecutor(ROWS) as threads:
        found = list(threads.map(act, range(ROWS)))
    assert found == expected and same(talk, alone, *range(ROWS))
    for number in range(ROWS):
        ours, theirs = (files.read(folder / f"{number}.ccm").arrays for folder in (tmp_path, tmp_path / "alone"))
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_threads_are_answered_side_by_side(talk, monkeypatch):
    """Tokens of different threads are made by the same programs: no thread waits until another one's answer ends."""
    make, seen, begin = Scratch.make, [], threading.Barrier(ROWS)
    monkeypatch.setattr(Scratch, "make", lambda self, wants: seen.append(len(wants)) or make(self, wants))
    how = Answering(max_tokens=20, sampling=Sampling(1.0))

    def act(number):
        begin.wait(300)
        return len(list(talk.replies({number: "hi"}, {number: how})))

    with ThreadPoolExecutor(ROWS) as threads:
        assert all(threads.map(act, range(ROWS)))
    assert max(seen) > 1 and len(seen) < sum(seen)


def test_calls_about_one_session_come_one_after_the_other(talk, alone):
    """Each is whole: what two threads say to one session is a conversation, in the one order or the other."""
    texts, begin = ("my name is Clara", "hello there"), threading.Barrier(2)

    def act(text):
        begin.wait(300)
        return talk.say({3: text, 5: text}, max_tokens=12)

    with ThreadPoolExecutor(2) as threads:
        replies = dict(zip(texts, threads.map(act, texts), strict=True))
    found = []
    for order in (texts, texts[::-1]):
        alone.reset(3)
        alone.reset(5)
        expected = {text: alone.say({3: text, 5: text}, max_tokens=12) for text in order}
        found.append(expected == replies and same(talk, alone, 3, 5))
    assert any(found)


@pytest.mark.parametrize("ask", [lambda act: act(), elsewhere], ids=["the same thread", "another thread"])
def test_a_stream_has_its_session(talk, alone, tmp_path, ask):
    """What would change it is refused, who looks sees it as it was; other sessions go on, and so does the stream."""
    for each in (talk, alone):
        each.say({0: "I am Clara", 1: "hello"}, max_tokens=4)
    talk.save(1, tmp_path / "one.ccm")
    other, before = talk.session(1), row(talk, 0)
    stream = talk.stream({0: "who am I"}, max_tokens=12)
    pieces = [next(stream)[1]]
    for act in (
        lambda: talk.say({0: "what"}),
        lambda: talk.say({1: "what", 0: "what"}),
        lambda: next(talk.stream({0: "what"})),
        lambda: talk.say_alone({0: "what"}),
        lambda: talk.tell({0: [("hi", "hi")]}),
        lambda: talk.read({0: "hi"}),
        lambda: talk.reset(0),
        lambda: talk.restore(0, other),
        lambda: talk.forget(0, 0),
        lambda: talk.fork(1, 0),
        lambda: talk.load(0, tmp_path / "one.ccm"),
    ):
        with pytest.raises(UserError) as refused:
            ask(act)
        assert str(refused.value) == BUSY
    assert same(talk, alone, 0, 1), "what is refused changes nothing, not even of other sessions"
    ask(lambda: talk.save(0, tmp_path / "before.ccm"))
    ask(lambda: talk.fork(0, 2))
    assert all(map(np.array_equal, row(talk, 2), before)) and talk.memory_bytes(0) == talk.memory_bytes(2)
    reply = ask(lambda: talk.say({1: "what"}, max_tokens=9))
    ask(lambda: talk.reset(4))
    assert ask(lambda: next(stream))[0] == 0, "any thread may go on with it"
    assert reply == alone.say({1: "what"}, max_tokens=9)
    pieces = talk.session(0).turns, list(stream), alone.say({0: "who am I"}, max_tokens=12)
    assert len(pieces[0]) == 1 and same(talk, alone, 0, 1)
    assert talk.say({0: "x"}, max_tokens=3) == alone.say({0: "x"}, max_tokens=3)


def test_a_stream_is_heard_whole(talk, alone):
    """Whatever others do in between: pieces may be longer, and together they are the reply."""
    heard = {0: "", 1: ""}
    streams = {number: talk.stream({number: "hello"}, max_tokens=16) for number in heard}
    for turn in range(3):
        for number, stream in streams.items():
            heard[number] += next(stream, (number, ""))[1]
        talk.say({2: f"turn {turn}"}, max_tokens=5)
    for number, stream in streams.items():
        heard[number] += "".join(piece for _, piece in stream)
    replies = alone.say(dict.fromkeys(heard, "hello"), max_tokens=16)
    assert {number: text.strip() for number, text in heard.items()} == replies and same(talk, alone, 0, 1)


def test_a_stream_that_is_given_up_is_nothing(talk, alone):
    with contextlib.closing(talk.stream({0: "hello"})) as stream:
        next(stream)
    assert same(talk, alone, 0)
    next(talk.stream({0: "hello"}))  # nobody holds it
    talk.reset(0)
    assert talk.say({0: "hi"}, max_tokens=3) == alone.say({0: "hi"}, max_tokens=3)


def test_a_file_that_all_write_is_one_of_theirs(talk, tmp_path):
    talk.say({number: f"number {number}" for number in range(ROWS)}, max_tokens=2)
    begin, path = threading.Barrier(ROWS), tmp_path / "one.ccm"

    def act(number):
        begin.wait(300)
        for _ in range(5):
            talk.save(number, path, about={"of": number})

    with ThreadPoolExecutor(ROWS) as threads:
        list(threads.map(act, range(ROWS)))
    about, kept = talk.load(0, path), row(talk, 0)
    assert about["of"] == 0 or all(map(np.array_equal, kept, row(talk, about["of"])))
    assert [each.name for each in tmp_path.iterdir()] == ["one.ccm"]


def test_errors_reach_who_asked(talk, alone, monkeypatch):
    """A mistake is its own thread's alone; where a program fails, all who waited hear so, and nothing changes."""
    streams = {number: talk.stream({number: "hello"}, max_tokens=16) for number in (0, 1)}
    for stream in streams.values():
        next(stream)
    with pytest.raises(UserError, match="do not fit"):
        elsewhere(lambda: talk.say({2: "x" * 100}))
    with pytest.raises(UserError, match="there is no session 9"):
        elsewhere(lambda: talk.say({9: "x"}))
    list(streams[0])
    alone.say({0: "hello"}, max_tokens=16)

    def fails(self, wants):
        raise RuntimeError("no memory left on the device")

    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "make", fails)
        with pytest.raises(RuntimeError, match="no memory left"):
            elsewhere(lambda: talk.say({2: "hi"}))
    with pytest.raises(UserError, match="the turn of session 1 was interrupted; say it again"):
        next(streams[1])
    assert same(talk, alone, *range(ROWS))
    turns = {1: "hello", 2: "hi"}
    assert talk.say(turns, max_tokens=4) == alone.say(turns, max_tokens=4)


def test_what_was_made_in_vain_is_not_kept(talk, alone, monkeypatch):
    """A turn that others have brought to its end, and that is lost before its caller comes, is no empty session."""
    alone.say({0: "I am Clara"}, max_tokens=3)
    talk.say({0: "I am Clara"}, max_tokens=3)
    stream = talk.stream({0: "what"}, max_tokens=3)
    next(stream)
    talk.say({1: "hello there"}, max_tokens=20)
    monkeypatch.setattr(Scratch, "make", lambda self, wants: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        talk.say({2: "hi"})
    with pytest.raises(UserError, match="the turn of session 0 was interrupted"):
        list(stream)
    assert same(talk, alone, 0)


def test_an_interrupt_takes_nothing_from_others(talk, alone, monkeypatch):
    """Ctrl-C in the middle of a program ends the main thread's reply, and that one alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stream = talk.stream({0: "hello"}, max_tokens=16)
        next(stream)
        make = Scratch.make

        def interrupted(self, wants):
            signal.raise_signal(signal.SIGINT)
            return make(self, wants)

        with monkeypatch.context() as patch:
            patch.setattr(Scratch, "make", interrupted)
            with pytest.raises(KeyboardInterrupt):
                talk.say({1: "hi"}, max_tokens=4)
        list(stream)
    finally:
        signal.signal(signal.SIGINT, before)
    alone.say({0: "hello"}, max_tokens=16)
    assert same(talk, alone, *range(ROWS))


def test_the_lock_is_fair():
    """A thread that gives it back and asks again at once comes behind who waits; its own, it may take twice."""
    lock, order = FairLock(), []

    def second():
        with lock:
            order.append("second")

    thread = threading.Thread(target=second)
    with lock, lock:
        thread.start()
        while lock._door.acquire(blocking=False):  # until the other one stands in it
            lock._door.release()
            assert thread.is_alive()
    with lock:
        order.append("first again")
    thread.join()
    assert order == ["second", "first again"]
