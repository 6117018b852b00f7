"""The names that the library exports: what they are called stays, they say what they do, and the reference has them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import jax_ccm

API = Path(__file__).parents[1] / "docs" / "api.md"

# A name leaves this list only with a version that says so (docs/versions.md).
PUBLIC = set(
    """
    AdapterConfig AsyncConversations Batch Chunk Clause Closing Conversations Example Kind METHODS MemoryCache Method
    ModelConfig Rule RunError Sampling Segment Sizes Slots Token Transformer UserError batch build check chunk compress
    compress_scan compress_step for_decoding from_pretrained generate init_cache load load_adapter load_model
    load_tokenizer mean_loss measure parallel_forward prefill read repeat reset save see select stream_step visible
    """.split()
)  # fmt: skip


def exported() -> set[str]:
    names = {name for name in dir(jax_ccm) if not name.startswith("_")}
    found = {name: getattr(jax_ccm, name) for name in names}
    return {
        name
        for name, value in found.items()
        if name == "METHODS" or getattr(value, "__module__", "").startswith("jax_ccm.")
    }


def test_names():
    assert exported() == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"METHODS"}))
def test_documented(name):
    """A docstring of its own, which names each argument of a function."""
    value = getattr(jax_ccm, name)
    text = inspect.getdoc(value)
    assert text and text != inspect.getdoc(type(value))
    if not inspect.isclass(value):
        for argument in inspect.signature(value).parameters:
            assert re.search(rf"\b{argument}\b", text), f"nothing is said of {argument}"


def test_the_reference_has_them_all():
    shown = re.findall(r"^::: jax_ccm\.(\w+)$", API.read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(PUBLIC)
