"""A server of a tiny model in a thread, and what clients ask it."""

from __future__ import annotations

import contextlib
import errno
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from jax_ccm.memory import files
from jax_ccm.serving.app import Access, Server
from jax_ccm.serving.metrics import Metrics
from jax_ccm.serving.pool import Pool
from jax_ccm.serving.requests import Defaults
from jax_ccm.serving.store import Store
from jax_ccm.sessions.conversations import Conversations

ROWS = 2
MODEL = "tiny"


@contextlib.contextmanager
def serving(made, folder, access=Access(), slots=None, **options):
    """A server in a thread; its address and its pool."""
    store = Store(folder, slots)
    pool = Pool(Conversations(made, ROWS), store, metrics=Metrics(), **options)
    app = Server(pool, Defaults(MODEL, max_tokens=4, most_tokens=16), access).app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", loop="asyncio"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        (socket,) = server.servers[0].sockets
        yield f"http://127.0.0.1:{socket.getsockname()[1]}", pool
    finally:
        server.should_exit = True
        thread.join()
        store.close()


@contextlib.contextmanager
def staying(ending=""):
    """Files, or those whose names end so, cannot be removed: their folder has become read-only, say."""
    unlink = Path.unlink

    def stays(path, *given, **named):
        if path.exists() and path.name.endswith(ending):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        unlink(path, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", stays)
        yield


def ask(client, text, session=None, **options):
    body = {"session_id": session} if session else None
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=body, **options)


def tokens_read(url, name) -> int:
    """Tokens that a session has read, as its file says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.ccm")
        path.write_bytes(httpx.get(f"{url}/sessions/{name}/memory").content)
        return int(files.read(path).arrays["tokens"][0])
