"""From a config to objects: what ``model.precision: auto`` becomes."""

from __future__ import annotations

import pytest

from jax_ccm.config.loading import with_precision
from jax_ccm.config.schema import from_mapping
from jax_ccm.numerics import precision


@pytest.mark.parametrize(
    ("platform", "flags", "trainable", "becomes"),
    [
        ("tpu", (), "adapter", "bfloat16"),
        ("gpu", (), "all", "params=float32,compute=bfloat16,output=bfloat16"),
        ("cpu", ("avx512_bf16",), "adapter", "mixed"),
        ("cpu", ("avx512_bf16",), "all", "params=float32,compute=bfloat16,output=float32"),
        ("cpu", ("avx2",), "adapter", "float32"),
    ],
)
def test_auto_is_resolved_once_and_said(platform, flags, trainable, becomes, monkeypatch, capsys):
    monkeypatch.setattr(precision, "processor_flags", lambda: frozenset(flags))
    config = from_mapping({"train": {"trainable": trainable}})
    found = with_precision(config, platform)
    assert found.model.precision == becomes
    assert f"model.precision: {becomes} (auto on {platform}: " in capsys.readouterr().out
    assert with_precision(found, platform) is found
    assert not capsys.readouterr().out
