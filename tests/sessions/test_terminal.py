"""What is typed between turns: the memory shown, saved, brought back, copied, forgotten and compared."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.terminal import Terminal, printable
from tests.sessions.test_conversations import row
from tests.test_chat import experiment


@pytest.fixture(scope="module")
def made():
    return experiment("ccm_concat", comp_tokens=2)


@pytest.fixture
def terminal(made):
    return Terminal(Conversations(made), max_tokens=4)


def test_a_system_message_stays_when_the_memory_goes(capsys):
    made = experiment(
        "ccm_concat", "exchange", {"max_turn_tokens": 64, "chat_template": True}, comp_tokens=2, sink=True
    )
    talk = Conversations(made)
    talk.instruct({0: "be brief"})
    begun = talk.state.tokens[0]
    terminal = Terminal(talk, max_tokens=4, alone=True, system="be brief")
    terminal.say("hello", {})
    terminal.command("/compare")
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:7].strip()]
    assert lines == ["without", "memory", "memory", "full", "another", "nothing"]
    terminal.command("/reset")
    assert talk.state.tokens[0] == begun and "but for the system message" in capsys.readouterr().out
    assert len(talk.state.turns[0]) == 0


def test_commands(terminal, tmp_path, capsys):
    """Each does what it says, and a mistake changes nothing."""
    talk, entry = terminal.talk, {}
    shown = lambda: capsys.readouterr().out
    terminal.say("my name is Clara", entry)
    assert entry["slots"] == 4 and "[turn 1; " in (said := shown()) and "first token after" in said
    assert printable(entry["memory"]) in said
    one = row(talk, 0)
    terminal.command(f"/save {tmp_path / 'clara.ccm'}")
    assert "clara.ccm, " in shown()
    terminal.command("/fork")
    terminal.say("and yours", entry)
    terminal.command("/memory")
    assert "turn   1  4 slots  my name is Clara\nturn   2  4 slots  and yours" in shown()
    terminal.command("/compare")
    lines = shown().splitlines()
    assert [line.split()[0] for line in lines if line[:7].strip()] == ["memory", "full", "another", "nothing"]
    assert lines[0].split(None, 1)[1:] == [printable(entry["memory"])][: len(lines[0].split()) > 1]
    assert len(talk.state.turns[0]) == 2
    terminal.command("/forget 1")
    assert "turn 1 is forgotten, 4 slots" in shown() and talk.memory_bytes()[0] == 4
    terminal.command("/back")
    assert all(map(np.array_equal, row(talk, 0), one))
    terminal.command("/reset")
    assert talk.memory_bytes()[0] == 0
    terminal.command(f"/load {tmp_path / 'clara.ccm'}")
    assert "1 turns" in shown() and talk.memory_bytes()[0] == 4
    terminal.command("/help")
    assert shown().count("\n/") == 7
    (tmp_path / "notes").write_text("no memory")
    before = talk.state
    for line, message in (
        ("/mem", "unknown command '/mem'; did you mean '/memory'"),
        ("/save", "/save takes FILE"),
        ("/reset now", "/reset takes nothing"),
        ("/forget two", "takes the number of a turn"),
        ("/forget 2", "there is no turn 2; the session has 1"),
        ("/back", "nothing to return to"),
        ("/compare", "no last turn"),
        (f"/save {tmp_path / 'notes'}", "notes cannot be read"),
        (f"/load {tmp_path / 'none'}", "none cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            terminal.command(line)
        assert talk.state is before


def test_a_mixture_shows_what_it_is(capsys):
    terminal = Terminal(Conversations(experiment("ccm_merge", comp_tokens=2)), max_tokens=2)
    terminal.say("hi", {})
    terminal.command("/memory")
    assert "ccm_merge: its 2 slots are of all turns together" in capsys.readouterr().out
    with pytest.raises(UserError, match="blends all turns"):
        terminal.command("/forget 1")


def test_what_a_model_writes_gives_a_terminal_no_orders():
    assert printable("a\x1b[2Jb\tc\nd\x07") == "a\ufffd[2Jb\tc\nd\ufffd"
