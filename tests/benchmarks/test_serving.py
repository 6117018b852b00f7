"""``python -m jax_ccm.benchmarks.serving``: a turn is measured of sessions in the state that their turns leave."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys

import numpy as np
import pytest

from jax_ccm.benchmarks import llama_cpp_peer, serving
from jax_ccm.benchmarks.baselines import compared, slots_after
from jax_ccm.benchmarks.sides import started
from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from tests.test_chat import experiment

pytestmark = pytest.mark.once

TINY = {"sessions": (1, 2), "turns": (1, 3), "prompt": 2, "reply": 3, "least": 3}
# A peer without llama.cpp: what its steps take is made up, and one of them fails.
PEER = """
import sys
sys.path.insert(0, {folder!r})
from peer import serve
def fail():
    raise MemoryError("no room")
found = lambda: lambda: {{"first": 0.25, "seconds": 0.5, "bytes": 8}}
steps = {{"1": found, "1, carried": found, "3": found, "3, carried": fail}}
serve(lambda settings: (settings, steps))
"""


@pytest.fixture
def peer(tmp_path):
    folder = str(next(iter(importlib.util.find_spec("jax_ccm.benchmarks").submodule_search_locations)))
    (tmp_path / "peer.py").write_text(PEER.format(folder=folder))
    path = tmp_path / "peer"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'peer.py'}\n")
    path.chmod(0o755)
    return str(path)


def loads(monkeypatch, made) -> None:
    monkeypatch.setattr(serving, "open_experiment", lambda config: contextlib.nullcontext(made))


@pytest.mark.parametrize("unit", ["turn", "exchange"])
def test_sessions_are_where_their_turns_leave_them(unit, tmp_path, monkeypatch):
    """Before the turn that is measured, and behind it: full context, a memory that grows, forgets, is written over."""
    made = experiment("ccm_concat", unit, comp_tokens=2, sink=True)
    bench = serving.Bench(made, serving.Options(tmp_path, **TINY))
    talks = []

    class Seen(Conversations):
        def replies(self, *given, **options):
            talks.append((self, np.asarray(self.state.cache.slots.live).sum(1), self.state.tokens))
            return super().replies(*given, **options)

    monkeypatch.setattr(serving, "Conversations", Seen)
    assert bench.chunks == {"turn": 2, "exchange": 1}[unit]
    size = -(-bench.turn // bench.chunks)
    ways = compared("ccm_concat", {"comp_tokens": 2, "sink": True}, capacity=6, window=1)
    names = [baseline.name for baseline in ways]
    assert names == ["full", "window", "concat", "concat, evicting", "merge"]
    for baseline in ways:
        live = serving.Live(bench, baseline, 2, 4)
        live.run()  # behind another turn it is the same
        talks.clear()
        found = live.run()
        assert len(found["first"]) == 2 and 0 < max(found["first"]) < found["seconds"]
        talk, before, tokens = talks.pop()
        room = talk.state.cache.memory_capacity
        expected = [len(slots_after(baseline.method, n * bench.chunks, size, room).kind) for n in (4, 5)]
        assert before.tolist() == [expected[0]] * 2 and tokens == (4 * bench.turn,) * 2
        # Halves of a turn may differ by a token; memory does not depend on it.
        after = np.asarray(talk.state.cache.slots.live).sum(1)
        np.testing.assert_allclose(after, expected[1], atol=bench.chunks - 1)
        assert np.asarray(talk.state.cache.chunks).tolist() == [5 * bench.chunks] * 2
        assert not np.asarray(talk.state.cache.lost).any() or baseline.memory is not None
        assert bench.bytes_of(baseline, 4) == talk.engine.nobody.nbytes


def test_cells_are_measured_beside_a_peer_and_what_does_not_fit_is_said(peer, tmp_path, monkeypatch, capsys):
    made = experiment("ccm_concat", "exchange", comp_tokens=2, sink=True)
    loads(monkeypatch, made)
    monkeypatch.setattr(serving, "locate", lambda source: tmp_path / "base.gguf")
    bench = serving.Bench(made, serving.Options(tmp_path, **TINY))
    full = compared("ccm_concat", {"comp_tokens": 2}, capacity=6, window=1)[0]
    gib = (2 * 2 * bench.bytes_of(full, 3) - 1) / 2**30  # two sessions behind three turns are one byte too much
    options = serving.Options(tmp_path / "out", peer=peer, memory_gib=gib, **TINY)
    results = serving.benchmark(made.config, options, command="the command")
    assert json.loads((tmp_path / "out" / "serving.json").read_text())["cells"] == results["cells"]
    cells = {(cell["sessions"], cell["turns"]): cell["systems"] for cell in results["cells"]}
    assert list(cells) == [(1, 1), (2, 1), (1, 3), (2, 3)]
    assert all(cells[2, 1][name]["rounds"] == 2 for name in ("full", "concat", "concat, evicting", "merge"))
    assert all(cells[1, 3][name]["rounds"] == 3 for name in ("full", "merge"))
    assert cells[2, 3]["full"] == {"bytes": bench.bytes_of(full, 3), "needs_bytes": 4 * bench.bytes_of(full, 3)}
    assert cells[2, 3]["merge"]["bytes"] == cells[2, 1]["merge"]["bytes"]
    # One session after the other: twice as many are not faster.
    theirs = [cells[sessions, 1]["llama.cpp"] for sessions in (1, 2)]
    assert [cell["turns_per_second"] for cell in theirs] == [2, 2] and theirs[0]["first_token_seconds"] == 0.25
    assert cells[2, 3]["llama.cpp"] == {"error": "MemoryError: no room"}
    settings = results["peer"]
    assert settings["turn"] == bench.turn and settings["prompt"] == bench.read and settings["turns"] == [1, 3]
    text = (tmp_path / "out" / "serving.md").read_text()
    assert "MemoryError: no room" in text and "needs 0.000105 GiB" in text and "| 1 | 2 | llama.cpp | 2 |" in text
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000 and capsys.readouterr().out.endswith(text + "\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reply": 0}, "--reply is 0; it must be at least 1"),
        ({"sessions": (4, 1)}, r"--sessions is \[4, 1\]; give different numbers from 1, in order"),
        ({"turns": ()}, r"--turns is \[\]; give different numbers"),
        ({"memory_gib": 0.0}, "--memory_gib is 0.0; it must be more than 0"),
        ({"peer": "no-such-python"}, "no-such-python cannot be started .* llama-cpp-python"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, tmp_path, monkeypatch):
    made = experiment("ccm_concat", "exchange", comp_tokens=2)
    loads(monkeypatch, made)
    monkeypatch.setattr(serving, "locate", lambda source: tmp_path / "base.gguf")
    with pytest.raises(UserError, match=message):
        serving.benchmark(made.config, serving.Options(tmp_path / "out", **TINY | changes))


def test_a_peer_needs_a_gguf_file(tmp_path, monkeypatch):
    made = experiment("ccm_concat", "exchange", comp_tokens=2)
    loads(monkeypatch, made)
    monkeypatch.setattr(serving, "locate", lambda source: tmp_path)
    with pytest.raises(UserError, match="is no GGUF file, which llama.cpp needs; leave --peer out"):
        serving.benchmark(made.config, serving.Options(tmp_path / "out", peer=sys.executable, **TINY))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="this Python has llama-cpp-python")
def test_a_python_without_llama_cpp_is_named(tmp_path):
    command = [sys.executable, "-P", serving.peers.__file__, llama_cpp_peer.__file__]
    with pytest.raises(UserError, match="lacks llama_cpp; give --peer a Python that has llama-cpp-python"):
        with started(command, {"threads": 1, "turns": []}, serving.REMEDY):
            pass
