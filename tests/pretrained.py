"""A tiny base with a tokenizer in a folder, and a run that trained an adapter on it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_ccm.config.schema import Config, from_mapping
from jax_ccm.weights import save_hf
from tests import cases

DESCRIPTION = "An adapter that tests made."


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i + 2 for i, c in enumerate(alphabet)} | {"<s>": 0, "</s>": 1}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def make_base(folder: Path, seed: int = 0) -> Path:
    """A base in Hugging Face layout."""
    words = tokenizer()
    save_hf(cases.model(tokens=0, rank=0, vocab_size=len(words), seed=seed), folder)
    words.save_pretrained(folder)
    return folder


def config(folder: Path, **sections) -> Config:
    """The config of a short run on that base, with data in the same folder."""
    data = folder / "talk.jsonl"
    data.write_text("".join(json.dumps({"turns": [f"hi {i}", "yes", "what", "no"]}) + "\n" for i in range(4)))
    tree = {
        "model": {"source": str(folder / "base"), "precision": "float32"},
        "method": {"name": "ccm_concat", "comp_tokens": 2},
        "adapter": {"rank": 2, "dropout": 0.0},
        "data": {
            "train": [str(data)],
            "test": [str(data)],
            "batch_size": 2,
            "tokens": 48,
            "scored": 24,
        },
        "train": {"steps": 1, "eval_every": 0, "checkpoint_every": 1},
        "eval": {"steps": [1, 2], "batch_size": 2},
        "cache": {"memory_capacity": 16, "raw_capacity": 64},
        "card": {"description": DESCRIPTION, "license": "apache-2.0", "base_model": "someone/tiny"},
    }
    return from_mapping({name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}})
