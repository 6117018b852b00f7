"""A server in a process of its own: ended by signals, killed, and started again on the same folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from jax_ccm import serve
from jax_ccm.errors import UserError

SERVE = """
import sys
from pathlib import Path
import tests.conftest  # quick to compile
from jax_ccm import serve
from jax_ccm.config import cli
from jax_ccm.serving.store import Store
from tests.test_chat import experiment
folder = Path(sys.argv[1])
options = serve.Options(port=0, workdir=folder, rows=2, max_tokens=4)
made = experiment("ccm_concat", comp_tokens=2, sink=True)
cli.run(lambda: serve.serve(made, Store(folder), "tiny", "", options))
"""


class Life:
    """A process that serves."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder)], cwd=Path(__file__).parents[2], text=True,
            env=os.environ | {"PYTHONPATH": "."}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said, self.url = "", ""
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                break
        assert self.url, self.said
        self.rest = threading.Thread(target=lambda: self.process.stdout.read(), daemon=True)
        self.rest.start()

    def say(self, text: str, session: str, **fields) -> dict:
        body = {"model": "tiny", "session_id": session, "messages": [{"role": "user", "content": text}], **fields}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ended(self) -> int:
        code = self.process.wait(timeout=300)
        self.rest.join()
        self.process.stdout.close()
        return code


@pytest.mark.processes
def test_nothing_acknowledged_is_lost(tmp_path):
    """Killed right behind an answer, the session is there and goes on with its own tokens; SIGTERM drains."""
    life = Life(tmp_path)
    told = life.say("my name is Clara", "clara")["usage"]
    life.process.send_signal(signal.SIGKILL)
    assert life.ended() == -signal.SIGKILL
    (tmp_path / ".clara.ccm.77.tmp").write_bytes(b"half a file")
    life = Life(tmp_path)
    usage = life.say("what", "clara")["usage"]
    known = usage["prompt_tokens_details"]["cached_tokens"]
    assert known >= told["total_tokens"] and usage["prompt_tokens"] - known <= len("what") + 9
    assert [path.name for path in tmp_path.glob(".*.tmp")] == []
    body = {"model": "tiny", "session_id": "clara", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with httpx.stream("POST", f"{life.url}/v1/chat/completions", json=body, timeout=300) as answer:
        lines = answer.iter_lines()
        next(lines)
        life.process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines), "the answer came to its end"
    assert life.ended() == 0


@pytest.mark.parametrize(
    "options, says",
    [
        (["--rows", "0"], "--rows is 0; it must be at least 1"),
        (["--max_tokens", "0"], "--max_tokens is 0"),
        (["--most_tokens", "9"], "--most_tokens is 9; it must be at least 256"),
        (["--temperature", "nan"], "temperature nan"),
        (["--idle_hours", "nan"], "--idle_hours is nan"),
        (["--most_waiting", "0"], "--most_waiting is 0"),
        (["--port", "65536"], "--port is 65536"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(monkeypatch, tmp_path, options, says):
    """And nothing is made: no request could be answered."""
    monkeypatch.setattr(serve, "load_experiment", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("sys.argv", ["serve", "smollm2-135m-concat", "--workdir", str(tmp_path / "sessions"), *options])
    with pytest.raises(UserError, match=says):
        serve.main()
    assert not list(tmp_path.iterdir())


def test_beyond_loopback_only_with_a_token(monkeypatch, tmp_path):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert serve._token(serve.Options(host=host)) == ""
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(UserError, match="lets other machines ask, and there is no token"):
            serve._token(serve.Options(host=host))
    monkeypatch.setenv(serve.TOKEN, "secret")
    assert serve._token(serve.Options(host="0.0.0.0")) == "secret"
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(UserError, match="token is empty"):
        serve._token(serve.Options(token_file=tmp_path / "token"))
