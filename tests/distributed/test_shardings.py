"""Every sharding and every collective stands in a small file: a change that adds an exchange shows in review."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

from tests.distributed import shardings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.shardings"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", sorted(shardings.FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_golden(made, path):
    if path.name not in made:
        pytest.skip(f"recorded with jaxlib {shardings.JAXLIB}; this is {jaxlib.__version__}")
    assert made[path.name] == path.read_text(), (
        "look at the difference; if it is meant: python -m tests.distributed.shardings write"
    )


def test_every_text_has_a_file(made):
    assert {path.name for path in shardings.FOLDER.glob("*.txt")} >= set(made)
