"""What no client should send, and a disk that takes no more: said with the right status, and all is as it was."""

from __future__ import annotations

import errno
import os

import httpx
import numpy as np
import openai
import pytest

from jax_ccm.records import sealed
from jax_ccm.serving.admission import Limits
from tests.serving.clients import MODEL, ask, serving, staying, tokens_read

HALF = r"\ud800"
SAYS = '"messages": [{"role": "user", "content": "hi"}]'


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/v1/chat/completions", f'{{"model": "tiny", "{HALF}": 1, {SAYS}}}', 400),
        ("/v1/chat/completions", f'{{"model": "{HALF}"}}', 404),
        ("/v1/chat/completions", f'{{"model": "tiny", "session_id": "{HALF}", {SAYS}}}', 400),
        ("/v1/chat/completions", f'{{"model": "tiny", "messages": [{{"role": "{HALF}", "content": "hi"}}]}}', 400),
        ("/v1/chat/completions", f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{HALF}"}}]}}', 400),
        ("/v1/responses", f'{{"model": "tiny", "input": "x", "previous_response_id": "resp_{HALF}"}}', 404),
        ("/v1/responses", '{"model": "tiny", "input": "x", "previous_response_id": "resp_../x"}', 404),
        ("/v1/responses", f'{{"model": "tiny", "input": "x", "user": "{HALF}"}}', 400),
        ("/v1/responses", f'{{"model": "tiny", "input": "x", "metadata": {{"{HALF}": "x"}}}}', 400),
        ("/v1/responses", f'{{"model": "tiny", "input": "x", "metadata": {{"x": "{HALF}"}}}}', 400),
        ("/tokenize", f'{{"content": "{HALF}"}}', 400),
        ("/slots/some?action=save", f'{{"filename": "{HALF}"}}', 400),
    ],
)
def test_half_characters_and_names_that_are_none(url, body, path, status):
    """JSON can hold what no UTF-8 can: it is refused as what it is, and said again in the refusal."""
    answer = httpx.post(f"{url}{path}", content=body)
    assert answer.status_code == status and answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("headers", [{"host": "[::1"}, {"origin": "http://[::1"}, {"origin": "http://[x]y"}])
def test_addresses_that_are_none(url, headers):
    answer = httpx.get(f"{url}/v1/models", headers=headers)
    assert answer.status_code == 400 and "is no address" in answer.json()["error"]["message"]


def test_a_disk_that_is_full(client, server, monkeypatch, url):
    """The turn is refused as no fault of the client's, the folder's name is not told, and the session is as it was."""
    ask(client, "hello", "full")
    before, content = tokens_read(url, "full"), httpx.get(f"{url}/sessions/full/memory").content

    def fails(source, target, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(sealed.os, "replace", fails)
        for name in ("full", "new"):
            with pytest.raises(openai.InternalServerError, match="No space left") as refused:
                ask(client, "what", name)
            assert refused.value.status_code == 507 and refused.value.body["code"] == "insufficient_storage"
        with pytest.raises(openai.InternalServerError, match="No space left"):
            client.responses.create(model=MODEL, input="hi", max_output_tokens=4)
        for answer in (
            httpx.put(f"{url}/sessions/new/memory", content=content),
            httpx.post(f"{url}/slots/full?action=save", json={"filename": "full.bin"}),
        ):
            assert answer.status_code == 507 and str(server[1].store.folder.parent) not in answer.text, answer.text
    assert tokens_read(url, "full") == before and httpx.get(f"{url}/sessions/new/memory").status_code == 404
    row = server[1]._rows["full"]
    assert server[1].talk.state.tokens[row] == before


def test_a_session_that_cannot_be_removed(client, server, url):
    """Whoever wants it gone hears that it is not; it is counted, and goes on where it was, until it can be removed."""
    ask(client, "hello", "stays")
    before, count = tokens_read(url, "stays"), server[1].store.size()
    memory = f"{url}/sessions/stays/memory"
    with staying():
        for answer in (httpx.delete(memory), httpx.post(f"{url}/slots/stays?action=erase")):
            assert answer.status_code == 507 and "stays.ccm cannot be removed: Read-only" in answer.text
    row = server[1]._rows["stays"]
    assert server[1].store.size() == count and server[1].talk.state.tokens[row] == tokens_read(url, "stays") == before
    usage = ask(client, "what", "stays").usage
    assert usage.prompt_tokens_details.cached_tokens == before
    assert httpx.delete(memory).status_code == 200 and httpx.get(memory).status_code == 404


def test_a_damaged_session_leaves_nobodys_memory_in_a_row(made, tmp_path):
    """A row was made free for it: what the session before it left there is gone, as that session may be deleted."""
    with (
        serving(made, tmp_path) as (url, pool),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        ask(client, "hello", "broken")
        rows = pool.talk.engine.rows
        for number in range(rows):
            ask(client, f"I am {number}", f"s{number}")
        assert "broken" not in pool._rows and len(pool._rows) == rows
        (tmp_path / "broken.ccm").write_bytes((tmp_path / "broken.ccm").read_bytes()[:-9])
        with pytest.raises(openai.APIStatusError, match="damaged"):
            ask(client, "what", "broken")
        free = set(range(rows)) - set(pool._rows.values())
        assert len(free) == 1 and [int(pool.talk.state.tokens[row]) for row in free] == [0]
        kinds = pool.do(lambda: np.asarray(pool.talk.state.cache.slots.kind))
        assert not kinds[sorted(free)].any() and kinds[sorted(pool._rows.values())].any(axis=1).all()
        # Everybody else goes on.
        assert ask(client, "what", "s0").usage.prompt_tokens_details.cached_tokens


def test_an_idle_session_that_cannot_be_removed(made, tmp_path, caplog):
    """The log says so, once; others go, and everybody is answered."""
    with (
        serving(made, tmp_path, limits=Limits(idle=3600)) as (url, pool),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        staying("stuck.ccm"),
    ):
        for name in ("stuck", "free", "new"):
            ask(client, "hello", name)
        for name in ("stuck", "free"):
            os.utime(tmp_path / f"{name}.ccm", (0, 0))
        pool.do(pool.store._index.refresh)  # as if all that time had gone by
        assert ask(client, "and now", "new").usage.prompt_tokens_details.cached_tokens
        assert {path.name for path in tmp_path.glob("*.ccm")} == {"stuck.ccm", "new.ccm"}
        assert pool.store.size()[0] == 2 and "free" not in pool.names()
    assert [record.getMessage() for record in caplog.records].count(
        "session 'stuck' stays on disk until the server is started again"
    ) == 1
