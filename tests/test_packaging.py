"""The wheel and the source archive hold all that the commands need, away from the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from jax_ccm.config.adapters import open_config
from jax_ccm.training.run import Run
from tests import pretrained
from tests.test_imports import COMMANDS

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def test_adapters_that_ship_are_whole():
    """Each has its config and card, in a file that may be shipped."""
    for folder in {path.parent for path in (ROOT / "adapters").glob("*/*")}:
        assert {"adapter.json", "adapter.safetensors", "config.yaml", "README.md"} == {x.name for x in folder.iterdir()}
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6
        config = open_config(str(folder))
        assert config.card.license and config.card.data and config.card.limits and config.model.source


def test_all_packages_are_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.relative_to(ROOT).parts for path in (ROOT / "jax_ccm").glob("**/") if path.name != "__pycache__"]
    # Those of other names hold data alone, and belong to the package around them.
    found = {".".join(parts) for parts in folders if all(part.isidentifier() for part in parts)}
    assert sorted(listed) == sorted({*found, "jax_ccm.adapters"})


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What a fresh clone holds, with one more adapter that ships; beside it the base of that."""
    folder = tmp_path_factory.mktemp("built")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("this is no git checkout")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "results/")):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    pretrained.make_base(folder / "base")
    Run(pretrained.config(folder), folder / "run").train()
    shutil.copytree(folder / "run" / "adapter", folder / "tree" / "adapters" / "tiny-made")
    return folder / "tree"


def build(tree: Path, kind: str) -> Path:
    """A wheel or sdist of a source tree."""
    made = tree.parent / f"{kind}-of-{tree.name}"
    subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", str(made)], cwd=tree, check=True, capture_output=True)
    (file,) = made.iterdir()
    return file


@pytest.mark.slow
def test_wheel_and_sdist_in_an_empty_folder(tree, tmp_path):
    """Both give the same wheel; its commands start, an adapter is found by name and talks, types are declared."""
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is too old to build the package")
    wheel, sdist = build(tree, "wheel"), build(tree, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel")
    content = lambda file: {name: zipfile.ZipFile(file).read(name) for name in zipfile.ZipFile(file).namelist()}
    code = {name: data for name, data in content(wheel).items() if name.startswith("jax_ccm/")}
    assert code == {name: data for name, data in content(again).items() if name.startswith("jax_ccm/")}
    mapped = {"adapters": "jax_ccm/adapters", "jax_ccm": "jax_ccm"}
    expected = {
        f"{there}/{path.relative_to(tree / here)}"
        for here, there in mapped.items() for path in (tree / here).rglob("*") if path.is_file()
    }  # fmt: skip
    assert set(code) == expected and {"jax_ccm/py.typed", "jax_ccm/serving/page.html"} <= set(code)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}

    def call(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    code, text = call("-c", "import jax_ccm; print(jax_ccm.__file__)")
    assert code == 0 and text.startswith(str(tmp_path / "site")), text
    for command in sorted(COMMANDS):
        code, text = call("-m", f"jax_ccm.{command}", "--help")
        assert code == 0 and f"jax_ccm.{command}" in text, (command, text)
    code, text = call("-m", "jax_ccm.chat", "tiny-made", "--max_tokens", "2", "--say", "hi")
    assert code == 0 and "slots" in text, text
    code, text = call("-m", "jax_ccm.chat", "tiny-mde", "--say", "hi")
    assert code == 2 and re.search(r"comes with jax_ccm \(.*tiny-made\)", text), text
