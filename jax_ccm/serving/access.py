"""Who may ask, and how much: the token, the sizes of bodies, and errors in the API's own form."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response as Answer

from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.records.parsing import parse_json
from jax_ccm.serving.admission import Busy, Missing
from jax_ccm.serving.metrics import Metrics
from jax_ccm.serving.requests import Refused
from jax_ccm.serving.store import Unkept

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


class Door:
    """What every request comes through."""

    def __init__(self, access: Access, metrics: Metrics):
        """Counts what comes in ``metrics``."""
        self.access, self._metrics = access, metrics

    def guard(self, endpoint: Callable[[Request], Awaitable[Answer]], *, open: bool = False):
        """The endpoint behind the token, its errors in the API's form, counted."""

        @functools.wraps(endpoint)
        async def guarded(request: Request) -> Answer:
            try:
                # First of all: it also holds for what needs no token, such as the page.
                self._require_own_pages(request)
                if not open:
                    self._require_token(request)
                answer = await endpoint(request)
            except ClientDisconnect:
                # Nobody hears it; 499 is what nginx counts for a client that went away.
                answer = Answer(status_code=499)
            except Exception as e:
                answer = refusal(as_refused(e))
            # The route's pattern, not the address: names of sessions would make a counter each, and are nobody's
            # business.
            route = request.scope["route"].path if "route" in request.scope else endpoint.__name__
            labels = f'path="{route}",method="{request.method}",status="{answer.status_code}"'
            self._metrics.add("requests", 1, labels)
            return answer

        return guarded

    def _require_own_pages(self, request: Request) -> None:
        """Refuses what a page of another site has a browser ask, which needs no token where there is none."""
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        # A browser sends Origin with whatever a page of another site posts or wants to read; most programs send none.
        if origin is not None and _split(origin).netloc != host:
            raise Refused(f"this server answers no pages of {origin[:80]!r}", status=403, code="foreign_origin")
        # A name that its owner has made to mean this machine is of the same origin as the owner's page.
        if not self.access.token and not is_loopback(_split(f"//{host}").hostname or ""):
            raise Refused(
                f"without a token this server answers at 127.0.0.1 and localhost, not at {host[:80]!r}", status=403,
                code="foreign_host",
            )  # fmt: skip

    def _require_token(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # In constant time: how long it takes tells nothing about how much of a guess was right.
        # A header is bytes, which come here as Latin-1, whatever letters they were meant to be.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.access.token.encode())
        if self.access.token and not (kind.lower() == "bearer" and right):
            raise Refused("give the server's token: Authorization: Bearer TOKEN", status=401, code="invalid_api_key")

    async def bytes(self, request: Request, most: int) -> bytes:
        """The body of a request.

        Raises:
          Refused: if it is too large, or does not come.
        """
        body = bytearray()
        too_large = Refused(f"the body has more than {most:,} bytes, the most that is taken here", status=413)
        # Refused before it is read; a body that comes in pieces says no length, and is counted below.
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

    async def json(self, request: Request) -> Any:
        """The JSON values of a request's body. Raises as `bytes`, and UserError for what is no JSON."""
        return parse_json(await self.bytes(request, self.access.body), "the body")


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        raise Refused(f"{address[:80]!r} in the head of the request is no address") from None


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is always this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def as_refused(error: Exception) -> Refused:
    """An error as the client is told of it; one that nobody foresaw goes to the log."""
    if isinstance(error, Refused):
        return error
    # From the special to the general: all of these are user errors.
    for kind, status, code in (
        (Missing, 404, "not_found"),
        (Busy, 429, "rate_limit_exceeded"),
        (files.Foreign, 409, "conflict"),
        (Unkept, 507, "insufficient_storage"),
        (UserError, 400, None),
    ):
        if isinstance(error, kind):
            return Refused(str(error), status=status, code=code)
    log.error("a request failed", exc_info=error)
    return Refused("something went wrong in the server; its log says what", status=500, code="server_error")


def refusal(refused: Refused) -> Answer:
    """A refusal as an answer."""
    headers = {"www-authenticate": "Bearer"} if refused.status == 401 else None
    # What was asked is said again, and may hold half characters, which no UTF-8 can write but JSON can.
    content = json.dumps(refused.body())
    return Answer(content, status_code=refused.status, headers=headers, media_type="application/json")
