"""The converter: through all formats and back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_ccm import convert
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.weights.adapters import detect_format, read_adapter

GOLDEN = Path(__file__).parent / "golden" / "ccm" / "adapters"
MERGE = ["--method", "ccm_merge", "--comp_tokens", "2"]


def test_through_all_formats_and_back(tmp_path, capsys):
    start = read_adapter(GOLDEN / "merge_n2", method=build("ccm_merge", comp_tokens=2))
    source, arguments = GOLDEN / "merge_n2", MERGE
    for i, format in enumerate(["own", "peft", "reference", "own"]):
        target = tmp_path / f"{i}"
        convert.main([str(source), str(target), "--format", format, *arguments])
        assert "method ccm_merge (2 tokens); base model unknown" in capsys.readouterr().out
        assert detect_format(target) == format
        source, arguments = target, []
    end = read_adapter(source)
    assert end.config == start.config and end.method == start.method
    for name, x in start.arrays.items():
        np.testing.assert_array_equal(end.arrays[name], x, err_msg=name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "does not say the method"),
        (["--comp_tokens", "2"], "name it: --method"),
        (["--method", "ccm_mrge"], "unknown method 'ccm_mrge'; did you mean 'ccm_merge'"),
        (["--method", "ccm_merge", "--comp_tokens", "3"], "has 4 rows"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        convert.main([str(GOLDEN / "merge_n2"), str(tmp_path / "x"), *arguments])
    assert not (tmp_path / "x").exists()


def test_onto_itself_is_refused():
    with pytest.raises(UserError, match="source and target are both"):
        convert.main([str(GOLDEN / "merge_n2"), str(GOLDEN / "concat_n2" / ".." / "merge_n2"), *MERGE])


def test_exit_codes(tmp_path):
    command = [sys.executable, "-m", "jax_ccm.convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: adapter") and "Traceback" not in done.stderr
