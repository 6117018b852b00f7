"""Conversations under an event loop: it goes on while they do their work, and tasks may be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory.generation import Sampling
from jax_ccm.sessions.asynchronous import AsyncConversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.scratch import Scratch
from tests.sessions.conftest import BUSY, ROWS, same


@pytest.fixture
def talk(talk):
    return AsyncConversations(talk)


class Gate:
    """Where work in other threads waits until the event loop lets it go on."""

    def __init__(self, monkeypatch, name):
        self.reached, self.open, act = asyncio.Event(), threading.Event(), getattr(Scratch, name)
        loop = asyncio.get_running_loop()

        def waits(scratch, *given, **named):
            if not self.open.is_set():
                loop.call_soon_threadsafe(self.reached.set)
                assert self.open.wait(300), "the event loop stands still"
            return act(scratch, *given, **named)

        monkeypatch.setattr(Scratch, name, waits)


def test_all_of_it(talk, alone, tmp_path):
    """Each call is what it is without an event loop; turns of different sessions are answered side by side."""
    seen = []

    async def act():
        await talk.tell({0: [("I am Clara", "hi")]})
        await talk.read({1: "a text to read"})
        replies = await asyncio.gather(*(talk.say({row: "hello there"}, max_tokens=6 + row) for row in range(ROWS)))
        async for row, piece in talk.stream({0: "who am I"}, max_tokens=9):
            seen.append((row, piece))
        replies.append(await talk.say_alone({1: "what"}, max_tokens=4))
        how = Answering(max_tokens=4, sampling=Sampling(1.0), logprobs=2)
        replies += [each async for each in talk.replies({1: "what"}, {1: how})][-1:]
        kept = await talk.session(1)
        await talk.save(0, tmp_path / "a.ccm", about={"of": "Clara"})
        await talk.fork(0, 1)
        await talk.reset(0)
        about = await talk.load(0, tmp_path / "a.ccm")
        await talk.restore(2, kept)
        return [*replies, about["of"], await talk.forget(2, 0), await talk.memory_bytes(1)]

    found = asyncio.run(act())
    alone.tell({0: [("I am Clara", "hi")]})
    alone.read({1: "a text to read"})
    expected = [alone.say({row: "hello there"}, max_tokens=6 + row) for row in range(ROWS)]
    reply = alone.say({0: "who am I"}, max_tokens=9)[0]
    assert {row for row, _ in seen} == {0} and "".join(piece for _, piece in seen).strip() == reply
    expected.append(alone.say_alone({1: "what"}, max_tokens=4))
    expected.append(list(alone.replies({1: "what"}, {1: Answering(4, Sampling(1.0), logprobs=2)}))[-1])
    kept = alone.session(1)
    alone.fork(0, 1)
    alone.restore(2, kept)
    assert found == [*expected, "Clara", alone.forget(2, 0), alone.memory_bytes(1)]
    assert same(talk.talk, alone, *range(ROWS))
    with pytest.raises(UserError, match="there is a system message"):
        asyncio.run(talk.instruct({0: "be brief"}))


@pytest.mark.parametrize("name", ["read", "make", "close"])
def test_the_loop_goes_on(talk, alone, monkeypatch, name):
    """While text is read, tokens are made and memory is written, it runs other callbacks, any number of them."""

    async def act():
        gate, ticks = Gate(monkeypatch, name), 0
        asked = asyncio.create_task(talk.say({0: "hello"}, max_tokens=4))
        await gate.reached.wait()
        while ticks < 1000:
            ticks += 1
            await asyncio.sleep(0)
        assert not asked.done()
        gate.open.set()
        return await asked

    assert asyncio.run(act()) == alone.say({0: "hello"}, max_tokens=4)


PLACES = [(call, name) for call in ("say", "stream") for name in ("read", "make", "close")]


@pytest.mark.parametrize("call, name", [*PLACES, ("tell", "read"), ("tell", "close")])
def test_a_cancelled_reply_is_no_cancelled_conversation(talk, alone, monkeypatch, call, name):
    """It stops at the next step, wherever it was; when the task has ended, its session is free and as it was."""
    alone.say({0: "I am Clara"}, max_tokens=4)

    async def act():
        await talk.say({0: "I am Clara"}, max_tokens=4)
        with monkeypatch.context() as patch:
            gate, steps = Gate(patch, name), []
            step = Scratch.make
            patch.setattr(Scratch, "make", lambda self, wants: steps.append(1) or step(self, wants))

            async def asks():
                if call == "say":
                    await talk.say({0: "hello"}, max_tokens=40)
                elif call == "tell":
                    await talk.tell({0: [("hello", "hi"), ("and", "so on")]})
                else:
                    async for _ in talk.stream({0: "hello"}, max_tokens=40):
                        pass

            asked = asyncio.create_task(asks())
            await gate.reached.wait()
            behind = asyncio.create_task(talk.memory_bytes(0))
            made = len(steps)
            for _ in range(3):  # as often as one likes
                asked.cancel()
                await asyncio.sleep(0)
            assert not asked.done(), "it waits for the step that cannot be broken off"
            gate.open.set()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert len(steps) == made and await behind == alone.memory_bytes(0)

    asyncio.run(act())
    assert same(talk.talk, alone, 0) and not talk._asked
    assert asyncio.run(talk.say({0: "who"}, max_tokens=4)) == alone.say({0: "who"}, max_tokens=4)


def test_who_is_cancelled_in_the_queue_disturbs_nobody(talk, alone, monkeypatch):
    """Calls about a session come in the order in which they were made, and one that has gone is not among them."""

    async def act():
        gate = Gate(monkeypatch, "make")
        calls = [asyncio.create_task(talk.say({0: text}, max_tokens=4)) for text in ("first", "gone", "second")]
        await gate.reached.wait()
        calls[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[1]
        assert not calls[2].done()
        other = asyncio.create_task(talk.reset(1))  # who wants another session waits for nobody's turn
        gate.open.set()
        await other
        return [await calls[0], await calls[2]]

    assert asyncio.run(act()) == [alone.say({0: text}, max_tokens=4) for text in ("first", "second")]
    assert same(talk.talk, alone, 0)


def test_a_stream_that_is_left_frees_its_session(talk, alone):
    async def act():
        async with contextlib.aclosing(talk.stream({0: "hello"}, max_tokens=16)) as pieces:
            async for row, _ in pieces:
                assert row == 0
                with pytest.raises(UserError, match=BUSY):
                    await talk.say({0: "what"})
                with pytest.raises(UserError, match=BUSY):
                    await talk.reset(0)
                assert await talk.say({1: "what"}, max_tokens=4)
                break
        await talk.reset(1)
        return await talk.say({0: "what"}, max_tokens=4)

    assert asyncio.run(act()) == alone.say({0: "what"}, max_tokens=4) and same(talk.talk, alone, 0, 1)


def test_errors_reach_who_asked(talk, alone):
    """Each call of many at once has its own end."""

    async def act():
        asked = [{0: "hello"}, {1: "x" * 100}, {2: "hi"}, {7: "hi"}, {}]
        return await asyncio.gather(*(talk.say(turns, max_tokens=4) for turns in asked), return_exceptions=True)

    first, long, second, nobody, nothing = asyncio.run(act())
    assert [first, second] == [alone.say({0: "hello"}, max_tokens=4), alone.say({2: "hi"}, max_tokens=4)]
    for error, message in ((long, "do not fit"), (nobody, "there is no session 7"), (nothing, "there are no turns")):
        assert isinstance(error, UserError) and message in str(error)
    assert same(talk.talk, alone, *range(ROWS)) and not talk._asked
