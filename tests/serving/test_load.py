"""Many clients at once, that go away in the middle, and a server that is killed and started again, again and again.

Each client notes down what it said and heard. In the end all of it is said once more, to a conversation that nobody
disturbs: the same answers, log-probabilities and counts. The server is killed three times, which takes up to a minute
on two busy cores; ``LOAD_KILLS=10 pytest tests/serving/test_load*.py`` is the whole of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jax_ccm.sessions.state import Session
from tests.serving import load
from tests.serving.clients import MODEL
from tests.serving.load import CLIENTS, FEW, HOW, KILLS, QUESTION, ROWS, Said


@dataclasses.dataclass
class Found:
    """How much of a session was there after a restart."""

    turns: int
    tokens: int


# Turns of which nobody has heard the end.
Open = tuple[Said, ...]


class Client(load.Client):
    """Talks in a session of its own.

    Attributes:
      notes: all that it said, heard and found.
      memory: its file in the end.
    """

    path = "/v1/chat/completions"
    leaving = 0.7
    memory = b""

    def __init__(self, number: int):
        super().__init__(number)
        self.notes = list[Said | Found]()

    def text(self) -> str:
        """Something else; several in a row have different lengths, so that counts tell which of them were kept."""
        return "".join(self.chance.choices("abcdefgh ", k=4 + len(self.notes) % 13)) + "x"

    def something(self, text: str = "", quiet: int = 0) -> Said:
        said = Said(text or self.text(), quiet)
        self.notes.append(said)
        return said

    def body(self, said: Said, stream: bool) -> dict[str, Any]:
        asked = {"model": MODEL, "session_id": self.name, "messages": [{"role": "user", "content": said.text}]}
        how = {"max_tokens": HOW.max_tokens, "logprobs": True, "top_logprobs": HOW.logprobs}
        return asked | how | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})

    async def say(self, http: httpx.AsyncClient, said: Said) -> bool:
        """Says something and hears the answer to its end; False if the server died before."""
        stream = self.chance.random() < 0.4
        try:
            if not stream:
                answer = await http.post(self.path, json=self.body(said, stream))
                assert answer.status_code == 200, answer.text
                (choice,) = answer.json()["choices"]
                said.answer, said.logprobs = choice["message"]["content"], choice["logprobs"]["content"]
                said.counted(answer.json()["usage"])
                return True
            async for event in self.events(http, self.body(said, stream)):
                for choice in event["choices"]:
                    said.answer += choice["delta"].get("content", "")
                    said.logprobs += (choice.get("logprobs") or {"content": []})["content"]
                if event.get("usage"):
                    said.counted(event["usage"])
        except httpx.TransportError:
            return False
        return said.known is not None

    async def acts(self, http: httpx.AsyncClient) -> bool:
        return await self.say(http, self.something())

    async def tells(self, http: httpx.AsyncClient) -> bool:
        return await self.say(http, self.something(f"my secret is {self.secret}"))

    async def asks(self, http: httpx.AsyncClient, quiet: int, last: bool) -> list[Said]:
        said = self.something(QUESTION, quiet)
        assert await self.say(http, said)
        return [said]

    async def look(self, http: httpx.AsyncClient) -> None:
        """Notes what is there of its session."""
        answer = await http.get(f"/sessions/{self.name}")
        assert answer.status_code == 200, answer.text
        self.notes.append(Found(answer.json()["turns"], answer.json()["tokens"]))

    async def ends(self, http: httpx.AsyncClient) -> None:
        self.memory = (await http.get(f"/sessions/{self.name}/memory")).content


class Undisturbed(load.Undisturbed):
    """Says once more what clients have said in their sessions."""

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
        answers = []
        with self.row() as row:
            held: list[tuple[Session, Open]] = [(self.talk.session(row), ())]
            for note in client.notes:
                held = self.goes_on(row, held, note)
                assert held, f"{client.name}: nothing that was acknowledged leads to {note}"
                if isinstance(note, Said) and note.quiet:
                    answers.append(load.numbers(note.logprobs)[0])
        return answers, held[0][0]

    def goes_on(self, row: int, held: list[tuple[Session, Open]], note: Said | Found) -> list[tuple[Session, Open]]:
        """What `may_be` by a note, of all that it may have been."""
        if isinstance(note, Found):
            fits = lambda one: (len(one.turns), one.tokens) == (note.turns, note.tokens)
            return [(one, ()) for each in held for one, _ in self.may_be(row, *each, fits)]
        if note.known is None:
            return [(one, (*open, note)) for one, open in held]
        fits = lambda one: one.tokens == note.known
        held = [each for before in held for each in self.may_be(row, *before, fits)]
        found = [(self.compare(row, one, note), open) for one, open in held]
        return [(one, open) for one, open in found if one is not None]


def require_nothing_lost(folder: Path, monkeypatch, clients: list[Client], kills: int, **how: Any) -> None:
    """Has clients go through the lives of a server, and compares all that they have heard."""
    read = load.undergo(clients, folder, kills=kills, **how)
    oracle = Undisturbed(monkeypatch, kills)
    with ThreadPoolExecutor(ROWS) as threads:
        found = list(threads.map(oracle.check, clients))
    assert read == oracle.read[1:], "after a restart a turn costs what it costs without one"
    # Each was told a secret, and all were asked: the same question, and an answer of its own wherever one looks.
    asked = [np.concatenate(answers) for answers, _ in found]
    apart = [np.abs(one - other).max() for one, other in itertools.combinations(asked, 2)]
    assert min(apart) > 1e-3, "no two sessions can be taken for each other"
    for client, (_, kept) in zip(clients, found, strict=True):
        load.same_memory(client.memory, kept, folder)
    left = {path.name for path in (folder / "sessions").iterdir()} - {".lock"}
    assert left == {f"{client.name}.ccm" for client in clients}


@pytest.mark.processes
def test_nothing_is_lost_and_nothing_leaks(tmp_path, monkeypatch):
    clients = [Client(number) for number in range(CLIENTS)]
    require_nothing_lost(tmp_path, monkeypatch, clients, KILLS, acknowledged=range(20, 80))


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["unwritten", "mistaken"])
def test_a_faulty_server_is_found_out(tmp_path, monkeypatch, fault):
    """One that acknowledges what it does not write, or goes on from the memory of another session."""
    clients = [Client(number) for number in range(FEW)]
    for client in clients:
        client.restless = 0.0  # what nobody heard the end of may have been kept in any order, and all are tried
    with pytest.raises(AssertionError, match="nothing that was acknowledged leads to"):
        require_nothing_lost(tmp_path, monkeypatch, clients, 1, acknowledged=[FEW], fault=fault)
