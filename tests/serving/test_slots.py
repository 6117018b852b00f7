"""Sessions saved, restored and erased as llama.cpp's slots are: what is said to be restored is there."""

from __future__ import annotations

import httpx
import pytest

from jax_ccm.errors import UserError
from jax_ccm.memory import files
from jax_ccm.serving.store import Store
from jax_ccm.sessions.conversations import Conversations
from tests.serving.clients import ask, serving, tokens_read
from tests.test_chat import experiment


def act(url, name, action, filename=None, **more):
    body = {"filename": filename, **more} if filename is not None else more or None
    return httpx.post(f"{url}/slots/{name}?action={action}", json=body)


def test_what_is_restored_is_there(client, url, server, oracle):
    """The next turn reads its own tokens alone and is answered as it would have been, in any session."""
    ask(client, "my name is Clara", "kept")
    told = tokens_read(url, "kept")
    saved = act(url, "kept", "save", "kept.bin").json()
    path = server[1].store.slot("kept.bin")
    assert saved.keys() == {"id_slot", "filename", "n_saved", "n_written", "timings"}
    assert saved["id_slot"] == "kept" and saved["filename"] == "kept.bin" and saved["n_saved"] == told
    assert saved["n_written"] == path.stat().st_size and saved["timings"]["save_ms"] > 0
    ask(client, "forget it all", "kept")
    erased = act(url, "kept", "erase")
    assert erased.json() == {"id_slot": "kept", "n_erased": pytest.approx(told, abs=40)}
    assert erased.json()["n_erased"] > told and act(url, "kept", "erase").status_code == 404
    assert httpx.get(f"{url}/sessions/kept/memory").status_code == 404
    for name in ("kept", "another"):
        restored = act(url, name, "restore", "kept.bin").json()
        assert restored.keys() == {"id_slot", "filename", "n_restored", "n_read", "timings"}
        assert restored["id_slot"] == name and restored["n_restored"] == told
        assert restored["n_read"] == saved["n_written"] and restored["timings"]["restore_ms"] > 0
        assert tokens_read(url, name) == told
        reply = ask(client, "what", name)
        assert reply.choices[0].message.content == oracle(["my name is Clara", "what"])[1]
        usage = reply.usage
        assert usage.prompt_tokens_details.cached_tokens == told and usage.prompt_tokens - told <= len("what") + 9
    # The logits are those of the file, bit by bit.
    act(url, "another", "restore", "kept.bin")
    pending = [files.read(x).arrays["logits"].tobytes() for x in (server[1].store.path("another"), path)]
    assert pending[0] == pending[1]


def test_slots_are_the_sessions_that_have_a_row(client, url):
    ask(client, "hello", "seen")
    first = client.responses.create(model="tiny", input="I am Ann")
    slots = {slot["id"]: slot for slot in httpx.get(f"{url}/slots").json()}
    assert slots["seen"]["n_past"] == tokens_read(url, "seen") and slots["seen"]["is_processing"] is False
    assert slots["seen"]["n_ctx"] >= 24 and len(slots) <= 2 and first.id not in slots


def test_a_name_is_a_name_and_never_a_path(client, url, server):
    ask(client, "hello", "path")
    before = sorted(server[1].store.folder.parent.rglob("*"))
    for filename in ("../x", "/etc/passwd", "a/b", "..", ".hidden", ".lock", "", "x" * 129, "a\\b", "a\x00b", "é", 3):
        for action in ("save", "restore"):
            refused = act(url, "path", action, filename)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "filename", refused.text
    assert sorted(server[1].store.folder.parent.rglob("*")) == before


def test_what_cannot_be_restored_changes_nothing(client, url, server, tmp_path):
    """A file that is not there, damaged, of another method, or no memory; and what is no memory is not overwritten."""
    ask(client, "hello", "same")
    before = httpx.get(f"{url}/sessions/same/memory").content
    slot = server[1].store.slot
    slot("cut.bin").write_bytes(before[:-1] + b"?")
    slot("notes.txt").write_bytes(b"dear diary")
    other = Conversations(experiment("ccm_concat", comp_tokens=1))
    other.say({0: "hi"}, max_tokens=2)
    other.save(0, slot("other.bin"))
    for filename, status in (("gone.bin", 404), ("cut.bin", 400), ("notes.txt", 400), ("other.bin", 409)):
        refused = act(url, "same", "restore", filename)
        assert refused.status_code == status and filename in refused.json()["error"]["message"], refused.text
        assert str(slot(filename).parent) not in refused.text
    assert act(url, "same", "save", "notes.txt").status_code == 400 and slot("notes.txt").read_bytes() == b"dear diary"
    assert httpx.get(f"{url}/sessions/same/memory").content == before
    assert act(url, "nobody", "save", "x.bin").status_code == 404 and not slot("x.bin").exists()
    for refused, param in (
        (act(url, "same", "destroy"), "action"),
        (act(url, "same", "save"), "filename"),
        (act(url, "same", "save", "x.bin", compress=True), "compress"),
        (act(url, "resp_1", "erase"), "session_id"),
        (act(url, "same", "erase", "x.bin"), "filename"),
    ):
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
    assert httpx.get(f"{url}/sessions/same/memory").content == before


def test_without_a_folder_there_is_no_saving(made, tmp_path):
    with pytest.raises(UserError, match="give two folders"):
        Store(tmp_path, tmp_path / "x" / "..")
    store = Store(tmp_path, tmp_path / "slots")
    try:
        with pytest.raises(UserError, match="give another --slot_save_path"):
            Store(tmp_path / "other", tmp_path / "slots")
    finally:
        store.close()
    with serving(made, tmp_path / "other") as (url, _):
        for action in ("save", "restore"):
            refused = act(url, "clara", action, "clara.bin")
            assert refused.status_code == 501 and "--slot_save_path" in refused.json()["error"]["message"]
        assert act(url, "clara", "erase").status_code == 404
