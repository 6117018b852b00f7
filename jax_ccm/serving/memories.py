"""The routes about memories themselves: files in and out, slots as llama.cpp has them, and every copy away."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.responses import Response as Answer

from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.rules.types import Kind
from jax_ccm.serving import requests
from jax_ccm.serving.access import Door
from jax_ccm.serving.admission import Busy, Missing
from jax_ccm.serving.pool import Pool
from jax_ccm.serving.requests import Refused
from jax_ccm.serving.store import Unkept, require_session


class Memories:
    """What these routes do."""

    def __init__(self, pool: Pool, door: Door):
        """Handles the sessions of a pool."""
        self.pool, self.door = pool, door

    async def session(self, request: Request) -> Answer:
        """What a session has come to."""
        name = _session(request)
        held = await self._do(lambda: files.read(self.pool.saved(name)), name)
        return JSONResponse({"id": name, "object": "session"} | figures(held))

    async def memory(self, request: Request) -> Answer:
        """The memory file of a session."""
        name = _session(request)

        def whole() -> tuple[str, bytes]:
            path = self.pool.saved(name)
            return path.name, path.read_bytes()

        # Read while nobody can delete it.
        file, content = await self._do(whole, name)
        headers = {"content-disposition": f'attachment; filename="{file}"'}
        return Answer(content, media_type="application/octet-stream", headers=headers)

    async def put_memory(self, request: Request) -> Answer:
        """Makes a memory file that of a session, whether it was there or not."""
        name = _session(request)
        body = await self.door.bytes(request, self.door.access.memory)
        # A dot in front: no session has such a name, and what a killed server leaves of it is removed at the next
        # start.
        path = self.pool.store.folder / f".{uuid.uuid4().hex}.tmp"
        try:
            try:
                await run_in_threadpool(path.write_bytes, body)
            except OSError as e:
                raise Unkept(f"the memory cannot be written: {e.strerror}") from e
            # The body is read again, checked and written anew: what the client sent never stands under a session's
            # name.
            await self._do(lambda: self.pool.put(name, path), name)
        except UserError as e:
            # Messages name the memory, and not where it lies on the server.
            raise type(e)(str(e).replace(str(path), "the memory")) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return JSONResponse({"id": name, "object": "session.memory", "bytes": len(body)})

    async def delete_memory(self, request: Request) -> Answer:
        """Removes every copy of a session."""
        name = _session(request)
        await self.remove(name)
        return JSONResponse({"id": name, "object": "session.memory", "deleted": True})

    async def remove(self, name: str) -> None:
        """Removes every copy of a session, or a response.

        Raises:
          Missing: if there is none.
        """
        if not await self._do(lambda: self.pool.remove(name), name):
            raise Missing(f"there is no session {name!r}")

    async def slots(self, request: Request) -> Answer:
        """The sessions that have a row now."""
        return JSONResponse(await self._do(self.pool.slots))

    async def slot(self, request: Request) -> Answer:
        """``/slots/{id}?action=save``, ``restore`` or ``erase``."""
        name = _session(request)
        action = request.query_params.get("action", "")
        acts = {"save": self._save_slot, "restore": self._restore_slot, "erase": self._erase_slot}
        if action not in acts:
            raise Refused(f"action is {action[:80]!r}; it must be save, restore or erase", "action")
        body = await self.door.bytes(request, self.door.access.body)
        filename = requests.filename(body, needed=action != "erase")
        return JSONResponse(await self._do(lambda: {"id_slot": name} | acts[action](name, filename), name))

    def _save_slot(self, name: str, filename: str) -> dict[str, Any]:
        began, path = time.perf_counter(), self.pool.store.slot(filename)
        held = files.read(self.pool.saved(name))
        if path.exists():
            _named(filename, path, files.read)  # what is no memory is not overwritten
        else:
            self.pool.require_disk()
        # The file says whose memory it is, so that deleting the session finds it.
        header = held.header | {"about": held.header["about"] | {"session": name}}
        with self.pool.store.saving(filename, name):
            files.write(files.Held(held.path, header, held.digest, held.arrays), path)
        return {
            "filename": filename,
            "n_saved": _tokens(held),
            "n_written": path.stat().st_size,
            "timings": {"save_ms": _since(began)},
        }

    def _restore_slot(self, name: str, filename: str) -> dict[str, Any]:
        began, path = time.perf_counter(), self.pool.store.slot(filename)
        if not path.is_file():
            raise Refused(f"there is no file {filename!r}", "filename", status=404, code="not_found")
        if (size := path.stat().st_size) > (most := self.door.access.memory):
            raise Refused(f"{filename} has {size:,} bytes; {most:,} are the most", "filename", status=413)
        _named(filename, path, lambda path: self.pool.put(name, path))
        return {
            "filename": filename,
            "n_restored": _tokens(files.read(self.pool.saved(name))),
            "n_read": size,
            "timings": {"restore_ms": _since(began)},
        }

    def _erase_slot(self, name: str, filename: str) -> dict[str, Any]:
        count = _tokens(files.read(self.pool.saved(name)))
        self.pool.erase(name)
        return {"n_erased": count}

    async def _do(self, act: Callable[[], Any], name: str | None = None) -> Any:
        return await run_in_threadpool(self.pool.do, act, name)


def figures(held: files.Held) -> dict[str, Any]:
    """A session in numbers: its turns, what it holds of them, and what full context would."""
    arrays, method = held.arrays, held.header["method"]
    tokens, of = _tokens(held), np.zeros(len(arrays["kind"]), int)
    # Slots that are of all turns together carry the number of the newest chunk.
    if not method.get("mix") and not method.get("eviction"):
        for number, (first, end) in enumerate(held.turns, 1):
            is_of = (arrays["segment"] >= first) & (arrays["segment"] < end) & (arrays["kind"] != Kind.SINK)
            of[is_of] = number
    # Bytes of a slot: keys and as many of values, of all layers.
    each = 2 * arrays["k"].nbytes // max(len(of), 1)
    mixed = sum(arrays[name].nbytes for name in ("mixed_k", "mixed_v") if name in arrays)
    return {
        "method": files.called(method),
        "turns": len(held.turns),
        "tokens": tokens,
        "bytes": len(of) * each + mixed,
        "full_context_bytes": tokens * each,
        "slots": [
            {"kind": Kind(kind).name.lower(), "turn": int(turn) or None, "position": int(position)}
            for kind, turn, position in zip(arrays["kind"], of, arrays["position"], strict=True)
        ],
    }


def _session(request: Request) -> str:
    name = request.path_params["id"]
    require_session(name)
    return name


def _named(filename: str, path, act: Callable[[Any], Any]) -> Any:
    """What an act on a file comes to; its errors name the file as the client does, not where it lies."""
    try:
        return act(path)
    except Busy:
        raise
    except UserError as e:
        raise type(e)(str(e).replace(str(path), filename)) from None


def _tokens(held: files.Held) -> int:
    """Text tokens that a memory stands for."""
    return int(held.arrays["tokens"][0])


def _since(began: float) -> float:
    return round(1000 * (time.perf_counter() - began), 3)
