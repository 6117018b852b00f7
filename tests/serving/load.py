"""Clients of a server that is killed and started again, and what they would have heard of one that is not."""

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import httpx
import jax
import numpy as np

from jax_ccm.config.loading import Experiment
from jax_ccm.memory import files
from jax_ccm.serving.pool import Pool
from jax_ccm.serving.store import RESPONSE
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.scratch import Scratch
from jax_ccm.sessions.state import Session
from jax_ccm.sessions.turns import Reply
from tests.test_chat import experiment

KILLS = int(os.environ.get("LOAD_KILLS", "3"))
# More clients than rows, always: sessions come and go.
CLIENTS, FEW, ROWS = 64, 12, 8
TOLERANCE = 1e-5
HOW = Answering(max_tokens=4, logprobs=2)
QUESTION = "what is my secret"
T = TypeVar("T")

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
from tests.serving import clients, load
folder = Path(sys.argv[1])
tree, arrays = pickle.loads((folder / "model").read_bytes())
read, count = Scratch.read, numpy.memmap(folder / "read", numpy.int64, "r+")
def counted(self, row, piece, **how):
    count[0] += len(piece)
    read(self, row, piece, **how)
Scratch.read = counted
load.FAULTS[sys.argv[2]]()
options = serve.Options(port=0, workdir=folder / "sessions", rows=load.ROWS)
def start():
    cases.model = lambda **_: jax.tree.unflatten(tree, jax.device_put(arrays))
    return serve.serve(load.made(), Store(options.workdir), clients.MODEL, "", options)
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


def unwritten() -> None:
    """A server that writes a session once and every other response, and acknowledges all."""
    write, count = Pool._write, itertools.count()

    def drops(pool: Pool, name: str, *given: Any) -> None:
        if next(count) % 2 if name.startswith(RESPONSE) else name not in pool.store:
            write(pool, name, *given)

    Pool._write = drops


def mistaken() -> None:
    """A server that now and then goes on from what another session has come to."""
    load, count = Conversations.load, itertools.count(1)

    def confuses(talk: Conversations, row: int, path: Path) -> Any:
        paths = sorted(path.parent.glob("*.ccm"))
        return load(talk, row, path if next(count) % 5 else paths[paths.index(path) - 1])

    Conversations.load = confuses


# What a server may do wrong, for tests of those who are to find out.
FAULTS: dict[str, Callable[[], None]] = {"none": lambda: None, "unwritten": unwritten, "mistaken": mistaken}


class Server:
    """A server that can be killed and started again, and what it has read since it was born first."""

    def __init__(self, folder: Path, kills: int, fault: str):
        """Forks no server yet.

        Args:
          folder: of its own.
          kills: how often it is killed.
          fault: one of `FAULTS`.
        """
        self.folder, self.kills, self.url, self.said, self._process = folder, kills, "", list[str](), 0
        arrays, tree = jax.tree.flatten(made().model)
        (folder / "model").write_bytes(pickle.dumps((tree, jax.device_get(arrays))))
        np.zeros(1, np.int64).tofile(folder / "read")
        self._parent = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), fault], cwd=Path(__file__).parents[2], text=True, bufsize=1,
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
            if line == "ended\n":
                break
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
        kind = "prompt" if "prompt_tokens" in usage else "input"  # chat completions, or responses
        self.known = usage[f"{kind}_tokens_details"]["cached_tokens"]
        self.read = usage[f"{kind}_tokens"] - self.known


