"""The load test, for responses: trees of them, compactions among them, each branch told something else,
through kill -9 and restarts.

Whatever was acknowledged can be had again after a restart, gone on from, and is what it would be had nothing happened;
whatever was removed stays away.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jax_ccm.memory import files
from jax_ccm.sessions.state import Session
from tests.serving import load
from tests.serving.clients import MODEL
from tests.serving.load import CLIENTS, FEW, HOW, KILLS, QUESTION, ROWS, Said

INCLUDE = ["message.output_text.logprobs"]


@dataclasses.dataclass
class Node(Said):
    """A turn that makes a response.

    Attributes:
      previous: the one that it goes on from; None for the root of a tree.
      id: of the response, as soon as its client has heard of it.
      stored: whether it can be gone on from.
      compacted: whether it is a compaction: it was told, and nothing was answered.
      removed: whether it is gone; None while nobody knows.
    """

    previous: Node | None = None
    id: str = ""
    stored: bool = True
    compacted: bool = False
    removed: bool | None = False

    @property
    def there(self) -> bool:
        """Whether it was acknowledged, and can be gone on from."""
        return self.known is not None and self.stored and self.removed is False

    @property
    def told(self) -> tuple[str, ...]:
        """All that was said on the way to it."""
        return (*(self.previous.told if self.previous else ()), self.text)

    def heard(self, response: dict[str, Any]) -> None:
        """Notes a response that is whole."""
        self.id, (item,) = response["id"], response["output"]
        assert (item["type"] == "compaction") == self.compacted
        if not self.compacted:
            (part,) = item["content"]
            self.answer, self.logprobs = part["text"], part["logprobs"]
        self.counted(response["usage"])


class Client(load.Client):
    """Grows a tree of responses.

    Attributes:
      nodes: all that it asked for, in this order.
    """

    path = "/v1/responses"
    leaving = 0.4

    def __init__(self, number: int):
        super().__init__(number)
        self.nodes = list[Node]()

    def node(self, text: str, previous: Node | None, quiet: int = 0, **what: bool) -> Node:
        """A new node of its tree."""
        self.nodes.append(Node(text, quiet, previous=previous, **what))
        return self.nodes[-1]

    def something(self) -> Node:
        """Something else, in a branch of its own or at the end of one."""
        known = [node for node in self.nodes if node.there]
        text = "".join(self.chance.choices("abcdefgh ", k=4 + len(self.nodes) % 13)) + "x"
        return self.node(text, known[-1] if self.chance.random() < 0.5 else self.chance.choice(known))

    def body(self, node: Node, stream: bool) -> dict[str, Any]:
        previous = node.previous.id if node.previous else None
        asked = {"model": MODEL, "input": node.text, "previous_response_id": previous, "store": node.stored}
        how = {"max_output_tokens": HOW.max_tokens, "include": INCLUDE, "top_logprobs": HOW.logprobs}
        return asked | how | {"stream": stream}

    async def say(self, http: httpx.AsyncClient, node: Node) -> bool:
        """Asks for a response and hears it to its end; False if the server died before."""
        try:
            if self.chance.random() < 0.6:
                answer = await http.post(self.path, json=self.body(node, stream=False))
                assert answer.status_code == 200, answer.text
                node.heard(answer.json())
            else:
                async for event in self.events(http, self.body(node, stream=True)):
                    assert event["type"] != "response.failed", event
                    if event["type"] == "response.created":
                        node.id = event["response"]["id"]
                    if event["type"] in ("response.completed", "response.incomplete"):
                        node.heard(event["response"])
        except httpx.TransportError:
            return False
        return node.known is not None

    async def acts(self, http: httpx.AsyncClient) -> bool:
        known = [node for node in self.nodes if node.there]
        draw = self.chance.random()
        if len(known) < 3 or draw < 0.7:
            return await self.say(http, self.something())
        if draw < 0.85:
            return await self.compact(http)
        node = self.chance.choice(known[:-1])
        node.removed = None
        try:
            answer = await http.delete(f"{self.path}/{node.id}")
        except httpx.TransportError:
            return False
        assert answer.status_code == 200, answer.text
        node.removed = True
        return True

    async def compact(self, http: httpx.AsyncClient) -> bool:
        """Has something become memory that is not answered; False if the server died before."""
        node = self.something()
        node.compacted = True
        body = {"model": MODEL, "input": node.text, "previous_response_id": node.previous.id}
        try:
            answer = await http.post(f"{self.path}/compact", json=body)
        except httpx.TransportError:
            return False
        assert answer.status_code == 200, answer.text
        node.heard(answer.json())
        return True

    def sees(self, said: Node, event: dict[str, Any]) -> None:
        said.id = said.id or event["response"]["id"]

    async def tells(self, http: httpx.AsyncClient) -> bool:
        return await self.say(http, self.node(f"my secret is {self.secret}", None))

    async def asks(self, http: httpx.AsyncClient, quiet: int, last: bool) -> list[Node]:
        """In two branches; the last time in all, for nothing that is kept."""
        known = [node for node in self.nodes if node.there]
        known = known if last else [known[-1], self.chance.choice(known)]
        made = [self.node(QUESTION, node, quiet, stored=not last) for node in known]
        assert all([await self.say(http, node) for node in made])
        return made

    async def look(self, http: httpx.AsyncClient) -> None:
        """All that was acknowledged is there, as it was heard; what was not is there as a whole, or not at all."""
        for node in self.nodes:
            if not node.id or not node.stored:
                continue
            answer = await http.get(f"{self.path}/{node.id}")
            if answer.status_code == 404:
                assert not node.there, f"{node} was acknowledged, and is gone"
                node.removed = True
                continue
            assert answer.status_code == 200 and node.removed is not True, answer.text
            node.removed = False
            found = Node(node.text, previous=node.previous, compacted=node.compacted)
            found.heard(answer.json())
            if node.known is None:
                node.heard(answer.json())
            same = (found.id, found.answer, found.known, found.read, found.logprobs)
            assert same == (node.id, node.answer, node.known, node.read, node.logprobs)


class Undisturbed(load.Undisturbed):
    """Makes trees of responses once more, branch by branch."""

    def check(self, client: Client) -> dict[str, Session]:
        """Compares; the memories by the ids of their responses."""
        made: dict[str, Session] = {}
        with self.row() as row:
            empty = self.talk.session(row)
            for node in client.nodes:
                if node.known is None:
                    continue
                before = made[node.previous.id] if node.previous else empty
                become = self.compacted(row, before, node) if node.compacted else self.compare(row, before, node)
                assert become is not None, f"{client.name}: {node} is not what comes of {node.told}"
                made[node.id] = become
        return made

    def compacted(self, row: int, session: Session, node: Node) -> Session | None:
        """What a session becomes by what is told it; None if that is not what the client heard."""
        self.talk.restore(row, session)
        self.talk.tell({row: [(node.text, "")]})
        become = self.talk.session(row)
        return become if (node.known, node.read) == (session.tokens, become.tokens - session.tokens) else None


def least_apart(clients: list[Client], last: int) -> float:
    """How much the answers of the last life to the one question differ where it was asked after different things."""
    asked = {node.told: node for client in clients for node in client.nodes if node.quiet == last}
    answers = [load.numbers(node.logprobs).ravel() for node in asked.values()]
    wide = np.stack([np.pad(each, (0, max(map(len, answers)) - len(each))) for each in answers])
    return min(np.abs(wide[place + 1 :] - one).max(axis=1).min() for place, one in enumerate(wide[:-1]))


def require_nothing_lost(folder: Path, monkeypatch, clients: list[Client], kills: int, **how: Any) -> None:
    """Has clients go through the lives of a server, and compares all that they have heard."""
    read = load.undergo(clients, folder, kills=kills, **how)
    oracle = Undisturbed(monkeypatch, kills)
    with ThreadPoolExecutor(ROWS) as threads:
        kept = {name: session for found in threads.map(oracle.check, clients) for name, session in found.items()}
    assert read == oracle.read[1:], "after a restart a response costs what it costs without one"
    nodes = [node for client in clients for node in client.nodes]
    assert any(node.removed for node in nodes if node.known) and len(nodes) > 4 * len(clients)
    assert any(node.previous.compacted for node in nodes if node.known and node.previous)
    assert least_apart(clients, kills) > 2 * load.TOLERANCE, "no two branches can be taken for each other"
    # On disk are those that can be gone on from, each as it would be, and wholes that nobody heard the end of.
    left = {path.stem: path for path in (folder / "sessions").iterdir() if path.name != ".lock"}
    there = {node.id for node in nodes if node.there}
    assert there <= left.keys()
    for name in there:
        load.same_memory(left[name].read_bytes(), kept[name], folder)
    unheard = left.keys() - there
    assert len(unheard) <= sum(node.known is None and not node.id for node in nodes)
    for name in unheard:
        assert files.read(left[name]).header["about"]["response"]["id"] == name


@pytest.mark.processes
def test_no_response_is_lost_and_no_branch_sees_another(tmp_path: Path, monkeypatch):
    clients = [Client(number) for number in range(CLIENTS)]
    require_nothing_lost(tmp_path, monkeypatch, clients, KILLS, acknowledged=range(60, 120))


@pytest.mark.processes
@pytest.mark.parametrize(
    "fault, found",
    [("unwritten", "was acknowledged, and is gone|there is no response"), ("mistaken", "is not what comes of")],
)
def test_a_faulty_server_is_found_out(tmp_path, monkeypatch, fault, found):
    """One that acknowledges what it does not write, or goes on from the memory of another response."""
    clients = [Client(number) for number in range(FEW)]
    with pytest.raises(AssertionError, match=found):
        require_nothing_lost(tmp_path, monkeypatch, clients, 1, acknowledged=[FEW], fault=fault)
