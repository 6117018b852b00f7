"""Policies of three types, read from text, and the table of what is fastest where."""

from __future__ import annotations

import pytest

from jax_ccm.errors import UserError
from jax_ccm.numerics import NAMED, Precision, automatic


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_read_and_written(name):
    assert str(Precision.of(name)) == name


def test_a_policy_without_a_name_is_read_and_written():
    text = "params=float32,compute=bfloat16,output=float32"
    assert Precision.of(text) == Precision("float32", "bfloat16", "float32")
    assert str(Precision.of(text)) == text


@pytest.mark.parametrize("text", ["", "float16", "params=float32", "params=float16,compute=float32,output=float32"])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(UserError, match=r"precision.*allowed"):
        Precision.of(text)


@pytest.mark.parametrize(
    ("platform", "flags", "name"),
    [
        ("tpu", (), "bfloat16"),
        ("cuda", (), "bfloat16"),
        ("gpu", (), "bfloat16"),
        ("cpu", ("avx2", "avx512_bf16"), "mixed"),
        ("cpu", ("amx_bf16",), "mixed"),
        ("cpu", ("avx2", "avx512f"), "float32"),
        ("unheard of", (), "float32"),
    ],
)
def test_the_fastest_by_platform_and_processor(platform, flags, name):
    choice = automatic(platform, frozenset(flags))
    assert choice.name == name and choice.reason
