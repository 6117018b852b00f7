"""``python -m jax_ccm.serve ADAPTER``: conversations over HTTP, in the form of OpenAI's API."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, load_experiment
from jax_ccm.distributed import processes, sharding
from jax_ccm.errors import UserError, require_least
from jax_ccm.memory.generation import Sampling
from jax_ccm.records.parsing import read_text
from jax_ccm.records.paths import Folder

if TYPE_CHECKING:
    from jax_ccm.serving.store import Store

TOKEN = "JAX_CCM_TOKEN"


@dataclasses.dataclass(frozen=True)
class Options:
    """Serves conversations whose past is a compressed memory, kept by the server: a turn sends and reads what is new.

    POST /v1/chat/completions with `session_id` in the body (or the header x-session-id) and the new messages alone;
    POST /v1/responses with `previous_response_id`; both with `stream`. GET, PUT and DELETE /sessions/{id}/memory carry
    memories in and out, POST /slots/{id} saves and restores them here; /v1/models, /tokenize, /health and /metrics are
    there, too, and a page to look at. What is not supported is refused with 400 and the field's name. A token is needed
    beyond loopback: set JAX_CCM_TOKEN, or --token_file.
    """

    adapter: Folder | None = None
    """Folder or name of a trained adapter, or ORG/NAME[@REVISION] on the hub; needed where the config names none."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    name: str = ""
    """What the model is called in requests; empty for the last part of the adapter's name."""
    workdir: Folder = Path("sessions")
    """Where sessions are kept: personal data. One server at a time."""
    slot_save_path: Folder | None = None
    """Folder to which clients may save sessions, and from which they restore them (/slots); None for no such thing."""
    rows: int = 8
    """Sessions that speak side by side; the others wait on disk."""
    durable: bool = True
    """A turn is on disk before its answer ends; False: when its session makes room for another, or the server ends."""
    token_file: Folder | None = None
    """A file that holds the token which requests must bring."""
    max_tokens: int = 256
    """Most tokens of an answer, where a request does not say."""
    most_tokens: int = 4096
    """The largest limit that a request may set."""
    temperature: float = 0.0
    """Where a request does not say; 0 takes the most likely token each time."""
    most_body: int = 2**20
    """Most bytes of a request."""
    most_memory: int = 2**28
    """Most bytes of a memory file that is put in."""
    most_waiting: int = 256
    """Requests at once; more are refused with 429."""
    most_sessions: int = 100_000
    """Sessions on disk."""
    most_turns: int = 100_000
    """Turns of a session."""
    most_bytes: int = 2**40
    """Bytes of all sessions on disk."""
    idle_hours: float = 0.0
    """Hours after which a session that nobody uses is removed; 0 for never."""


def main() -> int:
    options, config = cli.parse(Options, command="jax_ccm.serve")
    # Before the model is loaded, which takes much longer.
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'the server needs {package}; pip install "jax_ccm[serve]"')
    if options.adapter is None and not config.adapter.load:
        raise UserError("there is no adapter to serve; name it in place of the config, or give --adapter PATH")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port is {options.port}; it must be from 0 to 65535")
    counts = ("rows", "max_tokens", "most_body", "most_memory", "most_waiting", "most_sessions", "most_turns")
    require_least(options, "--", **dict.fromkeys(counts, 1), most_tokens=options.max_tokens, most_bytes=1, idle_hours=0)
    Sampling(options.temperature)  # refuses what is none
    token = _token(options)
    processes.refuse_several(devices=True)
    from jax_ccm.serving.store import Store

    store = Store(options.workdir, options.slot_save_path)  # a folder that is taken is said before anything is loaded
    name = options.name or Path(str(options.adapter or config.adapter.load)).name
    return serve(load_experiment(config, adapter=options.adapter), store, name, token, options)


def serve(experiment: Experiment, store: Store, name: str, token: str, options: Options) -> int:
    """Serves until a signal asks for the end; answers that are being made end first."""
    import uvicorn

    from jax_ccm.serving.admission import Limits
    from jax_ccm.serving.app import Access, Server
    from jax_ccm.serving.metrics import Metrics
    from jax_ccm.serving.pool import Pool
    from jax_ccm.serving.requests import Defaults
    from jax_ccm.sessions.conversations import Conversations

    # The pool's own thread uses the mesh again: JAX knows it thread by thread.
    with sharding.use(experiment.mesh):
        talk = Conversations(experiment, options.rows)
    idle = 3600 * options.idle_hours
    limits = Limits(options.most_waiting, options.most_sessions, options.most_turns, options.most_bytes, idle)
    pool = Pool(talk, store, durable=options.durable, limits=limits, metrics=Metrics())
    defaults = Defaults(name, options.max_tokens, options.most_tokens, options.temperature)
    app = Server(pool, defaults, Access(token, options.most_body, options.most_memory)).app()
    print(f"serving {name!r} ({experiment.method.name} on {experiment.base_name}), sessions in {options.workdir}")
    # Uvicorn raises a signal again once it has drained: the end that was asked for is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.run(app, host=options.host, port=options.port, log_level="info", timeout_keep_alive=30)
    # Behind the pool's end, which still writes (`Server.app`).
    store.close()
    return 0


def _token(options: Options) -> str:
    """The token, if there is one.

    Raises:
      UserError: if there is none, and others than this machine could ask.
    """
    # An editor ends a file with a line break, which is no part of the token.
    token = read_text(options.token_file).strip() if options.token_file else os.environ.get(TOKEN, "").strip()
    from jax_ccm.serving.access import is_loopback

    if options.token_file and not token:
        raise UserError(f"--token_file {options.token_file} is empty; give a file that holds a token")
    if not token and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host} lets other machines ask, and there is no token; set {TOKEN}, give --token_file, or "
            "serve at 127.0.0.1"
        )
    return token


if __name__ == "__main__":
    cli.run(main)
