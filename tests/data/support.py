"""A tiny tokenizer and small records for the tests of the data."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MERGES = [("Ġ", "h"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("o", "n"), ("Ġ", "on"), ("i", "n"), ("e", "r")]


@functools.cache
def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the 256 bytes and a few merges, as in GPT-2: a space belongs to the token behind it."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>" if bos else None, eos_token="</s>")


VOCAB = 2 + 256 + len(MERGES)


def ids(text: str) -> list[int]:
    """The tokens of a text."""
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def text_of(tokens) -> str:
    """The text of tokens; compression tokens appear as <C0>, <C1>, ..."""
    parts = [f"<C{t - VOCAB}>" if t >= VOCAB else tokenizer().convert_ids_to_tokens(int(t)) for t in tokens]
    runs, text = [], ""
    for part in parts:
        if part.startswith("<"):
            text += decoders.ByteLevel().decode(runs) + part
            runs = []
        else:
            runs.append(part)
    return text + decoders.ByteLevel().decode(runs)


def write(path, records) -> str:
    """Writes records as JSONL and gives the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def dialogues(*counts: int) -> list[dict]:
    """Dialogues of so many turns, each turn distinct."""
    return [
        {"turns": [f"the turn {number} of {place}" for number in range(count)]} for place, count in enumerate(counts)
    ]
