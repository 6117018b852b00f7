"""What the store says of its folders without a look at them is what lies there, whatever was done."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from jax_ccm.errors import UserError
from jax_ccm.records import paths, sealed
from jax_ccm.serving.store import Store, Unkept
from tests.serving.clients import staying

SESSIONS = ["ann", "ben"]
NAMES = [*SESSIONS, "resp_1", "resp_2", "resp_3"]
FILES = ["a.bin", "b.bin"]


def write(path, session, size):
    about = {"session": session} if session else {}
    sealed.write(path, {"k": np.zeros(size, np.uint8)}, {"about": about}, "jax_ccm")


def fails(*_):
    raise OSError(errno.EIO, "Input/output error")


class Full(Exception):
    """What a disk says."""


class Folders(RuleBasedStateMachine):
    """A store, and another one that looks at the same folders for the first time."""

    def __init__(self):
        super().__init__()
        place = self.place()
        self.folder, self.slots = place / "sessions", place / "slots"
        self.store = Store(self.folder, self.slots)

    def place(self):
        raise NotImplementedError

    @rule(name=st.sampled_from(NAMES), session=st.sampled_from([None, *SESSIONS]), size=st.integers(1, 99))
    def writes(self, name, session, size):
        with self.store.writing(name, session if name.startswith("resp_") else None) as path:
            write(path, session, size)

    @rule(name=st.sampled_from(FILES), session=st.sampled_from(SESSIONS), size=st.integers(1, 99))
    def saves(self, name, session, size):
        with self.store.saving(name, session) as path:
            write(path, session, size)

    @rule(name=st.sampled_from(NAMES), filename=st.sampled_from(FILES), session=st.sampled_from(SESSIONS))
    def fails(self, name, filename, session):
        for writing in (self.store.writing(name, session), self.store.saving(filename, session)):
            with pytest.raises(Full), writing:
                raise Full

    @rule(name=st.sampled_from(NAMES), filename=st.sampled_from(FILES), session=st.sampled_from(SESSIONS))
    def writes_in_vain(self, name, filename, session):
        """What is there stays, whole; and a file of another name that is there in the end counts."""
        for writing in (self.store.writing(name, session), self.store.saving(filename, session)):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Unkept, match="cannot be written"):
                patch.setattr(sealed.os, "replace", fails)
                with writing as path:
                    write(path, session, 99)

    @rule(name=st.sampled_from(NAMES), filename=st.sampled_from(FILES), session=st.sampled_from(SESSIONS))
    def writes_and_fails_then(self, name, filename, session):
        """The file is there, and only then something fails: that it is on disk cannot be told."""
        of_it = session if name.startswith("resp_") else None
        for writing, of in ((self.store.writing(name, of_it), of_it), (self.store.saving(filename, session), session)):
            with pytest.raises(UserError, match="cannot be written"), pytest.MonkeyPatch.context() as patch:
                patch.setattr(paths, "settle", fails)
                with writing as path:
                    write(path, of, 50)

    @rule(name=st.sampled_from(NAMES), session=st.sampled_from(SESSIONS))
    def removes_in_vain(self, name, session):
        saved = [path for path in self.slots.glob("[!.]*") if said(path) == session]
        with staying():
            if name in self.store:
                with pytest.raises(Unkept, match=f"{name}.ccm cannot be removed"):
                    self.store.remove(name)
            else:
                assert not self.store.remove(name)
            if saved:
                with pytest.raises(Unkept, match="bin cannot be removed"):
                    self.store.remove_saved(session)
            else:
                assert not self.store.remove_saved(session)

    @rule(name=st.sampled_from(NAMES))
    def removes(self, name):
        there = name in self.store
        assert self.store.remove(name) == there and name not in self.store

    @rule(name=st.sampled_from(NAMES))
    def uses(self, name):
        self.store.touch(name)
        if name in self.store:
            assert self.store.older(-3600)[-1] == name

    @rule(session=st.sampled_from(SESSIONS), by_hand=st.booleans())
    def forgets(self, session, by_hand):
        if by_hand:  # somebody carries a file in, under a name that no client may give
            write(self.slots / "by hand.bin", session, 3)
        of_it = [path for path in self.slots.glob("[!.]*") if said(path) == session]
        assert self.store.remove_saved(session) == bool(of_it) and not any(path.exists() for path in of_it)

    @rule()
    def is_killed(self):
        (self.folder / ".resp_9.ccm.1.2.tmp").write_bytes(b"half a file")
        (self.folder / "notes.txt").write_bytes(b"no session")
        self.store.close()
        self.store = Store(self.folder, self.slots)

    @invariant()
    def is_what_lies_there(self):
        paths = {path.stem: path for path in self.folder.glob("*.ccm")}
        saved = sum(path.stat().st_size for path in self.slots.glob("[!.]*"))
        assert sorted(self.store.names()) == sorted(self.store.older(-3600)) == sorted(paths)
        assert self.store.size() == (len(paths), sum(path.stat().st_size for path in paths.values()) + saved)
        assert self.store.older(3600) == []
        used = [paths[name].stat().st_mtime_ns for name in self.store.names()]
        assert used == sorted(used), "the longest idle comes first"
        for session in SESSIONS:
            expected = {name for name, path in paths.items() if name.startswith("resp_") and said(path) == session}
            assert set(self.store.made_in(session)) == expected

    def teardown(self):
        self.store.close()


def said(path):
    """The session that a file names."""
    return sealed.Sealed(path, "jax_ccm").header["about"].get("session")


def test_what_is_known_of_the_folders_is_what_lies_there(tmp_path_factory):
    class Here(Folders):
        def place(self):
            return tmp_path_factory.mktemp("store")

    run_state_machine_as_test(
        Here, settings=settings(max_examples=25, stateful_step_count=25, deadline=None, database=None, derandomize=True)
    )


def test_sessions_are_counted_and_found_without_a_look_at_the_folder(tmp_path, monkeypatch):
    """With thousands of them a look takes longer than a token."""
    store = Store(tmp_path)
    try:
        for name, session in (("ann", None), ("resp_1", "ann"), ("resp_2", None)):
            with store.writing(name, session) as path:
                write(path, session, 9)
        for name in ("scandir", "listdir"):
            monkeypatch.setattr(os, name, lambda *_: pytest.fail("looked at the folder"))
        assert store.size()[0] == 3 and store.made_in("ann") == ["resp_1"] and store.older(3600) == []
        assert store.remove("resp_1") and store.size()[0] == 2
    finally:
        store.close()
