"""Records what transformers makes of a real GGUF file: ids of texts, and logits, for tests/weights/test_real_gguf.py.

Needs torch, transformers (5.3 was used) and gguf, and for 1.5 billion parameters 8 GB of memory:

    python tests/golden/record_gguf.py FILE.gguf OUT.json [TOKENIZER.json]

The ids are those of the model's own tokenizer.json where it is given: what transformers 5.3 makes of the SentencePiece
vocabulary in the file of Gemma 3 is cut into other pieces than the model's own tokenizer cuts it into.

The record holds the file's SHA-256 digest, for each text its ids, and at some positions of the prompt the highest
logits with their ids, and the logarithm of the sum of all exponentials, so that every logit counts.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "The capital of France is Paris, and the capital of Italy is Rome. In 1987 there were 12 houses on the hill."
)
TEXTS = [
    "Hello world, it's 2024 and they'll pay $1234567.89!", "naïve café — 記憶 🙂\r\n\r\n  indented\n\ttabs   ",
    " don'T SHOUT'LL x_y = f(a,b)  # comment\n\n\n", "Привет, мир! Ελληνικά العربية हिन्दी ภาษาไทย", "   four    ", "",
]  # fmt: skip
TOP = 8


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(path: Path, out: Path, own: Path | None) -> None:
    if own is not None:
        tokenizer = Tokenizer.from_file(str(own))
        encode = lambda text, special=False: tokenizer.encode(text, add_special_tokens=special).ids
    else:
        loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        encode = lambda text, special=False: loaded(text, add_special_tokens=special)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = encode(PROMPT, True)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    at = {}
    for position in sorted({1, len(ids) // 3, 2 * len(ids) // 3, len(ids) - 1}):
        top = logits[position].topk(TOP)
        at[position] = {
            "ids": top.indices.tolist(),
            "logits": [round(x, 5) for x in top.values.tolist()],
            "logsumexp": round(torch.logsumexp(logits[position], 0).item(), 5),
        }
    record = {
        "sha256": digest(path),
        "prompt": ids,
        "at": at,
        "texts": [{"text": text, "ids": encode(text)} for text in [PROMPT, *TEXTS]],
    }
    out.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{path.name}: {len(ids)} tokens, logits up to {logits.abs().max():.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
