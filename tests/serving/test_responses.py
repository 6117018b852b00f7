"""Responses: compacted, told how likely their tokens were, made in a session, and gone with it."""

from __future__ import annotations

import json
import threading

import httpx
import numpy as np
import openai
import pydantic
import pytest

from jax_ccm.memory import files
from jax_ccm.serving import shapes
from jax_ccm.sessions.engine import Answering
from tests.serving.clients import MODEL, ask, serving, tokens_read
from tests.test_chat import experiment

SAID = [
    {"role": "user", "content": "my name is Clara"},
    {"role": "assistant", "content": "hi"},
]


CLARA = {"model": MODEL, "input": SAID}


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def respond(client, text, **options):
    return client.responses.create(model=MODEL, input=text, max_output_tokens=4, **options)


def test_a_compaction_is_gone_on_from(client, made):
    """As input, as the previous response, and by another compaction, it stands for what was said, and is told apart."""
    whole = respond(client, [*SAID, {"role": "user", "content": "what"}])
    compact = client.responses.compact(model=MODEL, input=SAID)
    (item,) = compact.output
    assert compact.object == "response.compaction" and item.type == "compaction" and len(item.encrypted_content) < 64
    usage = compact.usage
    assert usage.output_tokens == usage.input_tokens_details.cached_tokens == 0
    assert len("my name is Clarahi") < usage.input_tokens == usage.total_tokens < whole.usage.input_tokens
    question = {"role": "user", "content": "what"}
    for reply in (
        respond(client, [*compact.output, question]),
        respond(client, "what", previous_response_id=compact.id),
    ):
        assert reply.output_text == whole.output_text
        assert reply.usage.input_tokens_details.cached_tokens == usage.input_tokens
        assert reply.usage.input_tokens == whole.usage.input_tokens
    more = client.responses.compact(model=MODEL, input=[*compact.output, {"role": "user", "content": "and Ben"}])
    assert more.usage.input_tokens_details.cached_tokens == usage.input_tokens < more.usage.input_tokens
    same = client.responses.compact(model=MODEL, previous_response_id=more.id)
    assert same.usage.input_tokens == same.usage.input_tokens_details.cached_tokens == more.usage.input_tokens
    assert respond(client, "what", previous_response_id=same.id).output_text == (
        respond(client, "what", previous_response_id=more.id).output_text
    )
    client.responses.delete(compact.id)
    with pytest.raises(openai.NotFoundError):
        respond(client, [*compact.output, question])


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/compact", {}, "input"),
        ("/compact", {"input": []}, "input"),
        ("/compact", {"input": SAID, "instructions": 1}, "instructions"),
        ("/compact", {"input": SAID, "stream": True}, "stream"),
        ("/compact", {"input": SAID, "image": {"context_compression": "enabled"}}, "image"),
        ("/compact", {"input": SAID[1:]}, "input[0].role"),
        ("/compact", {"input": [*SAID, {"type": "compaction", "encrypted_content": "x"}]}, "input[2].type"),
        ("/compact", {"input": [{"type": "compaction_trigger"}]}, "input[0].type"),
        ("/compact", {"input": [{"type": "compaction"}]}, "input[0]"),
        ("/compact", {"input": [{"type": "compaction", "encrypted_content": "resp_1", "x": 1}]}, "input[0].x"),
        (
            "",
            {"input": [{"type": "compaction", "encrypted_content": "resp_1"}], "previous_response_id": "y"},
            "input[0]",
        ),
        ("", {"input": [{"type": "compaction", "encrypted_content": "resp_1"}]}, "input"),
        ("", {"input": "x", "top_logprobs": 2}, "top_logprobs"),
        ("", {"input": "x", "include": ["reasoning.encrypted_content"]}, "include"),
        ("", {"input": "x", "session_id": "a", "previous_response_id": "resp_1"}, "session_id"),
        ("", {"input": "x", "session_id": "../a"}, "session_id"),
        ("", {"input": "x", "metadata": {"a": 1}}, "metadata"),
        ("", {"input": "x", "metadata": {"a" * 65: ""}}, "metadata"),
        ("", {"input": "x", "metadata": {"a": "b" * 513}}, "metadata"),
        ("", {"input": "x", "metadata": dict.fromkeys("abcdefghijklmnopq", "")}, "metadata"),
        ("", {"input": "x", "user": "b" * 513}, "user"),
        ("/compact", {"input": "x", "metadata": {"a": "b"}}, "metadata"),
    ],
)
def test_what_cannot_be_honoured_is_named(url, path, body, param):
    answer = httpx.post(f"{url}/v1/responses{path}", json={"model": MODEL} | body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


SAYS_AGAIN = {
    "instructions": " be brief ", "temperature": 0.5, "top_p": 0.25, "max_output_tokens": 3, "store": True,
    "tool_choice": "auto", "parallel_tool_calls": True, "top_logprobs": 2, "metadata": {"topic": "demo", "": "\u2028"},
    "user": "clara", "safety_identifier": "s1", "prompt_cache_key": "k1", "service_tier": "default",
    "truncation": "disabled", "background": False, "text": {"format": {"type": "text"}}, "tools": [],
}  # fmt: skip
INCLUDE = ["message.output_text.logprobs"]


def test_a_response_says_again_what_was_asked(tmp_path):
    """Every field that the API has for it: in the answer, in what is stored, and in every event of a stream."""
    made = experiment(
        "ccm_concat", "exchange", {"max_turn_tokens": 64, "chat_template": True}, comp_tokens=2, sink=True
    )
    with serving(made, tmp_path) as (url, _), client_of(url) as client:
        asked = dict(SAYS_AGAIN, model=MODEL, input="hello", include=INCLUDE)
        first = client.responses.create(**asked)
        plain = client.responses.create(model=MODEL, input="what", previous_response_id=first.id)
        (item,) = client.responses.compact(model=MODEL, input="hello").output
        after = client.responses.create(model=MODEL, input=[item, {"role": "user", "content": "what"}])
        events = list(client.responses.create(**(asked | {"service_tier": "auto", "stream": True})))
        stored = client.responses.retrieve(first.id)
        chat = ask(client, "hello", service_tier="auto")
        pieces = list(ask(client, "hello", service_tier="default", stream=True))
    told = [event.response for event in events if hasattr(event, "response")]
    assert len(told) == 3 and stored == first
    for response in (first, *told):
        found = response.to_dict()
        assert {name: found[name] for name in SAYS_AGAIN} == SAYS_AGAIN
        assert found["previous_response_id"] is None
    assert first.completed_at is None if first.status == "incomplete" else first.completed_at >= first.created_at
    # What one response was told is no other's, and where nothing was said there is what holds.
    assert plain.previous_response_id == first.id and plain.instructions is None and plain.metadata == {}
    assert (plain.max_output_tokens, plain.temperature, plain.top_p, plain.user) == (4, 0.0, 1.0, None)
    assert not hasattr(plain, "service_tier") or plain.service_tier is None
    # A compaction is an item of the input, and no previous response.
    assert after.previous_response_id is None and after.usage.input_tokens_details.cached_tokens > 0
    assert {chat.service_tier, *(piece.service_tier for piece in pieces)} == {"default"}


def test_responses_have_the_shape_of_the_api(url):
    """The client's own types, which it does not hold answers against by itself, take all that is sent."""
    types, bodies = openai.types.responses, {"model": MODEL, "input": "hello", "include": INCLUDE, "top_logprobs": 2}
    answer = httpx.post(f"{url}/v1/responses", json=bodies).json()
    types.Response.model_validate(answer)
    types.Response.model_validate(httpx.get(f"{url}/v1/responses/{answer['id']}").json())
    types.CompactedResponse.model_validate(httpx.post(f"{url}/v1/responses/compact", json=CLARA).json())
    stream = httpx.post(f"{url}/v1/responses", json=bodies | {"stream": True}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    reads = pydantic.TypeAdapter(types.ResponseStreamEvent)
    assert [reads.validate_python(event).type for event in events] == [event["type"] for event in events]
    failed = shapes.Response(MODEL, Answering(), {"parallel_tool_calls": False, "tool_choice": "none"}, store=True)
    assert [reads.validate_python(failed.fails("why", status)).response.error.code for status in (400, 429, 507)] == [
        "invalid_prompt", "rate_limit_exceeded", "server_error",
    ]  # fmt: skip
    said = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    openai.types.chat.ChatCompletion.model_validate(httpx.post(f"{url}/v1/chat/completions", json=said).json())


def test_how_likely_the_tokens_of_a_response_were(client):
    """As chat completions tell it, whole and streamed."""
    include = INCLUDE
    chat = ask(client, "hello", logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    part = respond(client, "hello", include=include, top_logprobs=3).output[0].content[0]
    assert [x.token for x in part.logprobs] == [x.token for x in chat] and len(chat) > 0
    np.testing.assert_allclose([x.logprob for x in part.logprobs], [x.logprob for x in chat], atol=1e-5)
    for mine, theirs in zip(part.logprobs, chat, strict=True):
        assert [x.token for x in mine.top_logprobs] == [x.token for x in theirs.top_logprobs]
        assert list(mine.bytes) == (theirs.bytes or [])
    events = list(respond(client, "hello", include=include, top_logprobs=3, stream=True))
    named = lambda kind: [event for event in events if event.type == kind]
    pieces = [x for event in named("response.output_text.delta") for x in event.logprobs]
    assert [x.token for x in pieces] == [x.token for x in chat] and len(pieces[0].top_logprobs) == 3
    assert [x.logprob for x in named("response.output_text.done")[0].logprobs] == [x.logprob for x in part.logprobs]
    assert events[-1].response.output[0].content[0].logprobs == part.logprobs
    assert respond(client, "hello", include=include).output[0].content[0].logprobs[0].top_logprobs == []
    assert respond(client, "hello").output[0].content[0].logprobs == []


def test_responses_in_a_session(client, url, oracle):
    """The session goes on, each response can be gone on from, and one that is not stored leaves all as it was."""
    turns = ["my name is Clara", "what", "who"]
    expected = oracle(turns)
    within = {"extra_body": {"session_id": "within"}}
    with pytest.raises(openai.NotFoundError):
        respond(client, turns[0], store=False, **within)
    first = respond(client, turns[0], **within)
    before = httpx.get(f"{url}/sessions/within/memory").content
    aside = respond(client, turns[1], store=False, **within)
    assert httpx.get(f"{url}/sessions/within/memory").content == before
    second = ask(client, turns[1], "within")
    assert [first.output_text, aside.output_text] == expected[:2]
    assert second.choices[0].message.content == expected[1]
    branch = respond(client, turns[1], previous_response_id=first.id)
    assert branch.output_text == expected[1] and respond(client, turns[2], **within).output_text == expected[2]
    assert respond(client, turns[2], previous_response_id=branch.id).output_text == expected[2]


@pytest.mark.parametrize("durable", [True, False])
def test_a_session_that_is_removed_leaves_no_byte(made, tmp_path, durable):
    """Not in the pool, in a file, in a response that was made in it or went on from one, nor where it was saved to."""
    folder = tmp_path / "sessions"
    with serving(made, folder, slots=tmp_path / "slots", durable=durable) as (url, pool), client_of(url) as client:
        ask(client, "hello there", "other")
        ask(client, "my secret is 4711", "gone")
        content = httpx.get(f"{url}/sessions/gone/memory").content
        (tmp_path / "first.ccm").write_bytes(content)
        held = files.read(tmp_path / "first.ccm")
        (tmp_path / "first.ccm").unlink()
        marks = [np.ascontiguousarray(held.arrays["k"][0, n]).tobytes() for n in range(held.arrays["k"].shape[1])][1:]
        within = {"extra_body": {"session_id": "gone"}}
        first = respond(client, "what", **within)
        second = respond(client, "and", previous_response_id=first.id)
        compact = client.responses.compact(model=MODEL, previous_response_id=second.id)
        third = respond(client, [*compact.output, {"role": "user", "content": "so"}])
        client.responses.delete(first.id)  # what went on from it is found all the same
        assert httpx.post(f"{url}/slots/gone?action=save", json={"filename": "gone.bin"}).status_code == 200
        ask(client, "hello", "other")

        def places():
            seen = [path for path in tmp_path.rglob("*") if path.is_file() and _holds(path.read_bytes(), marks)]
            caches = [pool.talk.state.cache, pool.talk.scratch.cache]
            return seen, [cache for cache in caches if _holds(np.asarray(cache.k)[0].tobytes(), marks, held)]

        assert len(places()[0]) >= (5 if durable else 1) and places()[1]
        assert httpx.delete(f"{url}/sessions/gone/memory").json()["deleted"]
        assert places() == ([], [])
        for name in (second.id, compact.id, third.id):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(name)
        assert httpx.delete(f"{url}/sessions/gone/memory").status_code == 404
        assert httpx.post(f"{url}/slots/new?action=restore", json={"filename": "gone.bin"}).status_code == 404
        assert tokens_read(url, "other") > 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and _holds(path.read_bytes(), marks)]


def _holds(content: bytes, marks, held=None) -> bool:
    """Whether some of a memory is in there; keys of a cache lie head by head."""
    if held is not None:
        marks = [
            np.ascontiguousarray(mark).tobytes()
            for mark in held.arrays["k"][0, 1:].reshape(-1, held.arrays["k"].shape[-1])
        ]
    return any(mark in content for mark in marks)


def test_a_turn_that_is_going_on_is_removed_with_its_session(made, tmp_path):
    """A response that is being made in a session as that is removed is not left behind."""
    with serving(made, tmp_path) as (url, pool), client_of(url) as client:
        first = respond(client, "my name is Clara", extra_body={"session_id": "gone"})
        stream = client.responses.create(
            model=MODEL, input="what", previous_response_id=first.id, max_output_tokens=8, stream=True
        )
        next(iter(stream))
        removed = threading.Thread(target=httpx.delete, args=(f"{url}/sessions/gone/memory",))
        removed.start()
        list(stream)
        removed.join()
        assert not list(tmp_path.glob("*.ccm")) and pool.do(pool.names) == set()
