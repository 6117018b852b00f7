"""What is recorded of kernels compiled for devices that are not here, and how it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jax_ccm.planning import ahead, gpus

RECORDS = Path(__file__).parents[2] / "results" / "kernels"
MIB = 2**20


@pytest.mark.parametrize(("name", "targets"), [("tpu", ahead.TOPOLOGIES), ("gpu", gpus.GPUS)])
def test_recorded_figures(name, targets):
    """What the design promises of every target: the kernel inside, and few temporaries."""
    rows = json.loads((RECORDS / f"{name}.json").read_text())["compiled"]
    found = {(row["target"], row["what"], row["length"]): row for row in rows}
    kernels = {"attention": 4, "layer": 4, "layer without attention": 0, "decode": 1, "training step": 4}
    assert all(row["kernels"] == kernels[what] for (_, what, _), row in found.items())
    size = lambda *program: found[program]["temporaries"] / MIB
    for target in targets:
        for length, alone, more in ((4096, 48, 64), (32768, 448, 512)):
            assert size(target, "attention", length) <= alone
            assert size(target, "layer", length) - size(target, "layer without attention", length) <= more
        assert size(target, "decode", 1) <= 16
        assert size(target, "training step", 1024) <= 6500


def test_record_keeps_other_targets(tmp_path, monkeypatch):
    """Those by the same jax; a target that is compiled again is replaced."""
    path = tmp_path / "some" / "tpu.json"
    sizes = iter([10, 20, 30])

    def compilations(mesh):
        yield "decode", 1, ahead.Compiled(next(sizes) * MIB, 1, 2.0)

    monkeypatch.setattr(ahead, "mesh_for", lambda target: None)
    monkeypatch.setattr(ahead, "compilations", compilations)
    for target in ("v5e", "v4", "v5e"):
        ahead.record(path, [target])
    kept = json.loads(path.read_text())
    assert [(row["target"], row["temporaries"] // MIB) for row in kept["compiled"]] == [("v4", 20), ("v5e", 30)]
    table = path.with_suffix(".md").read_text()
    assert "| decoding, 64 sessions with caches of 1,024 | 1 | 20.0 MiB, 2 s | 30.0 MiB, 2 s |" in table
    path.write_text(json.dumps(kept | {"jax": "0.1"}))
    sizes = iter([40])
    ahead.record(path, ["v4"])
    assert [row["temporaries"] // MIB for row in json.loads(path.read_text())["compiled"]] == [40]
