"""The server as clients see it: the official client, a tiny model, and every answer that of a conversation alone."""

from __future__ import annotations

import json
import threading
import time

import httpx
import jax
import numpy as np
import openai
import pytest

from jax_ccm.errors import UserError
from jax_ccm.serving.admission import Busy, Limits, Missing, Turn
from jax_ccm.serving.app import Access
from jax_ccm.serving.metrics import Metrics
from jax_ccm.serving.pool import Pool
from jax_ccm.serving.store import Store
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.turns import Reply
from tests.serving.clients import MODEL, ROWS, ask, serving, tokens_read
from tests.test_chat import experiment


def test_a_session_sends_what_is_new(client, url, oracle):
    """Each turn is answered from the memory of those before, whose tokens are counted as cached, and none else."""
    turns = ["my name is Clara", "what is it", "and now"]
    expected, seen = oracle(turns), 0
    for text, wanted in zip(turns, expected, strict=True):
        reply = ask(client, text, "clara")
        assert reply.choices[0].message.content == wanted and reply.choices[0].finish_reason in ("stop", "length")
        usage = reply.usage
        assert usage.prompt_tokens_details.cached_tokens == seen and 0 < usage.completion_tokens <= 4
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert len(text) <= usage.prompt_tokens - seen <= len(text) + 9
        held = httpx.get(f"{url}/sessions/clara/memory")
        assert held.status_code == 200 and held.content[8:9] == b"{"
        seen = tokens_read(url, "clara")
    headers = {"x-session-id": "by-header"}
    first = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": turns[0]}], extra_headers=headers
    )
    assert first.choices[0].message.content == expected[0] and tokens_read(url, "by-header") > 0


