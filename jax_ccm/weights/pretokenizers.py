"""How text is cut before byte pairs are merged, by the name that a GGUF file gives in ``tokenizer.ggml.pre``.

The patterns are those with which the models were trained, as their tokenizer.json (or tekken.json) states them; where a
model's own file differs from what llama.cpp does in its place, the model's own is taken. ``default`` is what llama.cpp
does with a vocabulary that its converter did not know.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
# Digits in groups of up to three, from the left.
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
# Digits one by one.
_QWEN2 = _WORDS + r"\p{N}" + _REST
_QWEN35 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
# Words with at most one change from capitals to small letters.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")]
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _SLASH
_GPT4O = "|".join(f"{word}{_ENDINGS}?" for word in _CASED) + r"|\p{N}{1,3}" + _SLASH
_POEM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_HAN = "[一-龥ࠀ-一가-퟿]+"
# Letters that have a capital and a small form, in the version of Unicode of DeepSeek's first models.
_DEEPSEEK_LETTERS = (  # escapes for what Unicode normalisation would replace
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _SPACES
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one family cuts text.

    Attributes:
      splits: patterns; each cuts the pieces that the one before left, and what it matches stands alone.
      whole_words: whether a piece that is in the vocabulary is taken whole, without going through the merges.
      begins: whether encoding starts with the beginning-of-sequence token where the file does not say.
      compose: whether accents are composed first (Unicode NFC).
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    compose: bool = False

    def pre_tokenizer(self) -> Any:
        from tokenizers import Regex, pre_tokenizers

        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.splits]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
        )


def _named(cut: Cut, *names: str) -> dict[str, Cut]:
    return dict.fromkeys(names, cut)


CUTS: dict[str, Cut] = {
    **_named(Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), "default"),
    **_named(
        Cut((_GPT2,)), "gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"
    ),
    **_named(
        Cut((r"\p{N}", _GPT2)),
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    **_named(
        Cut((_LLAMA3,), whole_words=True, begins=True),
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    **_named(Cut((_LLAMA3,)), "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    **_named(Cut((_QWEN2,), compose=True), "qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
    **_named(Cut((_QWEN2,)), "stablelm2", "hunyuan", "grok-2"),
    **_named(Cut((_QWEN35,), compose=True), "qwen35"),
    **_named(Cut((_TEKKEN,), whole_words=True, begins=True), "tekken"),
    **_named(Cut((_GPT4O,)), "gpt-4o", "llama4", "kanana2"),
    **_named(
        Cut((r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN, r"\p{N}")),
        "deepseek-llm",
    ),
    **_named(Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")), "deepseek-coder"),
    **_named(Cut((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)), "deepseek-v3", "hunyuan-dense", "joyai-llm"),
    **_named(Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    **_named(Cut((_POEM,)), "poro-chat", "bloom", "gpt3-finnish"),
    **_named(Cut((_POEM, r"\p{N}")), "viking"),
    **_named(Cut((_WORDS + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES,)), "seed-coder"),
}
