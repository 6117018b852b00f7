"""The routes: what comes over HTTP goes to the pool, and what the pool answers goes back in the API's own form."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.responses import Response as Answer
from starlette.routing import Route

from jax_ccm.serving import requests, shapes
from jax_ccm.serving.access import Access, Door, as_refused, refusal
from jax_ccm.serving.admission import Turn
from jax_ccm.serving.memories import Memories
from jax_ccm.serving.page import page
from jax_ccm.serving.pool import Pool
from jax_ccm.serving.requests import Asked, Defaults, Refused
from jax_ccm.serving.store import RESPONSE, is_name, require_session
from jax_ccm.sessions.turns import Logprob, Reply


class Server:
    """What the routes do."""

    def __init__(self, pool: Pool, defaults: Defaults, access: Access = Access()):
        """Serves a pool."""
        self.pool, self.defaults, self.door = pool, defaults, Door(access, pool.metrics)
        self.memories = Memories(pool, self.door)

    def app(self) -> Starlette:
        """The application, for an ASGI server. Its end drains the pool."""

        @contextlib.asynccontextmanager
        async def lifespan(_):
            yield
            # It joins a thread, and would block the loop until the last answers are made.
            await run_in_threadpool(self.pool.close)

        guard, memories = self.door.guard, self.memories
        routes = [
            Route("/", guard(self.page, open=True)),
            Route("/health", guard(self.health, open=True)),
            Route("/metrics", guard(self.metrics)),
            Route("/v1/models", guard(self.models)),
            Route("/v1/models/{id:path}", guard(self.model)),
            Route("/v1/chat/completions", guard(self.chat), methods=["POST"]),
            Route("/v1/responses", guard(self.respond), methods=["POST"]),
            Route("/v1/responses/compact", guard(self.compact), methods=["POST"]),
            Route("/v1/responses/{id}", guard(self.response), methods=["GET"]),
            Route("/v1/responses/{id}", guard(self.delete_response), methods=["DELETE"]),
            Route("/tokenize", guard(self.tokenize), methods=["POST"]),
            Route("/sessions/{id}", guard(memories.session), methods=["GET"]),
            Route("/sessions/{id}/memory", guard(memories.memory), methods=["GET"]),
            Route("/sessions/{id}/memory", guard(memories.put_memory), methods=["PUT"]),
            Route("/sessions/{id}/memory", guard(memories.delete_memory), methods=["DELETE"]),
            Route("/slots", guard(memories.slots)),
            Route("/slots/{id}", guard(memories.slot), methods=["POST"]),
        ]

        def nowhere(request, error):
            return refusal(Refused(f"{request.method} {request.url.path} is nothing here", status=error.status_code))

        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: nowhere, 405: nowhere})

    async def page(self, request: Request) -> Answer:
        """The page to look at; it holds nothing that needs the token."""
        return page()

    async def health(self, request: Request) -> Answer:
        """Whether it answers."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Answer:
        """What was counted."""
        count, size = await run_in_threadpool(self.pool.store.size)
        gauges = {"sessions_live": self.pool.live(), "sessions_on_disk": count, "session_bytes_on_disk": size}
        return PlainTextResponse(self.pool.metrics.text(**gauges), media_type="text/plain; version=0.0.4")

    def _model(self) -> dict[str, Any]:
        return {"id": self.defaults.model, "object": "model", "created": 0, "owned_by": "jax_ccm"}

    async def models(self, request: Request) -> Answer:
        """The one that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Answer:
        """The same, by its name."""
        if (name := request.path_params["id"]) != self.defaults.model:
            raise Refused(f"there is no model {name[:80]!r}; {self.defaults.model!r} is served here", status=404)
        return JSONResponse(self._model())

    async def tokenize(self, request: Request) -> Answer:
        """The tokens of a text."""
        template = self.pool.talk.engine.template
        body = await self.door.json(request)
        # Beside the loop, which streams share.
        return JSONResponse(await run_in_threadpool(requests.tokenize, body, lambda text: template.plain([text])[0]))

    async def chat(self, request: Request) -> Answer:
        """``/v1/chat/completions``."""
        asked = requests.chat(await self.door.json(request), self.defaults, request.headers.get("x-session-id"))
        if asked.session is not None:
            require_session(asked.session)
        made = shapes.Completion(self.defaults.model, asked.echo)
        replies = self._replies(request, asked, start=asked.session, keep=asked.session)
        if not asked.stream:
            return JSONResponse(made.whole(await _last(replies)))
        # Before the stream begins: what is refused up to here still has a status of its own.
        first = await anext(replies)

        async def events() -> AsyncIterator[str]:
            try:
                begins = True
                async for text, logprobs, reply in _pieces(first, replies, asked):
                    if text or logprobs or begins:
                        yield _sse(made.piece(text, first=begins, logprobs=logprobs))
                        begins = False
                    if reply.ended:
                        for event in made.ends(reply, usage=asked.usage):
                            yield _sse(event)
            except Exception as e:
                # The status is out: what goes wrong from here on is an event.
                yield _sse(as_refused(e).body())
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def respond(self, request: Request) -> Answer:
        """``/v1/responses``: each is a memory of its own, from which several may go on."""
        asked = requests.response(await self.door.json(request), self.defaults, request.headers.get("x-session-id"))
        if asked.session is not None:
            require_session(asked.session)
        within = asked.session or await self._session_of(asked.previous)
        made = shapes.Response(self.defaults.model, asked.how, asked.echo, store=asked.store)
        place = dict(start=asked.previous, keep=made.id)
        if asked.session is not None:
            place = dict(start=asked.session, keep=asked.session, snapshot=made.id)
        if not asked.store:
            place = dict(start=place["start"])

        def about(reply):
            return {"response": made.whole(reply)} | ({"session": within} if within else {})

        replies = self._replies(request, asked, within=within, about=about, **place)
        if not asked.stream:
            return JSONResponse(made.whole(await _last(replies)))
        first = await anext(replies)

        async def events() -> AsyncIterator[str]:
            try:
                for event in made.begins():
                    yield _sse(event, named=True)
                async for text, logprobs, reply in _pieces(first, replies, asked):
                    if text or logprobs:
                        yield _sse(made.piece(text, logprobs), named=True)
                    if reply.ended:
                        for event in made.ends(reply):
                            yield _sse(event, named=True)
            except Exception as e:
                refused = as_refused(e)
                yield _sse(made.fails(str(refused), refused.status), named=True)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def compact(self, request: Request) -> Answer:
        """``/v1/responses/compact``: what is told becomes a memory, and nothing is answered."""
        asked = requests.compact(await self.door.json(request), self.defaults)
        within = await self._session_of(asked.previous)
        made = shapes.Compaction(self.defaults.model)

        def about(reply):
            return {"response": made.whole(reply)} | ({"session": within} if within else {})

        replies = self._replies(request, asked, start=asked.previous, keep=made.id, within=within, about=about)
        return JSONResponse(made.whole(await _last(replies)))

    async def _session_of(self, response: str | None) -> str | None:
        """The session that a response was made in.

        Raises:
          Refused: for what is no id of a response.
          Missing: if there is no such response.
        """
        if response is None:
            return None
        self._require_response(response)
        about = await run_in_threadpool(self.pool.do, lambda: self.pool.about(response), response)
        return about.get("session")

    async def _replies(self, request: Request, asked: Asked, **place: Any) -> AsyncIterator[Reply]:
        """The replies to a turn as they come; a client that goes away takes its turn back."""
        heard: asyncio.Queue[Reply | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(what: Reply | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(heard.put_nowait, what)

        turn = Turn(asked.text, asked.how, hear, system=asked.system, told=asked.told, shorter=asked.shorter, **place)
        self.pool.say(turn)
        begun = False
        try:
            while True:
                try:
                    async with asyncio.timeout(None if asked.stream and begun else 0.5):
                        # A stream that has begun notices by itself that the client has gone; until then, and for an
                        # answer in one piece, it is asked twice a second.
                        what = await heard.get()
                except TimeoutError:
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if isinstance(what, Exception):
                    raise what
                begun = True
                yield what
                if what.ended:
                    return
        finally:
            turn.leave()

    async def response(self, request: Request) -> Answer:
        """A response that was stored."""
        name = request.path_params["id"]
        self._require_response(name)
        about = await run_in_threadpool(self.pool.do, lambda: self.pool.about(name), name)
        return JSONResponse(about["response"])

    async def delete_response(self, request: Request) -> Answer:
        """Removes it, and its memory."""
        name = request.path_params["id"]
        self._require_response(name)
        await self.memories.remove(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    def _require_response(self, name: str) -> None:
        if not name.startswith(RESPONSE) or not is_name(name):
            raise Refused(f"{name[:80]!r} is no id of a response", "previous_response_id", status=404, code="not_found")


async def _last(replies: AsyncIterator[Reply]) -> Reply:
    reply = None
    async for reply in replies:  # noqa: B007  (the last one is used)
        pass
    assert reply is not None
    return reply


async def _pieces(
    first: Reply, rest: AsyncIterator[Reply], asked: Asked
) -> AsyncIterator[tuple[str, Sequence[Logprob], Reply]]:
    """What a text goes on with, the log-probabilities of the tokens that came with it, and the reply so far."""
    shown, told, reply = "", 0, first
    while True:
        text = reply.text if reply.ended else asked.how.sure(reply.text)
        # What is held back of the text may still be cut off, with its tokens.
        logprobs = reply.logprobs[told:] if reply.logprobs and text == reply.text else ()
        if len(text) > len(shown) or logprobs or reply.ended:
            yield text[len(shown) :], logprobs, reply
            shown, told = max(shown, text, key=len), told + len(logprobs)
        if reply.ended:
            return
        reply = await anext(rest)


def _sse(event: Mapping[str, Any], *, named: bool = False) -> str:
    return (f"event: {event['type']}\n" if named else "") + f"data: {json.dumps(event)}\n\n"
