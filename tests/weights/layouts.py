"""Small tokenizers in the layouts of the families: what their tokenizer.json says, over a vocabulary made here."""

import functools
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (Path(__file__).parents[1] / "golden" / "record_hf.py").read_text(encoding="utf-8")
TEXTS = [
    "Hello world, it's 2024 and they'll pay $1234567.89!",
    "naïve café\u0301 — 記憶 🙂\r\n\r\n  indented\n\ttabs   ",
    " don'T SHOUT'LL x_y = f(a,b)  # comment\n\n\n",
    "",
    "   ",
    "  two<|end|>  halves <|end|>\nof a turn",
    "The memory of a conversation is smaller than the conversation.",
]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _byte_level(special: list[str], steps: list, **model) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def _sentencepiece(special: list[str], normalizer, pre=None) -> Tokenizer:
    """BPE over characters with a token for each byte, as converters write SentencePiece models."""
    tokenizer = Tokenizer(models.BPE(unk_token=special[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next") if pre is None else pre
    named = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=named, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    # Bytes are plain pieces, not added tokens.
    bare = Tokenizer(tokenizer.model)
    bare.normalizer, bare.pre_tokenizer = normalizer, pre
    bare.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return bare


def _begins_with(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    pair = f"{token} $A {token}:1 $B:1"
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=pair, special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def _after(*more):
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def llama2() -> Tokenizer:
    made = _sentencepiece(
        ["<unk>", "<s>", "</s>"],
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    made.decoder = _after(decoders.Strip(" ", left=1, right=0))
    made.post_processor = _begins_with("<s>", made)
    return made


def phi3() -> Tokenizer:
    """As Llama 2, with tokens of its own that take the white space after them."""
    made = llama2()
    made.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return made


def mistral() -> Tokenizer:
    made = _sentencepiece(
        ["<unk>", "<s>", "</s>"],
        None,
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False),
    )
    made.decoder = _after(decoders.Strip(" ", left=1, right=0))
    made.post_processor = _begins_with("<s>", made)
    return made


def gemma() -> Tokenizer:
    made = _sentencepiece(
        ["<unk>", "<bos>", "<eos>"], normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    )
    made.decoder = _after()
    made.post_processor = _begins_with("<bos>", made)
    return made


def llama3() -> Tokenizer:
    made = _byte_level(
        ["<|begin_of_text|>", "<|end_of_text|>"],
        [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
        ignore_merges=True,
    )
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begins_with("<|begin_of_text|>", made)]
    )
    return made


def qwen2() -> Tokenizer:
    pattern = Regex(_LLAMA3.replace("{1,3}", ""))
    made = _byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    )
    made.normalizer = normalizers.NFC()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def smollm() -> Tokenizer:
    return _byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)],
    )


def deepseek() -> Tokenizer:
    return _byte_level(
        ["<|begin|>", "<|end|>"],
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ],
    )


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS.splitlines(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return made


def cut() -> Tokenizer:
    """A file that was saved with truncation and padding switched on."""
    made = llama3()
    made.enable_truncation(4)
    made.enable_padding(length=40, pad_id=1, pad_token="<|end_of_text|>")
    return made


LAYOUTS: dict[str, Callable[[], Tokenizer]] = {
    layout.__name__: functools.cache(layout)
    for layout in (llama2, phi3, mistral, gemma, llama3, qwen2, smollm, deepseek, unigram, cut)
}
