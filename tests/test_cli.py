"""What the commands share: compiled programs that are kept on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json
import jax
from jax_ccm import cli
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
