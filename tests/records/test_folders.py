"""Folders are replaced as a whole, whoever dies in between, and whoever writes them at the same time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_ccm.records import folders, paths


def fill(text):
    """Writes two files that belong together."""

    def write(folder):
        (folder / "below").mkdir()
        for name in ("a", "below/b"):
            (folder / name).write_text(text)

    return write


def content(folder):
    """What the files say, which must be the same; None without a folder."""
    if not folder.exists():
        return None
    (text,) = {(folder / name).read_text() for name in ("a", "below/b")}
    return text


KILLED = """
import os, sys
from pathlib import Path
from jax_ccm.records import folders
from tests.records.test_folders import fill

rename, calls = Path.rename, []

def dying(path, target):
    # 9: as if by kill, which runs no `finally`.
    calls.append(path)
    if len(calls) == int(sys.argv[2]):
        os._exit(9)
    return rename(path, target)

Path.rename = dying
folders.replace(Path(sys.argv[1]), fill("new"))
"""


@pytest.mark.parametrize("number, left", [(1, "old"), (2, "old"), (3, None)])
def test_a_kill_at_a_rename(tmp_path, number, left):
    """Before the first, and between those that put one folder aside and the other in its place."""
    folder = tmp_path / "it"
    folders.replace(folder, fill("old"))
    died = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(number)], cwd=Path(__file__).parents[2])
    assert died.returncode == 9 and content(folder) == left
    folders.recover(folder)
    assert content(folder) == "old"
    folders.replace(folder, fill("newer"))
    assert content(folder) == "newer" and [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("aside", [".it.old-4711", ".it.old", ".it.old-47.11"])
def test_what_earlier_versions_left_is_found(tmp_path, aside):
    """When it is written again, too: it is not taken for something new."""
    for name, text in ((aside, "old"), (".it.new-4711", "half"), (".it.older", "x"), (".it.old-x", "x"), ("item", "x")):
        fill(text)(tmp_path / name) if (tmp_path / name).mkdir() is None else None
    seen = []
    folders.replace(tmp_path / "it", lambda new: (seen.append(content(tmp_path / "it")), fill("new")(new)))
    assert seen == ["old"] and content(tmp_path / "it") == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"it", "item", ".it.older", ".it.old-x"}


def test_two_that_write_one_folder(tmp_path, monkeypatch):
    """Another one comes at any point; neither fails, nothing is mixed, and the last counts."""
    folder, rename, others = tmp_path / "it", Path.rename, ["while it is written", "at its renames"]

    def another(*_):
        # As from another process: under other names.
        with monkeypatch.context() as patch:
            patch.setattr(folders.os, "getpid", lambda: 1)
            folders.replace(folder, fill(others.pop()))

    def interfering(path, target):
        if others and target == folder:
            another()
        return rename(path, target)

    def write(new):
        fill("mine")(new)
        another()
        assert content(folder) == "at its renames" and content(new) == "mine"
        monkeypatch.setattr(Path, "rename", interfering)

    folders.replace(folder, write)
    assert content(folder) == "mine" and not others and [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_reader_between_the_renames(tmp_path, monkeypatch):
    """It finds what was there, and the writer goes on."""
    folder, rename, seen = tmp_path / "it", Path.rename, []
    folders.replace(folder, fill("old"))

    def read_between(path, target):
        made = rename(path, target)
        if not folder.exists() and len(seen) < 3:
            folders.recover(folder)
            seen.append(content(folder))
        return made

    monkeypatch.setattr(Path, "rename", read_between)
    folders.replace(folder, fill("new"))
    assert seen == ["old"] * 3 and content(folder) == "new" and [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("fails", ["write", "rename", "fsync"])
def test_a_disk_that_fails(tmp_path, monkeypatch, fails):
    folder, rename = tmp_path / "it", Path.rename
    folders.replace(folder, fill("old"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = {"write": full}.get(fails, fill("new"))
    if fails == "rename":  # the second: the old one is aside
        monkeypatch.setattr(Path, "rename", lambda a, b: full() if not folder.exists() else rename(a, b))
    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folders.replace(folder, write)
    monkeypatch.undo()
    folders.recover(folder)
    assert content(folder) == "old" and len([path for path in tmp_path.iterdir() if ".new" in path.name]) == 0


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "it").symlink_to(tmp_path / "disk" / "there")
    for text in ("old", "new"):
        folders.replace(tmp_path / "it", fill(text))
        assert content(tmp_path / "disk" / "there") == content(tmp_path / "it") == text
    (tmp_path / "disk" / "there").rename(tmp_path / "disk" / ".there.old-1")
    folders.recover(tmp_path / "it")
    assert content(tmp_path / "it") == "new" and (tmp_path / "it").is_symlink()


def test_all_is_on_disk_before_a_name_says_so(tmp_path, monkeypatch):
    """Files and the folders that name them, before the rename; and then the rename itself."""
    settled, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda number: (settled.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (settled.append("rename"), rename(a, b)))
    folders.replace(tmp_path / "it", fill("x"))
    before, after = settled[: settled.index("rename")], settled[settled.index("rename") + 1 :]
    assert sorted(path.partition("/.it.new-")[2].partition("/")[2] for path in before) == ["", "a", "below", "below/b"]
    assert after == [str(tmp_path)]
    settled.clear()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (settled.append("replace"), replace(a, b)))
    paths.write(tmp_path / "file", b"x")
    assert [path.rpartition("/")[2].partition("file")[0] for path in settled] == [".", "replace", tmp_path.name]
