"""Every recorded array of the reference implementation, by the code of `tests.golden_check`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jax_ccm.numerics import Precision, precision
from jax_ccm.weights import load_model
from tests import golden_check

FOLDER = Path(__file__).parent / "golden" / "ccm"
# Recorded integers must be equal; greedy tokens are integers, too.


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.npz")), ids=lambda path: path.stem)
def test_case(path):
    found = dict(golden_check.check(path))
    assert set(found) == set(np.load(path).files)
    wrong = {name: value for name, value in found.items() if not value <= golden_check.TOLERANCE}
    assert not wrong


@pytest.mark.parametrize(
    ("name", "method", "adapter", "merged"),
    [
        ("concat_recur_n1", "ccm_concat", "concat_n1", None),
        ("merge_norecur_n2", "ccm_merge", "merge_n2", None),
        ("merge_recur_n1_sink", "ccm_merge", "merge_n1", None),
        ("gist_n2", "gist", "gist_n2", None),
        ("concat_recur_n2_loadpath", "ccm_concat", "concat_n2", "full_lora"),
        ("mistral_gqa_merge_recur_n2", "ccm_merge", "mistral_merge_n2", None),
        ("full_context", "full", "full_lora", None),
        ("stream_merge_n1_fixed", "ccm_merge", "merge_n1", None),
        ("stream_window_only", "streaming_llm", None, None),
    ],
)
def test_names(name, method, adapter, merged):
    case = golden_check.parse(name)
    assert (case.method.name, case.adapter, case.merged) == (method, adapter, merged)
    assert case.method.sink == ("sink" in name or "stream" in name)
    if "recur" in name:
        assert case.method.sees_memory_in_context == ("norecur" not in name)


@pytest.mark.parametrize(
    "name", ["concat_n2", "merge_sideways_n2", "gist_recur_n1", "stream_gist_n1", "concat_recur_n2_flip"]
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match="not understood|chunk mode|no chunk"):
        golden_check.parse(name)


def test_numbers_are_compared_in_float32(monkeypatch):
    """Also where the library would choose products of bfloat16."""
    monkeypatch.setattr(precision, "processor_flags", lambda: frozenset(["avx512_bf16"]))
    case = golden_check.parse("no_context")
    assert load_model(str(FOLDER / case.base)).precision != Precision.of("float32")
    assert golden_check.load(FOLDER, case).precision == Precision.of("float32")


def test_a_wrong_number_fails(tmp_path, capsys):
    """The check can fail: a changed cell and an unknown case are reported, and the exit status is 1."""
    for name in ("tiny-llama", "adapters"):
        (tmp_path / name).symlink_to(FOLDER / name)
    data = dict(np.load(FOLDER / "no_context.npz"))
    data["logits"][0, -1, 3] += 1e-2
    data["position_ids"][0, -1] += 1
    np.savez(tmp_path / "no_context.npz", **data)
    np.savez(tmp_path / "concat_n9.npz", **data)
    assert golden_check.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[:2] for line in lines if "FAIL" in line]
    assert failed == [["concat_n9", "FAIL"], ["no_context", "position_ids"], ["no_context", "logits"]]
    assert golden_check.main([str(tmp_path / "nothing")]) == 2