def test_a_stream_is_the_answer(client, oracle):
    """Its pieces are the whole, the usage stands at its end if it is asked for, and without a session nothing stays."""
    (wanted,) = oracle(["hello"], 8)
    events = list(ask(client, "hello", stream=True, max_tokens=8, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text.strip() == wanted and events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens <= 8
    assert events[-2].choices[0].finish_reason in ("stop", "length")
    # A whole conversation may be sent, too: its turns are read, and nothing is cached.
    messages = [{"role": "user", "content": "my name is Clara"}, {"role": "assistant", "content": "hi"}]
    reply = client.chat.completions.create(model=MODEL, messages=[*messages, {"role": "user", "content": "what"}])
    usage = reply.usage
    assert usage.prompt_tokens > len("my name is Clarahiwhat") and usage.prompt_tokens_details.cached_tokens == 0


def test_system_messages_stay_as_they_are(tmp_path):
    """A conversation begins with one, in both forms of the API; it counts, and every turn sees it."""
    made = experiment(
        "ccm_concat", "exchange", {"max_turn_tokens": 64, "chat_template": True}, comp_tokens=2, sink=True
    )
    talk = Conversations(made, ROWS)
    talk.instruct({0: "be brief"})
    begun = talk.state.tokens[0]
    wanted = [talk.say({0: text}, max_tokens=4)[0] for text in ("hello", "what")]
    system = {"role": "system", "content": "be brief"}
    with serving(made, tmp_path) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        said = lambda *messages, **options: client.chat.completions.create(model=MODEL, messages=messages, **options)
        user = lambda text: {"role": "user", "content": text}
        first = said(system, user("hello"), extra_body={"session_id": "s"})
        second = said(user("what"), extra_body={"session_id": "s"})
        assert [x.choices[0].message.content for x in (first, second)] == wanted
        plain = said(user("hello"))
        assert first.usage.prompt_tokens - plain.usage.prompt_tokens in (begun, begun - 1)  # the first token of all
        with pytest.raises(openai.BadRequestError, match="begins a conversation, and this one has begun"):
            said(system, user("and"), extra_body={"session_id": "s"})
        whole = said(system, user("hello"), {"role": "assistant", "content": wanted[0]}, user("what"))
        assert whole.usage.prompt_tokens > first.usage.prompt_tokens
        made_of = client.responses.create(model=MODEL, instructions="be brief", input="hello", max_output_tokens=4)
        after = client.responses.create(model=MODEL, input="what", previous_response_id=made_of.id, max_output_tokens=4)
        assert [made_of.output_text, after.output_text] == wanted
        with pytest.raises(openai.BadRequestError, match="instructions are given; give one"):
            client.responses.create(model=MODEL, instructions="be brief", input=[system, user("hello")])


def test_a_model_without_system_messages_says_so(client):
    with pytest.raises(openai.BadRequestError, match="there is a system message, but turns are lines of text"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]
        )


def test_how_likely_the_tokens_were(client):
    """Each token with its log-probability and the most likely ones; a stream tells the same, piece by piece."""
    options = dict(logprobs=True, top_logprobs=3, max_tokens=6, temperature=1.2, seed=3)
    whole = ask(client, "hello", **options).choices[0]
    content = whole.logprobs.content
    squeezed = whole.message.content.replace(" ", "")  # this tokenizer decodes tokens apart
    assert "".join(each.token for each in content).replace(" ", "") == squeezed and 1 <= len(content) <= 6
    for each in content:
        values = [top.logprob for top in each.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True) and each.logprob <= values[0] < 0
        assert each.bytes is None or bytes(each.bytes).decode() == each.token
    pieces = [event.choices[0].logprobs for event in ask(client, "hello", stream=True, **options) if event.choices]
    assert [each for piece in pieces if piece for each in piece.content] == content
    assert ask(client, "hello", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client, "hello").choices[0].logprobs is None


def test_who_ends_makes_room(made, tmp_path):
    """The next turn has the row between the tokens of the others, and an order about another session need not wait."""
    store, heard, done = Store(tmp_path), [], threading.Event()
    talk = Conversations(made, ROWS)
    talk.engine.stops = [-1]  # all answers are as long as they may be
    pool = Pool(talk, store, metrics=Metrics())

    def turn(name, count):
        def hear(what):
            heard.append(name)
            if what.ended and name == "long":
                done.set()

        return Turn("hello", Answering(max_tokens=count), hear, start=name, keep=name)

    held, free = threading.Event(), threading.Event()
    first = threading.Thread(target=pool.do, args=(lambda: (held.set(), free.wait()),))
    first.start()
    held.wait()
    for name, count in (("long", 30), ("short", 2), ("next", 2), ("last", 2)):
        pool.say(turn(name, count))
    free.set()
    first.join()
    try:
        pool.do(lambda: heard.append("order"), "nobody")
        assert done.wait(60)
    finally:
        pool.close()
        store.close()
    assert heard[-1] == "long" and heard.count("long") == 31
    assert [name for name in dict.fromkeys(heard) if name != "order"] == ["long", "short", "next", "last"]
    assert heard.index("order") < len(heard) - 10


def test_more_sessions_than_rows(client, url, server, oracle):
    """Told secrets in turn and asked for them, at once, each goes on as it would alone: on disk or not."""
    secrets = {f"s{number}": [f"secret {number}{number}", "what is it"] for number in range(5)}
    replies = {}

    def talk(name, text):
        replies[name] = ask(client, text, name).choices[0].message.content

    for place in range(2):
        threads = [threading.Thread(target=talk, args=(name, turns[place])) for name, turns in secrets.items()]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert replies == {name: oracle(turns)[-1] for name, turns in secrets.items()}
    text = httpx.get(f"{url}/metrics").text
    count = lambda name: float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name)))
    assert count("jax_ccm_evictions_total") >= 3 and count("jax_ccm_loads_total") >= 3
    assert count("jax_ccm_batch_count") < count("jax_ccm_batch_sum"), "some were answered side by side"
    assert count("jax_ccm_sessions_on_disk") >= 5


def test_a_session_that_two_begin_at_once_has_both_turns(client, url, server):
    """Whether it is there is asked when a turn is seated, not when it comes: neither overwrites the other."""
    _, pool = server
    held, free = threading.Event(), threading.Event()
    threads = [threading.Thread(target=pool.do, args=(lambda: (held.set(), free.wait()),))]
    threads[0].start()
    assert held.wait(10)
    replies = []
    for text in ("I am Ann", "I am Ben"):
        threads.append(threading.Thread(target=lambda text=text: replies.append(ask(client, text, "twice"))))
        threads[-1].start()
    deadline = time.monotonic() + 10
    while len(pool._waiting) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pool._waiting) == 2
    free.set()
    for thread in threads:
        thread.join()
    known = sorted(reply.usage.prompt_tokens_details.cached_tokens for reply in replies)
    assert known[0] == 0 and known[1] > 0
    assert tokens_read(url, "twice") > known[1]


def test_who_has_an_answer_waits_no_more(made, tmp_path):
    """Also where one turn alone may wait: the next may be asked as soon as the last answer, or refusal, is heard."""
    store, done, heard = Store(tmp_path), threading.Event(), []
    pool = Pool(Conversations(made, ROWS), store, limits=Limits(waiting=1), metrics=Metrics())

    def turn(start, *then):
        def hear(what):
            if isinstance(what, Exception) or what.ended:
                heard.append(what)
                try:
                    pool.say(turn(*then)) if then else done.set()
                except Busy as e:
                    heard.append(e)
                    done.set()

        return Turn("hello", Answering(max_tokens=2), hear, start=start, keep=None)

    try:
        pool.say(turn(None, "nobody", None))
        assert done.wait(60)
    finally:
        pool.close()
        store.close()
    assert [type(what) for what in heard] == [Reply, Missing, Reply]


