"""Files that users keep, written by earlier versions, load and give the numbers that they gave then."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jax_ccm.config.loading import load_experiment
from jax_ccm.config.schema import load_config
from jax_ccm.memory import files
from jax_ccm.memory.cache import check
from tests.golden.formats import record

FOLDER = Path(__file__).parent / "golden" / "formats"
ARCHIVES = sorted(FOLDER.glob("*/*.tar.gz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: f"{path.parent.name}-{path.name.removesuffix('.tar.gz')}")
def folder(request, tmp_path):
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    if request.param.parent.name == "memory_2":
        (tmp_path / ".second").touch()
    return tmp_path / request.param.name.removesuffix(".tar.gz")


def test_adapter_and_memory(folder, capsys):
    """A session goes on from its memory file, with the adapter that wrote it."""
    expected = json.loads((folder / "expected.json").read_text())
    experiment = load_experiment(load_config(folder / "config.yaml"), adapter=folder / "adapter")
    assert "the method in" in capsys.readouterr().err, "the names that tokens had are said"
    path = folder / "memory.safetensors"
    second = folder.parent.joinpath(".second").exists()
    rounded = experiment.method.mix and not second
    older = "which rounded mixed memory to float32" if rounded else rf"memory/{1 + second}\), without a digest"
    with pytest.warns(UserWarning, match=f"is of an earlier version.*{older}"):
        cache = files.load(path, experiment.model, fingerprints=record.FINGERPRINTS, method=experiment.method)
    check(cache)
    assert cache.chunks.tolist() == [3, 3] and cache.tokens.tolist() == [16, 16]
    np.testing.assert_allclose(record.answer(experiment, cache), expected["logits"], atol=1e-5)


def test_checkpoint(folder, tmp_path):
    """A run goes on from its checkpoint."""
    expected = json.loads((folder / "expected.json").read_text())
    assert record.go_on(folder, tmp_path / "further") == pytest.approx(expected["loss"], rel=1e-5)
