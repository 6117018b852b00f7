"""The routes: what comes over HTTP goes to the pool, and what the pool answers goes back in the API's own form."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.responses import Response as Answer
from starlette.routing import Route

from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.records.parsing import parse_json
from jax_ccm.serving import requests, shapes
from jax_ccm.serving.pool import Busy, Missing, Pool, Turn
from jax_ccm.serving.requests import Asked, Defaults, Refused
from jax_ccm.sessions.turns import Reply

# Ids of responses are names of sessions, too, and no client may choose such a name for one.
RESPONSE = "resp_"
log = logging.getLogger("jax_ccm.serve")


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask, and how much at a time.

    Attributes:
      token: that each request has to bring; empty for none.
      body: most bytes of a JSON body.
      memory: most bytes of a memory file.
      seconds: in which a body has to be there.
    """

    token: str = ""
    body: int = 2**20
    memory: int = 2**28
    seconds: float = 30.0


class Server:
    """What the routes do."""

    def __init__(self, pool: Pool, defaults: Defaults, access: Access = Access()):
        """Serves a pool."""
        self.pool, self.defaults, self.access = pool, defaults, access

    def app(self) -> Starlette:
        """The application, for an ASGI server. Its end drains the pool."""

        @contextlib.asynccontextmanager
        async def lifespan(_):
            yield
            await run_in_threadpool(self.pool.close)

        one = "/v1/responses/{id}"
        routes = [
            Route("/health", self._guard(self.health, open=True)),
            Route("/metrics", self._guard(self.metrics)),
            Route("/v1/models", self._guard(self.models)),
            Route("/v1/models/{id:path}", self._guard(self.model)),
            Route("/v1/chat/completions", self._guard(self.chat), methods=["POST"]),
            Route("/v1/responses", self._guard(self.respond), methods=["POST"]),
            Route(one, self._guard(self.response), methods=["GET"]),
            Route(one, self._guard(self.delete_response), methods=["DELETE"]),
            Route("/tokenize", self._guard(self.tokenize), methods=["POST"]),
            Route("/sessions/{id}/memory", self._guard(self.memory), methods=["GET"]),
            Route("/sessions/{id}/memory", self._guard(self.put_memory), methods=["PUT"]),
            Route("/sessions/{id}/memory", self._guard(self.delete_memory), methods=["DELETE"]),
        ]
        nowhere = lambda request, error: _refusal(
            Refused(f"{request.method} {request.url.path} is nothing here", status=error.status_code)
        )
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: nowhere, 405: nowhere})

    def _guard(self, endpoint: Callable[[Request], Awaitable[Answer]], *, open: bool = False):
        """The endpoint behind the token, its errors in the API's form, counted."""

        @functools.wraps(endpoint)
        async def guarded(request: Request) -> Answer:
            try:
                if not open:
                    self._require_token(request)
                answer = await endpoint(request)
            except ClientDisconnect:
                answer = Answer(status_code=499)
            except Exception as e:
                answer = _refusal(_as_refused(e))
            route = request.scope["route"].path if "route" in request.scope else endpoint.__name__
            labels = f'path="{route}",method="{request.method}",status="{answer.status_code}"'
            self.pool.metrics.add("requests", 1, labels)
            return answer

        return guarded

    def _require_token(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.access.token.encode())
        if self.access.token and not (kind.lower() == "bearer" and right):
            raise Refused("give the server's token: Authorization: Bearer TOKEN", status=401, code="invalid_api_key")

    async def _bytes(self, request: Request, most: int) -> bytes:
        """The body of a request.

        Raises:
          Refused: if it is too large, or does not come.
        """
        body = bytearray()
        too_large = Refused(f"the body has more than {most:,} bytes, the most that is taken here", status=413)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.access.seconds):
                async for block in request.stream():
                    body += block
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise Refused(f"the body did not come within {self.access.seconds:g} s", status=408) from None
        return bytes(body)

    async def _json(self, request: Request) -> Any:
        return parse_json(await self._bytes(request, self.access.body), "the body")

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
        return JSONResponse(requests.tokenize(await self._json(request), lambda text: template.plain([text])[0]))

    async def chat(self, request: Request) -> Answer:
        """``/v1/chat/completions``."""
        asked = requests.chat(await self._json(request), self.defaults, request.headers.get("x-session-id"))
        if asked.session is not None:
            self._require_session(asked.session)
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
                yield _sse(_as_refused(e).body())
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def respond(self, request: Request) -> Answer:
        """``/v1/responses``: each is a memory of its own, from which several may go on."""
        asked = requests.response(await self._json(request), self.defaults)
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
                refused = _as_refused(e)
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
        await self._remove(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    async def memory(self, request: Request) -> Answer:
        """The memory file of a session."""
        name = self._require_session(request.path_params["id"])
        path = await run_in_threadpool(self.pool.do, lambda: self.pool.saved(name), name)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    async def put_memory(self, request: Request) -> Answer:
        """Makes a memory file that of a session, whether it was there or not."""
        name = self._require_session(request.path_params["id"])
        body = await self._bytes(request, self.access.memory)
        path = self.pool.store.folder / f".{uuid.uuid4().hex}.tmp"
        try:
            await run_in_threadpool(path.write_bytes, body)
            await run_in_threadpool(self.pool.do, lambda: self.pool.put(name, path), name)
        except UserError as e:
            raise type(e)(str(e).replace(str(path), "the memory")) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return JSONResponse({"id": name, "object": "session.memory", "bytes": len(body)})

    async def delete_memory(self, request: Request) -> Answer:
        """Removes every copy of a session."""
        name = self._require_session(request.path_params["id"])
        await self._remove(name)
        return JSONResponse({"id": name, "object": "session.memory", "deleted": True})

    async def _remove(self, name: str) -> None:
        if not await run_in_threadpool(self.pool.do, lambda: self.pool.remove(name), name):
            raise Missing(f"there is no session {name!r}")

    def _require_session(self, name: str) -> str:
        try:
            self.pool.store.path(name)
        except UserError as e:
            raise Refused(str(e), "session_id") from None
        if name.startswith(RESPONSE):
            raise Refused(f"{name!r} is the name of a response, not of a session", "session_id")
        return name

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


def _as_refused(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    for kind, status, code in (
        (Missing, 404, "not_found"),
        (Busy, 429, "rate_limit_exceeded"),
        (files.Foreign, 409, "conflict"),
        (UserError, 400, None),
    ):
        if isinstance(error, kind):
            return Refused(str(error), status=status, code=code)
    log.error("a request failed", exc_info=error)
    return Refused("something went wrong in the server; its log says what", status=500, code="server_error")


def _refusal(refused: Refused) -> Answer:
    headers = {"www-authenticate": "Bearer"} if refused.status == 401 else None
    return JSONResponse(refused.body(), status_code=refused.status, headers=headers)
