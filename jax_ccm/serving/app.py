"""The routes: what comes over HTTP goes to the pool, and what the pool answers goes back in the API's own form."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.responses import Response as Answer
from starlette.routing import Route

from jax_ccm.memory import files
from jax_ccm.serving import requests, shapes
from jax_ccm.serving.access import Access, Door, as_refused, refusal
from jax_ccm.serving.memories import Memories
from jax_ccm.serving.pool import Pool, Turn
from jax_ccm.serving.requests import Asked, Defaults, Refused
from jax_ccm.serving.store import RESPONSE, require_session
from jax_ccm.sessions.turns import Reply


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
            await run_in_threadpool(self.pool.close)

        guard, memories = self.door.guard, self.memories
        routes = [
            Route("/health", guard(self.health, open=True)),
            Route("/metrics", guard(self.metrics)),
            Route("/v1/models", guard(self.models)),
            Route("/v1/models/{id:path}", guard(self.model)),
            Route("/v1/chat/completions", guard(self.chat), methods=["POST"]),
            Route("/v1/responses", guard(self.respond), methods=["POST"]),
            Route("/v1/responses/{id}", guard(self.response), methods=["GET"]),
            Route("/v1/responses/{id}", guard(self.delete_response), methods=["DELETE"]),
            Route("/tokenize", guard(self.tokenize), methods=["POST"]),
            Route("/sessions/{id}/memory", guard(memories.memory), methods=["GET"]),
            Route("/sessions/{id}/memory", guard(memories.put_memory), methods=["PUT"]),
            Route("/sessions/{id}/memory", guard(memories.delete_memory), methods=["DELETE"]),
            Route("/slots", guard(memories.slots)),
            Route("/slots/{id}", guard(memories.slot), methods=["POST"]),
        ]
        nowhere = lambda request, error: refusal(
            Refused(f"{request.method} {request.url.path} is nothing here", status=error.status_code)
        )
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: nowhere, 405: nowhere})

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
        return JSONResponse(requests.tokenize(await self.door.json(request), lambda text: template.plain([text])[0]))

    async def chat(self, request: Request) -> Answer:
        """``/v1/chat/completions``."""
        asked = requests.chat(await self.door.json(request), self.defaults, request.headers.get("x-session-id"))
        if asked.session is not None:
            require_session(asked.session)
        made = shapes.Completion(self.defaults.model)
        replies = self._replies(request, asked, asked.session, asked.session, lambda reply: {})
        if not asked.stream:
            return JSONResponse(made.whole(await _last(replies)))
        first = await anext(replies)

        async def events() -> AsyncIterator[str]:
            try:
                begins = True
                told = 0
                async for text, reply in _pieces(first, replies, asked):
                    # What is held back of the text may still be cut off, with its tokens.
                    sure = reply.ended or asked.how.sure(reply.text) == reply.text
                    logprobs = reply.logprobs[told:] if reply.logprobs and sure else ()
                    told += len(logprobs)
                    if text or logprobs or begins:
                        yield _sse(made.piece(text, first=begins, logprobs=logprobs))
                        begins = False
                    if reply.ended:
                        for event in made.ends(reply, usage=asked.usage):
                            yield _sse(event)
            except Exception as e:
                yield _sse(as_refused(e).body())
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def respond(self, request: Request) -> Answer:
        """``/v1/responses``: each is a memory of its own, from which several may go on."""
        asked = requests.response(await self.door.json(request), self.defaults)
        if asked.previous is not None:
            self._require_response(asked.previous)
        settings = {
            "temperature": asked.how.sampling.temperature,
            "top_p": asked.how.sampling.top_p,
            "max_output_tokens": asked.how.max_tokens,
        }
        made = shapes.Response(self.defaults.model, asked.previous, settings, store=asked.store)
        keep = made.id if asked.store else None
        replies = self._replies(request, asked, asked.previous, keep, lambda reply: {"response": made.whole(reply)})
        if not asked.stream:
            return JSONResponse(made.whole(await _last(replies)))
        first = await anext(replies)

        async def events() -> AsyncIterator[str]:
            try:
                for event in made.begins():
                    yield _sse(event, named=True)
                async for text, reply in _pieces(first, replies, asked):
                    if text:
                        yield _sse(made.piece(text), named=True)
                    if reply.ended:
                        for event in made.ends(reply):
                            yield _sse(event, named=True)
            except Exception as e:
                refused = as_refused(e)
                yield _sse(made.fails(str(refused), refused.code or "server_error"), named=True)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def _replies(
        self, request: Request, asked: Asked, start: str | None, keep: str | None, about: Callable[[Reply], Mapping]
    ) -> AsyncIterator[Reply]:
        """The replies to a turn as they come; a client that goes away takes its turn back."""
        heard: asyncio.Queue[Reply | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(what: Reply | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(heard.put_nowait, what)

        turn = Turn(
            asked.text, asked.how, hear, told=asked.told, start=start, keep=keep, shorter=asked.shorter, about=about
        )
        self.pool.say(turn)
        try:
            while True:
                try:
                    async with asyncio.timeout(None if asked.stream else 0.5):
                        what = await heard.get()
                except TimeoutError:
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if isinstance(what, Exception):
                    raise what
                yield what
                if what.ended:
                    return
        finally:
            turn.leave()

    async def response(self, request: Request) -> Answer:
        """A response that was stored."""
        name = request.path_params["id"]
        self._require_response(name)
        path = await run_in_threadpool(self.pool.do, lambda: self.pool.saved(name), name)
        return JSONResponse((await run_in_threadpool(files.read, path)).header["about"]["response"])

    async def delete_response(self, request: Request) -> Answer:
        """Removes it, and its memory."""
        name = request.path_params["id"]
        self._require_response(name)
        await self.memories.remove(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    def _require_response(self, name: str) -> None:
        if not name.startswith(RESPONSE):
            raise Refused(f"{name[:80]!r} is no id of a response", "previous_response_id", status=404, code="not_found")
        self.pool.store.path(name)


async def _last(replies: AsyncIterator[Reply]) -> Reply:
    reply = None
    async for reply in replies:  # noqa: B007  (the last one is used)
        pass
    assert reply is not None
    return reply


async def _pieces(first: Reply, rest: AsyncIterator[Reply], asked: Asked) -> AsyncIterator[tuple[str, Reply]]:
    """What a text goes on with, and the reply so far."""
    shown, reply = "", first
    while True:
        text = reply.text if reply.ended else asked.how.sure(reply.text)
        if len(text) > len(shown) or reply.ended:
            yield text[len(shown) :], reply
            shown = text
        if reply.ended:
            return
        reply = await anext(rest)


def _sse(event: Mapping[str, Any], *, named: bool = False) -> str:
    return (f"event: {event['type']}\n" if named else "") + f"data: {json.dumps(event)}\n\n"
