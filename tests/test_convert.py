"""The converter: through all formats and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_ccm import convert
from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.weights.adapters import Adapter, format_of
from jax_ccm.weights.peft_modules import NOTE

GOLDEN = Path(__file__).parent / "golden" / "ccm" / "adapters"
MERGE = ["--method", "ccm_merge", "--comp_tokens", "2"]


def test_through_all_formats_and_back(tmp_path, capsys):
    start = Adapter.read(GOLDEN / "merge_n2", method=build("ccm_merge", comp_tokens=2))
    source, arguments = GOLDEN / "merge_n2", MERGE
    for i, format in enumerate(["own", "peft", "reference", "own"]):
        target = tmp_path / f"{i}"
        convert.main([str(source), str(target), "--format", format, *arguments])
        assert "method ccm_merge (2 tokens); base model unknown" in capsys.readouterr().out
        assert format_of(target) == format
        source, arguments = target, []
    end = Adapter.read(source)
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


def test_a_folder_whose_name_is_no_text(tmp_path):
    """File names are bytes: the card says those that are no character as escapes."""
    target = tmp_path / os.fsdecode(b"caf\xe9")
    convert.main([str(GOLDEN / "merge_n2"), str(target), *MERGE])
    assert "# caf\\udce9" in (target / "README.md").read_text(encoding="utf-8") and format_of(target) == "own"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """Whatever the system says of it, and not the name beside it under which it is written."""
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "x", Path("/proc/x"), Path("/sys/x")):
        with pytest.raises(UserError, match=f"^{target} cannot be written: .*; give a folder that can be"):
            convert.main([str(GOLDEN / "merge_n2"), str(target), *MERGE])


def test_exit_codes(tmp_path):
    command = [sys.executable, "-m", "jax_ccm.convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: adapter") and "Traceback" not in done.stderr


def test_a_conditional_lora_for_peft_says_what_peft_would_do(tmp_path, capsys):
    """PEFT loads it without a word and runs it on all tokens: the converter says so, and so does PEFT for our field.

    Seen with PEFT 0.21.2: "UserWarning: Unexpected keyword arguments ['jax_ccm__this_LoRA_acts_on_...'] for class
    LoraConfig, these are ignored. ...", and nothing at all without the field.
    """
    fields = lambda path: json.loads((path / "adapter_config.json").read_text())
    for name, conditional, said in (
        ("conditional", "True", "acts on compression tokens only, and PEFT would run it on all tokens"),
        ("everywhere", "False", "PEFT passes over the embeddings of compression tokens"),
    ):
        arguments = [str(tmp_path / name), "--format", "peft", *MERGE, "--conditional", conditional]
        convert.main([str(GOLDEN / "merge_n2"), *arguments])
        assert said in capsys.readouterr().out
        assert (NOTE in fields(tmp_path / name)) == (conditional == "True")
        assert Adapter.read(tmp_path / name).method["gate"]
    convert.main([str(tmp_path / "conditional"), str(tmp_path / "own")])
    convert.main([str(tmp_path / "conditional"), str(tmp_path / "reference"), "--format", "reference"])
    assert "note" not in capsys.readouterr().out and NOTE not in fields(tmp_path / "reference")
