"""What docs/serving.md shows of a server is done to one, as it is written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.clients import MODEL

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text().split("\n## A server\n")[1]
# The address and the name of the page's server; a test's has others.
WRITTEN = {"http://127.0.0.1:8000": "url", "127.0.0.1:8000": "place", '"clara-1"': "name"}


def here(text: str, url: str) -> str:
    """An example with the address and the model's name of this server, and nothing else in it changed."""
    values = {"url": url, "place": url.removeprefix("http://"), "name": f'"{MODEL}"'}
    for written, name in WRITTEN.items():
        text = text.replace(written, values[name])
    return text


def lines() -> list[str]:
    """The indented commands, each with what goes on behind a backslash."""
    text = re.sub(r" *\\\n *", " ", TEXT)
    return [line.strip() for line in text.splitlines() if line.startswith("    curl ")]


def test_python(url):
    """All of it, block after block."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 1
    names: dict[str, Any] = {}
    for block in blocks:
        exec(here(block, url), names)
    first, again = names["first"], names["again"]
    assert first.output_text and again.output_text and again.previous_response_id == first.id
    assert again.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens
    names["client"].close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: apt-get install curl")
def test_curl(url, tmp_path):
    """Line after line in one shell's folder: each is answered, and what the page says of it is so."""
    found = lines()
    assert len(found) >= 4
    answers = []
    for line in found:
        done = subprocess.run(
            ["bash", "-c", here(line, url)], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (line, done.stderr)
        assert '"error"' not in done.stdout, (line, done.stdout)
        answers.append(done.stdout)
    first, second = (json.loads(answer) for answer in answers[:2])
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert cached >= first["usage"]["total_tokens"]
    assert (tmp_path / "clara.ccm").read_bytes()[8:9] == b"{"
    assert httpx.get(f"{url}/sessions/clara").status_code == 404 != httpx.get(f"{url}/sessions/copy").status_code
