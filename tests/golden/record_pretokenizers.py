"""Records how the tokenizer.json of real models cut text, for tests/weights/test_pretokenizers.py.

    python tests/golden/record_pretokenizers.py deepseek-v3=FOLDER/tokenizer.json tekken=FOLDER/tekken.json ...

The names are those of ``tokenizer.ggml.pre``. Kept are the pieces that the model's own pre-tokenizer makes of a text of
many scripts; of a tekken.json, which holds one pattern only, those that the pattern makes.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

TEXT = (
    "Hello world, it's 2024 and THEY'LL pay $1234567.89!! don'T HelloWorld XMLHttp ÉCOLEs ǅ\r\n\r\n"
    "  indented\n\ttabs   \n"
    "x_y = f(a,b) / 2  # comment /// \n/\nnaïve cafe\u0301 — 記憶が한국어 ひらがな, "
    "12３４٥٦½Ⅷ 🙂👍🏽 ``{}<=>^|~$$ हिन्दी ภาษาไทย العربية "
    "Привет ПРИВЕТ ՀԱՅ ქართული Ელ ᏣᎳᎩ ℵℶ Ω K ﬁ Ａｂ 。、？ « ok »…   end.\u00a0\u3000\u2003"
)


def pieces(path: Path) -> list[str]:
    file = json.loads(path.read_text(encoding="utf-8"))
    if path.name.startswith("tekken"):
        cut = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(file["config"]["pattern"]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        bare = Tokenizer(models.BPE())
        kept = {key: file[key] for key in ("pre_tokenizer", "normalizer", "decoder")}
        cut = Tokenizer.from_str(json.dumps(json.loads(bare.to_str()) | kept)).pre_tokenizer
    return [piece for piece, _ in cut.pre_tokenize_str(TEXT)]


if __name__ == "__main__":
    found = {name: pieces(Path(path)) for name, _, path in (given.partition("=") for given in sys.argv[1:])}
    out = Path(__file__).parent / "gguf" / "pretokenizers.json"
    out.write_text(json.dumps({"text": TEXT, "pieces": found}, ensure_ascii=False) + "\n", encoding="utf-8")
    print({name: len(row) for name, row in found.items()})
