"""What no client should send, and a disk that takes no more: said with the right status, and all is as it was."""

from __future__ import annotations

import errno

import httpx
import openai
import pytest

from jax_ccm.records import sealed
from tests.serving.clients import MODEL, ask, tokens_read

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
