"""What the commands share: compiled programs that are kept on disk, and plain words for what a machine lacks."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

from jax_ccm.config import cli

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json
import jax
from jax_ccm.config import cli
found = {"hits": 0, "misses": 0}
def count(event, **_):
    name = event.removeprefix("/jax/compilation_cache/cache_")
    if name in found: found[name] += 1
jax.monitoring.register_event_listener(count)
def main():
    jax.block_until_ready(jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3))))
try: cli.run(main)
except SystemExit as stop:
    print(json.dumps({**found, "code": stop.code, "folder": jax.config.jax_compilation_cache_dir}))
"""


def run(folder: Path, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    # Loading a program must not be loud, as XLA is about one that was compiled for another processor.
    assert "machine" not in done.stderr.lower(), done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"err": done.stderr}


def test_programs_are_kept(tmp_path):
    """The second process takes from the disk what the first compiled; an empty variable turns it off."""
    first, second = run(tmp_path), run(tmp_path)
    assert (first["code"], second["code"]) == (0, 0)
    assert (
        Path(first["folder"]).is_relative_to(tmp_path / "jax_ccm" / "programs") and first["folder"] == second["folder"]
    )
    assert first["hits"] == 0 and second["hits"] > 0 and second["misses"] == 0
    # The user's word counts.
    elsewhere = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert elsewhere["folder"] == str(tmp_path / "mine") and elsewhere["hits"] == 0
    off = run(tmp_path, JAX_COMPILATION_CACHE_DIR="")
    assert not off["folder"] and off["hits"] == off["misses"] == 0


def test_a_folder_that_cannot_be_used_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    found = run(tmp_path / "file")
    assert found["code"] == 0 and "compiled programs are not kept" in found["err"] and not found["folder"]


def ends(main, capfd) -> tuple[int, str]:
    """The exit code of a command, and what it said on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    return stopped.value.code, capfd.readouterr().err


def test_a_user_without_name_and_home(tmp_path, monkeypatch, capfd):
    """Nothing below a command may ask for the home folder in vain."""
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def nameless(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nameless)
    with pytest.raises(RuntimeError):
        Path.home()
    code, err = ends(lambda: print(Path.home(), Path("~/models").expanduser()), capfd)
    assert code == 0 and "HOME is not set and user" in err and "Traceback" not in err
    assert Path.home().is_dir() and Path.home().parent == tmp_path


def test_a_home_that_somebody_else_made_is_not_taken(tmp_path, monkeypatch, capfd):
    """Compiled programs are loaded from there."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"home-{os.getuid()}").symlink_to(tmp_path / "theirs")
    code, _ = ends(lambda: 0, capfd)
    assert code == 0 and Path.home().parent == tmp_path
    assert not Path.home().is_symlink() and Path.home().resolve() != tmp_path / "theirs"


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, capfd):
    """Also where the folder is there already: root may write anywhere, so the write itself fails here."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        code, err = ends(lambda: 0, capfd)
        assert code == 0 and "compiled programs are not kept" in err
        assert not jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("platforms", "message"),
    [("cuda", "plugin for cuda is not installed here; pip install 'jax[cuda13]'"), ("gpu", "plugin for gpu is not"),
     ("rocm,cpu", "plugin for rocm is not"), ("gpus", "'gpus' is no platform. Allowed: cpu, cuda")],
)  # fmt: skip
def test_platforms_that_are_not_there(monkeypatch, capfd, platforms, message):
    monkeypatch.setattr(cli, "_modules", lambda package: set())
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    code, err = ends(lambda: 0, capfd)
    assert code == 2 and err.startswith("error: ") and message in err and "cpu" in err


def test_platforms_that_are_there(monkeypatch, capfd):
    monkeypatch.setattr(cli, "_modules", lambda package: {"xla_cuda12"})
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,gpu,cpu")
    assert ends(lambda: 0, capfd) == (0, "")
    monkeypatch.setattr(cli, "_modules", lambda package: {"metal_plugin"})
    monkeypatch.setenv("JAX_PLATFORMS", "METAL")
    assert ends(lambda: 0, capfd) == (0, "")


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(RuntimeError("Unable to initialize backend 'cuda': no GPU"), 2, "JAX finds no device .*JAX_PLATFORMS=cpu"),
     (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), 1, "/runs/x cannot be used .No space left"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/runs/y"), 1, "/runs/y cannot be used .File name too long"),
     (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/runs/file/x"), 1, "/runs/file/x cannot be used"),
     (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), 1, "/etc/x cannot be used .Permission denied")],
)  # fmt: skip
def test_what_the_machine_lacks_is_one_plain_line(capfd, error, code, message):
    found, err = ends(raising(error), capfd)
    assert found == code and re.search(message, err) and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(raising(RuntimeError("a bug")))


LINES = """
from jax_ccm.config import cli
def main():
    for i in range(100_000): print("line", i)
cli.run(main)
"""


def test_readers_that_leave_and_streams_that_are_closed(tmp_path):
    """``| head``, ``>&-`` and a full disk under the output: no traceback, and a code that tells."""
    python = f"exec {sys.executable} {tmp_path / 'lines.py'}"
    (tmp_path / "lines.py").write_text(LINES)
    left = f"({python}; ) | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    commands = {left: 141, f"{python} >&-": 0, f"{python} >/dev/full": 1}
    started = [
        subprocess.Popen(
            ["bash", "-c", text], stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        for text in commands
    ]
    for process, code in zip(started, commands.values(), strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == code and "Traceback" not in err and "Exception" not in err, err
        assert ("No space left" in err) == (code == 1)
