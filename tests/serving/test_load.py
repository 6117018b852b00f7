"""Many clients at once, that go away in the middle, and a server that is killed and started again, again and again.

Each client notes down what it said and heard. In the end all of it is said once more, to a conversation that nobody
disturbs: the same answers, log-probabilities and counts. The server is killed three times, which takes up to a minute
on two busy cores; ``LOAD_KILLS=10 pytest tests/serving/test_load.py`` is the whole of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import queue
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jax
import numpy as np
import pytest

from jax_ccm.config.loading import Experiment
from jax_ccm.memory import files
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.scratch import Scratch
from jax_ccm.sessions.state import Session
from jax_ccm.sessions.turns import Reply
from tests.serving.clients import MODEL
from tests.test_chat import experiment

KILLS = int(os.environ.get("LOAD_KILLS", "3"))
CLIENTS, ROWS = 64, 8
HOW = Answering(max_tokens=4, logprobs=2)
QUESTION = "what is my secret"

# All is imported once, and each server is forked from there before anything has started. The model comes as arrays: to
# make it anew takes longer than all the rest.
SERVER = """
import os, pickle, sys
from pathlib import Path
import tests.conftest  # quick to compile
import jax, numpy, safetensors.numpy, uvicorn
from jax_ccm import serve
from jax_ccm.config import cli
from jax_ccm.serving import app, pool
from jax_ccm.serving.store import Store
from jax_ccm.sessions.scratch import Scratch
from tests import cases
from tests.serving import test_load
folder = Path(sys.argv[1])
tree, arrays = pickle.loads((folder / "model").read_bytes())
read, count = Scratch.read, numpy.memmap(folder / "read", numpy.int64, "r+")
def counted(self, row, piece, **how):
    count[0] += len(piece)
    read(self, row, piece, **how)
Scratch.read = counted
options = serve.Options(port=0, workdir=folder / "sessions", rows=test_load.ROWS)
def start():
    cases.model = lambda **_: jax.tree.unflatten(tree, jax.device_put(arrays))
    return serve.serve(test_load.made(), Store(options.workdir), test_load.MODEL, "", options)
for _ in sys.stdin:
    process = os.fork()
    if not process:
        cli.run(start)
    print("process", process, flush=True)
    os.waitpid(process, 0)
    print("ended", flush=True)