def test_what_is_used_is_not_idle(client, server):
    """A response that others go on from was used, though its file did not change."""
    _, pool = server
    first, other = (client.responses.create(model=MODEL, input=text).id for text in ("I am Ann", "I am Ben"))
    idle = lambda: [name for name in pool.store.older(-3600) if name in (first, other)]
    assert idle() == [first, other]
    before = pool.store.path(first).stat().st_mtime_ns
    client.responses.create(model=MODEL, input="who am I", previous_response_id=first)
    assert idle() == [other, first] and pool.store.path(first).stat().st_mtime_ns >= before


def test_responses_branch(client, oracle, server):
    """Several go on from one response; it can be had again, streamed, and removed."""
    first = client.responses.create(model=MODEL, input="my name is Clara", max_output_tokens=4)
    assert first.output_text == oracle(["my name is Clara"])[0] and first.usage.input_tokens_details.cached_tokens == 0
    branches = [
        client.responses.create(model=MODEL, input=text, previous_response_id=first.id, max_output_tokens=4)
        for text in ("what", "who")
    ]
    for text, branch in zip(("what", "who"), branches, strict=True):
        assert branch.output_text == oracle(["my name is Clara", text])[1]
        assert branch.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    given = [{"role": "user", "content": [{"type": "input_text", "text": "what"}]}]
    events = list(
        client.responses.create(
            model=MODEL, input=given, previous_response_id=first.id, stream=True, store=False, max_output_tokens=4
        )
    )
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == branches[0].output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas).strip() == branches[0].output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(events[-1].response.id)
    client.responses.delete(first.id)
    for act in (
        lambda: client.responses.retrieve(first.id),
        lambda: client.responses.create(model=MODEL, input="x", previous_response_id=first.id),
        lambda: client.responses.create(model=MODEL, input="x", previous_response_id="clara"),
    ):
        with pytest.raises(openai.NotFoundError):
            act()


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "body, param",
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 17}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"obfuscate": True}}, "stream_options.obfuscate"),
        ({"magic": 1}, "magic"),
        ({"session_id": "../../etc/passwd"}, "session_id"),
        ({"session_id": "resp_1"}, "session_id"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "system", "content": ["be kind"]}, *USER]}, "messages[0].content[0]"),
        ({"messages": [{"role": "system", "content": "be kind"}]}, "messages"),
        ({"messages": [*USER, {"role": "system", "content": "be kind"}, *USER]}, "messages[1].role"),
        ({"messages": [*USER, *USER]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [*USER, {"role": "assistant", "content": "yes"}]}, "messages"),
        ({"model": "gpt-4"}, "model"),
        ({"model": None}, "model"),
        ({"messages": [{"role": "user", "content": " "}]}, None),
        ({"messages": [{"role": "user", "content": "x" * 70}]}, None),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(url, body, param):
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": USER} | body)
    assert answer.status_code == (404 if body.get("model") else 400), answer.text
    assert answer.json()["error"]["param"] == param and answer.json()["error"]["message"]


def test_fields_that_ask_for_nothing(url):
    body = {"model": MODEL, "messages": USER, "n": 1, "tools": [], "logprobs": False, "user": "me", "stop": None}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


