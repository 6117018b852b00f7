"""Real GGUF files: ids and logits as transformers has them, where an environment variable names the file.

tests/golden/record_gguf.py made the records, from files with the digests that they hold.
"""

import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jax_ccm.weights import load_model, load_tokenizer
from tests.weights.common import logits
from tests.weights.test_parity import GOLDEN

FILES = {"qwen25_coder_1_5b": "JAX_CCM_GGUF_QWEN", "gemma3_270m": "JAX_CCM_GGUF_GEMMA"}


@functools.cache
def given(name: str) -> tuple[Path, dict]:
    path = os.environ.get(FILES[name])
    if path is None:
        pytest.skip(f"set {FILES[name]} to the GGUF file to compare with transformers")
    record = json.loads((GOLDEN.parent / "gguf" / f"{name}.json").read_text(encoding="utf-8"))
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"], f"{path} is another file"
    return Path(path), record


@pytest.mark.parametrize("name", FILES)
def test_ids(name):
    path, record = given(name)
    tokenizer = load_tokenizer(path)
    for case in record["texts"]:
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer(record["texts"][0]["text"])["input_ids"] == record["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_logits(name):
    """All of them through the sum of their exponentials, the highest one by one."""
    path, record = given(name)
    ours = np.asarray(logits(load_model(path), [record["prompt"]])[0], np.float64)
    for position, expected in record["at"].items():
        row = ours[int(position)]
        np.testing.assert_allclose(row[expected["ids"]], expected["logits"], atol=1e-3)
        assert abs(np.log(np.sum(np.exp(row - row.max()))) + row.max() - expected["logsumexp"]) < 1e-3
