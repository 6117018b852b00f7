"""JSON from outside is used, or refused with the file that holds it: never a traceback."""

from pathlib import Path

import pytest

from jax_ccm.config.yaml import read_yaml
from jax_ccm.errors import UserError
from jax_ccm.evals import comparison
from jax_ccm.methods import build
from jax_ccm.planning.report import write_overview
from jax_ccm.records.parsing import parse_json, require_text
from jax_ccm.weights import read_config
from jax_ccm.weights.adapters import Adapter
from jax_ccm.weights.hf import Safetensors

BAD = {
    "cut": b'{"a": ',
    "deep": b"[" * 100_000,
    "a deep field": b'{"a": ' * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
    "a huge number": b"9" * 5000,
    "a list": b"[1]",
    "nothing": b"",
}
READERS = {
    "config.json": read_config,
    "adapter_config.json": lambda path: Adapter.read(path, method=build("ccm_concat")),
    "adapter.json": lambda path: Adapter.read(path, method=build("ccm_concat")),
    "results.json": comparison.load,
    "plan.json": write_overview,
    "model.safetensors.index.json": Safetensors,
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_no_json_of_ours_is_named(tmp_path: Path, name: str, bad: str):
    for other in {"adapter.json": ["adapter.safetensors"]}.get(name, []):
        (tmp_path / other).write_bytes(b"")
    (tmp_path / name).write_bytes(BAD[bad])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        READERS[name](tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"[" * 5000, b"a: " + b"9" * 5000, b"a: 2020-13-45", b"a: \xff", b"\x00", b"[1]", b"a: 1\na: 2"],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_yaml(tmp_path / "config.yaml")


def test_values_are_read():
    assert parse_json('\ufeff{"a": [1, 2.5, "é", null, true]}'.encode(), "x") == {"a": [1, 2.5, "é", None, True]}
    assert parse_json("9" * 300, "x") == int("9" * 300) and parse_json("9" * 5000, "x") == float("inf")
    twice = parse_json('{"a": 1, "b": 2, "a": 3}', "x")
    assert twice == {"a": 3, "b": 2} and twice.keys_twice == {"a"}
    require_text("😀 \ue000", "x")
    with pytest.raises(UserError, match=r"x holds half a character \(\\udfff at place 1\)"):
        require_text("a\udfff", "x")
