"""What a memory file shows of itself, and in what two differ."""

from __future__ import annotations

import pytest

from jax_ccm import inspect
from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from tests.test_chat import experiment

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge"])
def test_one_and_two(name, tmp_path, capsys):
    talk = Conversations(experiment(name, comp_tokens=2, sink=True))
    talk.say({0: "my name is Clara"}, max_tokens=4)
    a, b = str(tmp_path / "a.ccm"), str(tmp_path / "b.ccm")
    talk.save(0, a)
    inspect.main([a])
    shown = capsys.readouterr().out
    appended = name == "ccm_concat"
    for line in (
        f"method        {name} (2 tokens, sink)", "base          from scratch", "RoPE of base 10000",
        "session 0: 1 turn, 2 chunks closed", f"1 sink, {4 if appended else 2} memory", "turn 1        chunks 0 to 1",
    ):  # fmt: skip
        assert line in shown
    talk.save(0, b)
    inspect.main([a, b])
    assert "they hold the same memory" in capsys.readouterr().out
    talk.say({0: "and yours"}, max_tokens=4)
    talk.save(0, b)
    inspect.main([a, b])
    shown = capsys.readouterr().out.split("they differ:")[1]
    assert "session 0, chunks: 2 | 4" in shown
    if appended:
        assert "session 0: 5 | 9 slots, 5 of them at the same place" in shown and "apart" not in shown
    else:
        assert "session 0, mixed_k of the slots that they share" in shown
    (tmp_path / "b.ccm").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"b.ccm cannot be read: its header is said to have"):
        inspect.main([a, b])
