"""What is typed between turns: the memory shown, saved, brought back, copied, forgotten and compared."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.terminal import OTHER, Terminal, printable
from jax_ccm.sessions.turns import Reply
from tests.sessions.test_conversations import row
from tests.test_chat import experiment


@pytest.fixture(scope="module")
def made():
    return experiment("ccm_concat", comp_tokens=2)


@pytest.fixture
def terminal(made):
    return Terminal(Conversations(made), max_tokens=4)


@pytest.mark.once
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
    assert lines[0].startswith("memory    0.0") and lines[-1].startswith("nothing   0.00 MiB  ")
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
    assert shown().count("\n/") == 8
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
        (f"/save {'n' * 300}.ccm", "n.ccm cannot be written: .*File name too long"),
        (f"/load {'n' * 300}.ccm", "n.ccm cannot be read: .*File name too long"),
        ("/save a\0b.ccm", "cannot be written: embedded null byte"),
        ("/load a\0b.ccm", "cannot be read: embedded null byte"),
        (f"/load {tmp_path / 'none'}", "none cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            terminal.command(line)
        assert talk.state is before


def test_what_is_asked_beside_the_conversation_leaves_no_trace(terminal, monkeypatch):
    """Each of the four answers is that of a session with just that past; bytes are those before the question."""
    talk, ask = terminal.talk, "what is my name"
    made = []
    monkeypatch.setattr("jax_ccm.sessions.terminal.Conversations", lambda *given, **more: made.append(given) or
                        Conversations(*given, **more))  # fmt: skip
    for count, said in enumerate(("my name is Clara", "hello"), start=1):
        terminal.say(said, entry := {})
        before, last, compared = row(talk, 0), terminal._last, {}
        terminal.command(f"/compare {ask}", compared)
        assert all(map(np.array_equal, row(talk, 0), before)) and terminal._last is last
        assert len(talk.state.turns[0]) == count
        again = {}
        terminal.command(f"/compare {ask}", again)
        assert again == compared and list(compared["compared"]) == ["memory", "full", "another", "nothing"]
        held = {name: answer["bytes"] for name, answer in compared["compared"].items()}
        assert held["memory"] == entry["memory_bytes"] and held["another"] > held["nothing"] == 0
    assert len(made) == 1, "the room for full context is made once"
    past = terminal._past
    replies = {name: answer["reply"] for name, answer in compared["compared"].items()}
    assert replies["memory"] == talk.say({0: ask}, max_tokens=4)[0]
    assert replies["nothing"] == talk.say_alone({0: ask}, max_tokens=4)[0]
    other = Conversations(talk.engine.experiment)
    other.tell({0: OTHER})
    assert replies["another"] == other.say({0: ask}, max_tokens=4)[0]
    full = Conversations(*made[0])
    full.tell({0: past})
    assert held["full"] == full.memory_bytes()[1] > held["memory"]
    assert replies["full"] == full.say({0: ask}, max_tokens=4)[0]


def test_a_question_may_come_first(terminal):
    """Before anything was said all memories but another conversation's are empty."""
    terminal.command("/compare who are you", entry := {})
    held = {name: answer["bytes"] for name, answer in entry["compared"].items()}
    assert held["another"] > 0 and {held["memory"], held["full"], held["nothing"]} == {0}
    assert len({entry["compared"][name]["reply"] for name in ("memory", "nothing")}) == 1
    assert terminal.talk.memory_bytes()[0] == 0


def test_what_does_not_end_or_has_several_lines_is_seen_to(terminal, monkeypatch, capsys):
    replies = [[Reply("one\n", 1, 1, 0)], [Reply("one\ntwo", 2, 1, 0, ended="length")]]
    monkeypatch.setattr(terminal.talk, "replies", lambda *given: iter(replies))
    terminal._reply(terminal.talk, "hi", "memory   ")
    assert capsys.readouterr().out == "memory   one\n         two ...\n"


@pytest.mark.once
def test_a_mixture_shows_what_it_is(capsys):
    terminal = Terminal(Conversations(experiment("ccm_merge", comp_tokens=2)), max_tokens=2)
    terminal.say("hi", {})
    terminal.command("/memory")
    assert "ccm_merge: its 2 slots are of all turns together" in capsys.readouterr().out
    with pytest.raises(UserError, match="blends all turns"):
        terminal.command("/forget 1")


def test_what_a_model_writes_gives_a_terminal_no_orders():
    assert printable("a\x1b[2Jb\tc\nd\x07") == "a\ufffd[2Jb\tc\nd\ufffd"
    printable("not UTF-8: \udcff").encode()
