"""Logits equal those of transformers' own torch models, recorded by tests/golden/record_hf.py."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jax_ccm.nn import Transformer
from jax_ccm.weights import load_model, read_config
from tests.weights.common import logits

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
# Where the frequencies depend on the length of the text, which was 48.
LENGTHS = {"llama_dynamic": 48, "phi3_longrope": 48}


def load(case: str) -> Transformer:
    return load_model(GOLDEN / case, rope_length=LENGTHS.get(case))


def difference(case: str, model: Transformer) -> float:
    with np.load(GOLDEN / case / "expected.npz") as expected:
        return float(np.abs(logits(model, expected["input_ids"]) - expected["logits"]).max())


def test_every_family_was_recorded():
    assert len(CASES) == 16
    assert {read_config(GOLDEN / case).family for case in CASES} == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "gemma2",
        "gemma3_text",
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    assert difference(case, load(case)) < 1e-4


@pytest.mark.parametrize(
    "case, change",
    [
        ("llama_llama3_tied", {"rope_scaling": None}),
        ("llama_linear", {"rope_scaling": None}),
        ("llama_yarn", {"rope_scaling": None}),
        ("llama_dynamic", {"rope_scaling": None}),
        ("phi3_longrope", {"rope_scaling": None}),
        ("phi3", {"rotary_factor": 1.0}),
        ("phi3", {"sliding_window": 13}),
        ("gemma2", {"full_layers": ()}),
        ("gemma2", {"sliding_window": None}),
        ("gemma2", {"score_cap": None}),
        ("gemma2", {"logit_cap": None}),
        ("gemma2", {"query_scalar": None}),
        ("gemma2", {"scale_embeddings": False}),
        ("gemma3", {"window_theta": None}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"full_layers": ()}),
        ("llama_gqa", {"rope_theta": 10000.0}),
        ("mistral_window", {"sliding_window": None}),
        ("mistral_window", {"sliding_window": 13}),
        ("qwen2_window", {"sliding_window": 11}),
        ("qwen3", {"norm_eps": 1e-2}),
    ],
)
def test_a_wrong_config_is_noticed(case, change):
    """The recorded logits can tell each of these apart, so the test above means something."""
    model = load(case)
    model.config = dataclasses.replace(model.config, **change)
    if "norm_eps" in change:
        model.norm.eps = change["norm_eps"]
    assert difference(case, model) > 1e-2