def test_small_routes(url, client, made):
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    tokens = httpx.post(f"{url}/tokenize", json={"content": "hi </s>"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 7
    for answer, status in (
        (httpx.post(f"{url}/v1/chat/completions", content=b"{"), 400),
        (httpx.post(f"{url}/v1/chat/completions", content=b"[" * 100_000), 400),
        (httpx.post(f"{url}/v1/chat/completions", content=b"\xff"), 400),
        (httpx.post(f"{url}/v1/chat/completions", json=[1]), 400),
        (httpx.post(f"{url}/v1/chat/completions", content=b" " * 2**21), 413),
        (httpx.get(f"{url}/v1/chat/completions"), 405),
        (httpx.get(f"{url}/v1/embeddings"), 404),
    ):
        assert answer.status_code == status and "error" in answer.json(), answer.text


def test_pages_of_other_sites_ask_nothing(url):
    """Neither by a foreign origin, nor by a name that was made to mean this machine; the server's own page may ask."""
    port = url.rsplit(":", 1)[1]
    for headers, status in (
        ({"origin": "https://example.org"}, 403),
        ({"origin": "null"}, 403),
        ({"host": f"example.org:{port}", "origin": f"http://example.org:{port}"}, 403),
        ({"host": f"localhost:{port}", "origin": f"http://localhost:{port}"}, 200),
        ({"host": f"[::1]:{port}"}, 200),
        ({"origin": url}, 200),
    ):
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status, headers


def test_memories_are_carried(url, client, made, oracle, server, tmp_path):
    """Out, in under another name, and away with every copy; not of another model, nor damaged, nor by a path."""
    ask(client, "my name is Clara", "carry")
    there = f"{url}/sessions/carry/memory"
    content = httpx.get(there).content
    assert httpx.put(f"{url}/sessions/copy/memory", content=content).status_code == 200
    assert ask(client, "what", "copy").choices[0].message.content == oracle(["my name is Clara", "what"])[1]
    other = Conversations(experiment("ccm_concat", comp_tokens=1))
    other.say({0: "hi"}, max_tokens=2)
    other.save(0, tmp_path / "other.ccm")
    refused = httpx.put(there, content=(tmp_path / "other.ccm").read_bytes())
    assert refused.status_code == 409 and "method" in refused.json()["error"]["message"]
    damaged = httpx.put(there, content=content[:-1] + b"?")
    assert (
        damaged.status_code == 400 and "the memory cannot be read: it is damaged" in damaged.json()["error"]["message"]
    )
    assert httpx.get(there).content == content
    folder = server[1].store.folder
    assert httpx.delete(there).status_code == 200 and not list(folder.glob("carry*"))
    assert httpx.get(there).status_code == 404 == httpx.delete(there).status_code
    for name in ("..%2Fx", "a.b", "x" * 65, ".lock"):
        assert httpx.get(f"{url}/sessions/{name}/memory").status_code in (400, 404)
    assert not list(folder.glob(".*.tmp"))


def test_whoever_goes_away_takes_the_turn_back(url, client, server, oracle):
    """A client that closes its stream leaves the session as it was."""
    ask(client, "hello", "gone")
    before = httpx.get(f"{url}/sessions/gone/memory").content
    body = {"model": MODEL, "messages": USER, "session_id": "gone", "stream": True, "max_tokens": 16}
    step = server[1]._going.step
    server[1]._going.step = lambda: (time.sleep(0.05), step())[1]
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    finally:
        server[1]._going.step = step
    server[1].do(lambda: None, "gone")  # after the turn that was going on
    assert httpx.get(f"{url}/sessions/gone/memory").content == before
    assert ask(client, "what", "gone").choices[0].message.content == oracle(["hello", "what"])[1]


def test_a_token_of_any_letters(made, tmp_path):
    """Clients send them as UTF-8."""
    with serving(made, tmp_path, Access(token="sécret")) as (url, _):
        for given, status in (("sécret".encode(), 200), (b"secret", 401), ("sécret".encode("latin-1"), 401)):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": b"Bearer " + given}).status_code == status


@pytest.mark.parametrize("durable", [True, False])
def test_a_restart_reads_nothing_again(made, tmp_path, oracle, durable):
    """What was acknowledged is there, and the next turn reads its own tokens alone and answers as it would have."""
    access = Access(token="secret")
    with serving(made, tmp_path, access, durable=durable) as (url, pool):
        for given in ("Bearer none", "Bearer secreT", "Bearer sécret", "secret", "Basic secret"):
            answer = httpx.get(f"{url}/v1/models", headers={"authorization": given.encode()})
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        first = ask(client, "my name is Clara", "clara")
        assert (tmp_path / "clara.ccm").exists() == durable
        with pytest.raises(UserError, match="another server keeps its sessions"):
            Store(tmp_path)
    limits = Limits(waiting=1, sessions=1, turns=2)
    with serving(made, tmp_path, durable=durable, limits=limits) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        second = ask(client, "what", "clara")
        assert second.choices[0].message.content == oracle(["my name is Clara", "what"])[1]
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert cached >= first.usage.total_tokens and second.usage.prompt_tokens - cached <= len("what") + 9
        with pytest.raises(openai.RateLimitError, match="has 2 turns, as many"):
            ask(client, "what", "clara")
        with pytest.raises(openai.RateLimitError, match="keeps 1 sessions"):
            ask(client, "what", "henrik")
        assert json.loads(httpx.delete(f"{url}/sessions/clara/memory").text)["deleted"]
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")
    assert not list(tmp_path.glob("*.ccm"))
    assert np.isfinite(jax.tree.leaves(pool.talk.state.cache)[0]).all()