"""


def made() -> Experiment:
    """A memory that stays as it is in size, however many turns there are."""
    return experiment("ccm_merge", comp_tokens=2)


class Server:
    """A server that can be killed and started again, and what it has read since it was born first."""

    def __init__(self, folder: Path):
        self.folder, self.url, self.said, self._process = folder, "", list[str](), 0
        arrays, tree = jax.tree.flatten(made().model)
        (folder / "model").write_bytes(pickle.dumps((tree, jax.device_get(arrays))))
        np.zeros(1, np.int64).tofile(folder / "read")
        self._parent = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder)], cwd=Path(__file__).parents[2], text=True, bufsize=1,
            env=os.environ | {"PYTHONPATH": "."}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._said: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._parent.stdout:
            self.said.append(line)
            self._said.put(line)
        self._said.put("")

    def _expect(self, pattern: str) -> str:
        said = ""
        while line := self._said.get(timeout=300):
            said += line
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(said)

    def start(self) -> None:
        self._parent.stdin.write("start\n")
        self._process = int(self._expect(r"^process (\d+)"))
        self.url = self._expect(r"running on (http://\S+)")

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)

    def ended(self) -> None:
        self._expect("^(ended)")

    @property
    def read(self) -> int:
        """Tokens that went through its programs."""
        return int(np.fromfile(self.folder / "read", np.int64)[0])

    def close(self) -> None:
        self._parent.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        self._parent.wait(300)
        self._reader.join()
        self._parent.stdout.close()


@dataclasses.dataclass
class Said:
    """A turn, and what was heard of it.

    Attributes:
      text: of the turn.
      quiet: in which quiet time it was said; 0 for none.
      answer, logprobs: of it.
      known, read: tokens that the session had read before, and those that were read for it, as the server says at the
        end of the answer: the turn is acknowledged. None before.
    """

    text: str
    quiet: int = 0
    answer: str = ""
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    known: int | None = None
    read: int | None = None

    def counted(self, usage: dict[str, Any]) -> None:
        self.known = usage["prompt_tokens_details"]["cached_tokens"]
        self.read = usage["prompt_tokens"] - self.known


@dataclasses.dataclass
class Found:
    """How much of a session was there after a restart."""

    turns: int
    tokens: int


# Turns of which nobody has heard the end.
Open = tuple[Said, ...]


class Client:
    """Talks in a session of its own.

    Attributes:
      notes: all that it said, heard and found.
    """

    def __init__(self, number: int):
        self.name, self.chance, self.notes = f"client-{number}", random.Random(number), list[Said | Found]()
        self.secret = "".join(self.chance.choices("abcdefghijklmnopqrstuvwxyz", k=8))

    def text(self) -> str:
        """Something else; several in a row have different lengths, so that counts tell which of them were kept."""
        return "".join(self.chance.choices("abcdefgh ", k=4 + len(self.notes) % 13)) + "x"

    def body(self, text: str, stream: bool) -> dict[str, Any]:
        asked = {"model": MODEL, "session_id": self.name, "messages": [{"role": "user", "content": text}]}
        how = {"max_tokens": HOW.max_tokens, "logprobs": True, "top_logprobs": HOW.logprobs}
        return asked | how | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})

    async def say(self, http: httpx.AsyncClient, text: str, quiet: int = 0) -> bool:
        """Says something and hears the answer to its end; False if the server died before."""
        said = Said(text, quiet)
        self.notes.append(said)
        stream = self.chance.random() < 0.4
        try:
            if not stream:
                answer = await http.post("/v1/chat/completions", json=self.body(text, stream))
                assert answer.status_code == 200, answer.text
                (choice,) = answer.json()["choices"]
                said.answer, said.logprobs = choice["message"]["content"], choice["logprobs"]["content"]
                said.counted(answer.json()["usage"])
                return True
            async for event in self.events(http, text):
                for choice in event["choices"]:
                    said.answer += choice["delta"].get("content", "")
                    said.logprobs += (choice.get("logprobs") or {"content": []})["content"]
                if event.get("usage"):
                    said.counted(event["usage"])
        except httpx.TransportError:
            return False
        return said.known is not None

    async def events(self, http: httpx.AsyncClient, text: str) -> AsyncIterator[dict[str, Any]]:
        async with http.stream("POST", "/v1/chat/completions", json=self.body(text, stream=True)) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    async def goes_away(self, http: httpx.AsyncClient) -> bool:
        """Says something and does not wait for the end of the answer; False if the server has died."""
        text = self.text()
        self.notes.append(Said(text))
        try:
            if self.chance.random() < 0.5:  # while it is answered
                async with contextlib.aclosing(self.events(http, text)) as events:
                    async for _ in events:
                        if self.chance.random() < 0.7:
                            return True
                return True
            # Without a look at the answer, or in the middle of the request.
            content = json.dumps(self.body(text, stream=self.chance.random() < 0.5)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            address = urlsplit(str(http.base_url))
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            whole = head.encode() + content
            writer.write(whole if self.chance.random() < 0.7 else whole[: self.chance.randrange(len(whole))])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except (httpx.TransportError, OSError):
            return False
        return True

    async def look(self, http: httpx.AsyncClient) -> None:
        """Notes what is there of its session."""
        answer = await http.get(f"/sessions/{self.name}")
        assert answer.status_code == 200, answer.text
        self.notes.append(Found(answer.json()["turns"], answer.json()["tokens"]))


async def quiet(clients: list[Client], http: httpx.AsyncClient, server: Server, number: int) -> int:
    """All ask the same right after a start, and nobody is disturbed; tokens that went through the programs for it."""
    before = server.read
    assert all(await asyncio.gather(*(client.say(http, QUESTION, number) for client in clients)))
    counts = dict(re.findall(r"^jax_ccm_(\w+)_total (\d+)$", (await http.get("/metrics")).text, re.MULTILINE))
    said: list[Said] = [client.notes[-1] for client in clients]
    assert int(counts["tokens_read"]) == sum(turn.read for turn in said), "nothing else was read since the start"
    assert int(counts["loads"]) == CLIENTS, "each session came back from disk once"
    return server.read - before


async def wild(clients: list[Client], http: httpx.AsyncClient, server: Server, acknowledged: int) -> None:
    """Turns and departures in any order, until so many turns were acknowledged and the server is killed."""
    left = acknowledged

    async def talks(client: Client) -> None:
        nonlocal left
        lives, away = True, False
        while lives and left > 0:
            away = not away and client.chance.random() < 0.4
            lives = await (client.goes_away(http) if away else client.say(http, client.text()))
            if lives and not away:
                left -= 1
                if left == 0:
                    server.kill()

    await asyncio.gather(*(talks(client) for client in clients))
    assert left <= 0


async def ordeal(clients: list[Client], server: Server) -> tuple[list[int], dict[str, bytes]]:
    """Lives of a server; what was read in each quiet time, and the memories in the end."""
    read, chance, memories = [], random.Random(0), {}
    for life in range(KILLS + 1):
        await asyncio.to_thread(server.start)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
            if not life:
                told = (client.say(http, f"my secret is {client.secret}") for client in clients)
                assert all(await asyncio.gather(*told))
            else:
                await asyncio.gather(*(client.look(http) for client in clients))
                read.append(await quiet(clients, http, server, life))
            if life < KILLS:
                await wild(clients, http, server, chance.randrange(20, 80))
                await asyncio.to_thread(server.ended)
            else:
                for client in clients:
                    memories[client.name] = (await http.get(f"/sessions/{client.name}/memory")).content
    return read, memories


class Undisturbed:
    """Says once more what clients have said, each in a row of its own.

    Attributes:
      read: tokens that went through the programs, by quiet time.
    """

    def __init__(self, monkeypatch):
        self.talk, self.read = Conversations(made(), ROWS), [0] * (KILLS + 1)
        self._count, self._free, read = [0] * ROWS, queue.SimpleQueue(), Scratch.read
        for row in range(ROWS):
            self._free.put(row)

        def counted(scratch, row, piece, **how):
            self._count[row] += len(piece)
            read(scratch, row, piece, **how)

        monkeypatch.setattr(Scratch, "read", counted)

    def say(self, row: int, text: str) -> Reply:
        *_, replies = self.talk.replies({row: text}, {row: HOW})
        return replies[row]

    def after(self, row: int, session: Session, turns: Sequence[Said]) -> Session:
        self.talk.restore(row, session)
        for said in turns:
            self.say(row, said.text)
        return self.talk.session(row)

    def may_be(
        self, row: int, session: Session, open: Open, fits: Callable[[Session], bool]
    ) -> list[tuple[Session, Open]]:
        """What a session may have become, and the turns that it may still become something by.

        Of turns that nobody heard the end of some were kept, in any order: the requests of one client may overtake each
        other on their ways.
        """
        if fits(session):
            return [(session, open)]
        for count in range(1, len(open) + 1):
            found = []
            for kept in itertools.permutations(open, count):
                if fits(one := self.after(row, session, kept)):
                    found.append((one, tuple(said for said in open if said not in kept)))
            if found:
                return found
        return []

    def check(self, client: Client) -> tuple[list[np.ndarray], Session]:
        """Compares; the log-probabilities of the answers to the question, and the memory in the end."""
        row, answers = self._free.get(), []
        self.talk.reset(row)
        held: list[tuple[Session, Open]] = [(self.talk.session(row), ())]
        for note in client.notes:
            if isinstance(note, Found):
                fits = lambda one, note=note: (len(one.turns), one.tokens) == (note.turns, note.tokens)
                held = [(one, ()) for each in held for one, _ in self.may_be(row, *each, fits)]
            elif note.known is not None:
                fits = lambda one, note=note: one.tokens == note.known
                held = [each for before in held for each in self.may_be(row, *before, fits)]
                held = [(self.compare(row, one, note), open) for one, open in held]
                held = [(one, open) for one, open in held if one is not None]
                if note.quiet:
                    answers.append(numbers(note.logprobs)[0])
            else:
                held = [(one, (*open, note)) for one, open in held]
            assert held, f"{client.name}: nothing that was acknowledged leads to {note}"
        self._free.put(row)
        return answers, held[0][0]

    def compare(self, row: int, session: Session, note: Said) -> Session | None:
        """What a session becomes by a turn; None if it is not what the client heard."""
        self.talk.restore(row, session)
        before = self._count[row]
        reply = self.say(row, note.text)
        heard = note.answer, [each["token"] for each in note.logprobs]
        if note.read != reply.read or heard != (reply.text, [each.token for each in reply.logprobs]):
            return None
        if not np.allclose(numbers(note.logprobs), values(reply.logprobs), rtol=0, atol=1e-5):
            return None
        self.read[note.quiet] += self._count[row] - before
        return self.talk.session(row)


def numbers(logprobs: list[dict[str, Any]]) -> np.ndarray:
    return np.asarray([[x["logprob"], *(top["logprob"] for top in x["top_logprobs"])] for x in logprobs])


def values(logprobs) -> np.ndarray:
    return np.asarray([[x.value, *(top.value for top in x.top)] for x in logprobs])


@pytest.mark.processes
def test_nothing_is_lost_and_nothing_leaks(tmp_path, monkeypatch):
    clients, server = [Client(number) for number in range(CLIENTS)], Server(tmp_path)
    try:
        read, memories = asyncio.run(ordeal(clients, server))
    finally:
        server.close()
    assert not any("Traceback" in line for line in server.said), "".join(server.said)
    oracle = Undisturbed(monkeypatch)
    with ThreadPoolExecutor(ROWS) as threads:
        found = list(threads.map(oracle.check, clients))
    assert read == oracle.read[1:], "after a restart a turn costs what it costs without one"
    # Each was told a secret, and all were asked: the same question, and an answer of its own wherever one looks.
    asked = [np.concatenate(answers) for answers, _ in found]
    apart = [np.abs(one - other).max() for one, other in itertools.combinations(asked, 2)]
    assert min(apart) > 1e-3, "no two sessions can be taken for each other"
    for client, (_, kept) in zip(clients, found, strict=True):
        (tmp_path / "one.ccm").write_bytes(memories[client.name])
        arrays = files.read(tmp_path / "one.ccm").arrays
        assert arrays["tokens"].tolist() == kept.cache.tokens.tolist()
        np.testing.assert_allclose(arrays["logits"], np.asarray(kept.cache.logits), rtol=0, atol=1e-5)
    left = {path.name for path in (tmp_path / "sessions").iterdir()} - {".lock"}
    assert left == {f"{client.name}.ccm" for client in clients}
