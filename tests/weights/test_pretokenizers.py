"""Text is cut as each model's own file cuts it, whatever `tokenizer.ggml.pre` calls that."""

import json

import pytest

from jax_ccm.weights.pretokenizers import CUTS
from tests.weights.test_parity import GOLDEN

RECORD = json.loads((GOLDEN.parent / "gguf" / "pretokenizers.json").read_text(encoding="utf-8"))


def cut(name: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in CUTS[name].pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize("name", RECORD["pieces"])
def test_as_the_model_itself_cuts(name):
    assert [piece for piece, _ in CUTS[name].pre_tokenizer().pre_tokenize_str(RECORD["text"])] == RECORD["pieces"][name]


@pytest.mark.parametrize("name", CUTS)
def test_nothing_is_lost(name):
    assert "".join(cut(name, RECORD["text"])) == RECORD["text"]


PROSE = "It's a `test`, no 12345 »\u0301x\n  記憶한국어.  "


@pytest.mark.parametrize(
    "name, pieces",
    [
        ("gpt-2", "It|'s| a| `|test|`,| no| 12345| »\u0301|x|\n | 記憶한국어|.|  "),
        ("smollm", "It|'s| a| `|test|`,| no| |1|2|3|4|5| »\u0301|x|\n | 記憶한국어|.|  "),
        ("default", "It|'|s| a| `|test|`|,| no| |123|45| |»|\u0301|x|\n | 記憶한국어|.|  "),
        ("falcon", "It|'|s| a| |`|test|`,| no| |123|45| |»|\u0301|x|\n | 記憶한국어|.|  "),
        ("qwen35", "It|'s| a| `|test|`,| no| |1|2|3|4|5| »|\u0301x|\n| | 記憶한국어|.|  "),
        ("seed-coder", "It|'s| a| `|test|`,| no| |1|2|3|4|5| »\u0301|x|\n| | 記憶한국어|.|  "),
        ("deepseek-llm", "It|'|s| a| `|test|`,| no| |1|2|3|4|5| »\u0301|x|\n|  |記憶한국어|.|  "),
        ("deepseek-coder", "It|'|s| a| `|test|`|,| no| |1|2|3|4|5| »|\u0301|x|\n| | |記憶한국어|.|  "),
        ("poro-chat", "It's| a| `test`|,| no| 12345| »\u0301x|\n | 記憶한국어|.  "),
        ("viking", "It's| a| `test`|,| no| |1|2|3|4|5| »\u0301x|\n | 記憶한국어|.  "),
    ],
)
def test_models_without_a_file_at_hand(name, pieces):
    """The published patterns, applied one after the other by hand."""
    assert cut(name, PROSE) == pieces.split("|")