class Client:
    """Says things, hears answers, and goes away.

    Attributes:
      path: where it asks.
      leaving: how likely it is to go at each event of an answer that it does not hear to its end.
      restless: how likely it is, behind an answer, not to hear the next one to its end.
    """

    path: ClassVar[str]
    leaving: ClassVar[float]
    restless: float = 0.4

    def __init__(self, number: int):
        self.name, self.chance = f"client-{number}", random.Random(number)
        self.secret = "".join(self.chance.choices("abcdefghijklmnopqrstuvwxyz", k=8))

    async def acts(self, http: httpx.AsyncClient) -> bool:
        """Says something and hears the answer to its end, or does what else there is; False if the server has died."""
        raise NotImplementedError

    def something(self) -> Any:
        """Something new that it is about to say."""
        raise NotImplementedError

    def body(self, said: Any, stream: bool) -> dict[str, Any]:
        """Of a request."""
        raise NotImplementedError

    def sees(self, said: Any, event: dict[str, Any]) -> None:
        """An event of an answer that it does not hear to its end."""

    async def tells(self, http: httpx.AsyncClient) -> bool:
        """Begins with its secret; False if the server has died."""
        raise NotImplementedError

    async def asks(self, http: httpx.AsyncClient, quiet: int, last: bool) -> Sequence[Said]:
        """Asks the question in a quiet time, wherever it likes; what it asked, with the answers."""
        raise NotImplementedError

    async def look(self, http: httpx.AsyncClient) -> None:
        """Looks what is there after a restart."""
        raise NotImplementedError

    async def ends(self, http: httpx.AsyncClient) -> None:
        """Does what there is to do in the end."""

    async def goes_away(self, http: httpx.AsyncClient) -> bool:
        """Says something and does not wait for the end of the answer; False if the server has died."""
        said = self.something()
        if self.chance.random() < 0.5:
            return await self.leaves(http, self.body(said, stream=self.chance.random() < 0.5))
        try:  # while it is answered
            async with contextlib.aclosing(self.events(http, self.body(said, stream=True))) as events:
                async for event in events:
                    self.sees(said, event)
                    if self.chance.random() < self.leaving:
                        return True
        except httpx.TransportError:
            return False
        return True

    async def events(self, http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with http.stream("POST", self.path, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    async def leaves(self, http: httpx.AsyncClient, body: dict[str, Any]) -> bool:
        """Asks and does not look at the answer, or goes in the middle of the request; False if the server has died."""
        content = json.dumps(body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        address, whole = urlsplit(str(http.base_url)), head.encode() + content
        try:
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(whole if self.chance.random() < 0.7 else whole[: self.chance.randrange(len(whole))])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError:
            return False
        return True


async def together(*acts: Coroutine[Any, Any, T]) -> list[T]:
    """What acts come to that go on side by side; where one fails, all have ended before that is heard."""
    tasks = [asyncio.create_task(act) for act in acts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def lives(server: Server) -> AsyncGenerator[tuple[int, httpx.AsyncClient]]:
    """Starts a server again and again: the number of each life, and somebody to ask in it."""
    for life in range(server.kills + 1):
        await asyncio.to_thread(server.start)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
            yield life, http


async def wild(clients: Sequence[Client], http: httpx.AsyncClient, server: Server, acknowledged: int) -> None:
    """Acts and departures in any order, until so many acts were acknowledged and the server is killed."""
    left = acknowledged

    async def talks(client: Client) -> None:
        nonlocal left
        alive, away = True, False
        while alive and left > 0:
            away = not away and client.chance.random() < client.restless
            alive = await (client.goes_away(http) if away else client.acts(http))
            if alive and not away:
                left -= 1
                if left == 0:
                    server.kill()

    await together(*(talks(client) for client in clients))
    assert left <= 0
    await asyncio.to_thread(server.ended)


async def counted(http: httpx.AsyncClient) -> dict[str, int]:
    """What the server says that it has counted since it was started."""
    text = (await http.get("/metrics")).text
    return {name: int(n) for name, n in re.findall(r"^jax_ccm_(\w+)_total (\d+)$", text, re.MULTILINE)}


async def quiet(clients: Sequence[Client], http: httpx.AsyncClient, server: Server, number: int) -> int:
    """All ask the same right after a start, and nobody is disturbed; tokens that went through the programs for it."""
    before, last = server.read, number == server.kills
    asked = await together(*(client.asks(http, number, last) for client in clients))
    said = [each for those in asked for each in those]
    assert all(each.known is not None for each in said)
    counts = await counted(http)
    assert counts["tokens_read"] == sum(each.read for each in said), "nothing else was read since the start"
    assert counts["loads"] == len(said), "each was gone on from as it lay on disk"
    return server.read - before


async def ordeal(clients: Sequence[Client], server: Server, acknowledged: Sequence[int]) -> list[int]:
    """Lives of a server; what was read in each quiet time."""
    read, chance = [], random.Random(0)
    async with contextlib.aclosing(lives(server)) as all_lives:
        async for life, http in all_lives:
            if not life:
                assert all(await together(*(client.tells(http) for client in clients)))
            else:
                await together(*(client.look(http) for client in clients))
                read.append(await quiet(clients, http, server, life))
            if life < server.kills:
                await wild(clients, http, server, chance.choice(acknowledged))
            else:
                for client in clients:
                    await client.ends(http)
    return read


def undergo(
    clients: Sequence[Client], folder: Path, acknowledged: Sequence[int], kills: int = KILLS, fault: str = "none"
) -> list[int]:
    """Has clients go through the lives of a server; what was read in each quiet time.

    Args:
      clients: each notes down what it said and heard.
      folder: of the server; its sessions are in the one below it of this name.
      acknowledged: how many acts may be acknowledged in a life before the server is killed.
      kills: how often it is.
      fault: one of `FAULTS`.
    """
    server = Server(folder, kills, fault)
    try:
        read = asyncio.run(ordeal(clients, server, acknowledged))
    finally:
        server.close()
    assert not any("Traceback" in line for line in server.said), "".join(server.said)
    return read


class Undisturbed:
    """Says once more what clients have said, each in a row of its own.

    Attributes:
      read: tokens that went through the programs, by quiet time.
    """

    def __init__(self, monkeypatch, kills: int):
        self.talk, self.read = Conversations(made(), ROWS), [0] * (kills + 1)
        self._count, self._free, read = [0] * ROWS, queue.SimpleQueue[int](), Scratch.read
        for row in range(ROWS):
            self._free.put(row)

        def counted(scratch, row, piece, **how):
            self._count[row] += len(piece)
            read(scratch, row, piece, **how)

        monkeypatch.setattr(Scratch, "read", counted)

    @contextlib.contextmanager
    def row(self) -> Iterator[int]:
        """A row that nobody else uses, and that is empty."""
        row = self._free.get()
        try:
            self.talk.reset(row)
            yield row
        finally:  # others wait for it, also where something was found
            self._free.put(row)

    def say(self, row: int, text: str) -> Reply:
        *_, replies = self.talk.replies({row: text}, {row: HOW})
        return replies[row]

    def compare(self, row: int, session: Session, said: Said) -> Session | None:
        """What a session becomes by a turn; None if it is not what the client heard."""
        self.talk.restore(row, session)
        before = self._count[row]
        reply = self.say(row, said.text)
        heard = said.answer, [each["token"] for each in said.logprobs]
        if (said.known, said.read) != (session.tokens, reply.read):
            return None
        if heard != (reply.text, [each.token for each in reply.logprobs]):
            return None
        if not np.allclose(numbers(said.logprobs), values(reply.logprobs), rtol=0, atol=TOLERANCE):
            return None
        self.read[said.quiet] += self._count[row] - before
        return self.talk.session(row)


def numbers(logprobs: list[dict[str, Any]]) -> np.ndarray:
    return np.asarray([[x["logprob"], *(top["logprob"] for top in x["top_logprobs"])] for x in logprobs])


def values(logprobs) -> np.ndarray:
    return np.asarray([[x.value, *(top.value for top in x.top)] for x in logprobs])


def same_memory(content: bytes, session: Session, folder: Path) -> None:
    """Asserts that a memory file is what an undisturbed conversation has come to."""
    path = folder / "one.ccm"
    path.write_bytes(content)
    arrays = files.read(path).arrays
    assert arrays["tokens"].tolist() == session.cache.tokens.tolist()
    np.testing.assert_allclose(arrays["logits"], np.asarray(session.cache.logits), rtol=0, atol=TOLERANCE)
