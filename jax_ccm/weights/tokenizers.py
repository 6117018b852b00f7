"""Tokenizers: through transformers from a folder or the hub, or rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jax_ccm.errors import UserError, unknown
from jax_ccm.weights.gguf import GgufFile
from jax_ccm.weights.pretokenizers import CUTS
from jax_ccm.weights.sources import TOKENIZER_FILES, locate

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # values of `tokenizer.ggml.token_type`


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, with its chat template.

    Args:
      source: a local folder, a hub id, a ``.gguf`` file, or ``package:NAME/FILE.gguf``.

    Raises:
      UserError: if there is none, or it is of a kind that is not implemented.
    """
    path = locate(source, TOKENIZER_FILES)
    if path.is_file():
        return from_gguf(path)
    file = path / "tokenizer.json"
    if file.is_file():
        return _from_file(path, file)
    return _through_transformers(path)


def _from_file(path: Path, file: Path) -> PreTrainedTokenizerFast:
    """What ``tokenizer.json`` says, with the names of special tokens, the chat template and the lengths of its folder.

    The classes that transformers 5 knows by name build normalizers, pre-tokenizers and decoders of their own over the
    vocabulary of the file, and every class replaces the post-processor where the folder says ``add_bos_token``. So no
    class is asked, and the pipeline is the file's.

    Raises:
      UserError: if a file is damaged, or the folder gives a token another id than the file does.
    """
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{str(file)!r} is no tokenizer of the tokenizers library: {_short(error)}") from error
    with _refusing(path):
        tokenizer = _transformers().PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if tokenizer.eos_token is None:
        _names_of_class(tokenizer, path, own)
    # Tokens that only tokenizer_config.json names go behind those of tokenizer.json, and must get the ids that it says.
    known = {token.content for token in own.get_added_tokens_decoder().values()}
    asked = {str(token): index for index, token in tokenizer.init_kwargs.get("added_tokens_decoder", {}).items()}
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content in known:
            continue
        own.add_special_tokens([token]) if token.special else own.add_tokens([token])
        index = own.token_to_id(token.content)
        if asked.get(token.content, index) != index:
            raise UserError(
                f"{str(path)!r}: token {token.content!r} has id {asked[token.content]} in tokenizer_config.json, but "
                f"{index} when it is added to tokenizer.json, which lacks it; the files do not belong together"
            )
    own.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
    tokenizer._tokenizer = own
    return tokenizer


def _names_of_class(tokenizer: PreTrainedTokenizerFast, path: Path, own: Tokenizer) -> None:
    """Names the special tokens that the folder leaves to the class of its tokenizer, as far as the file holds them."""
    try:
        usual = _through_transformers(path)
    except UserError:  # the class cannot read the file, which needs it for nothing else
        return
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(usual, name)
        if getattr(tokenizer, name) is None and token is not None and own.token_to_id(token) is not None:
            setattr(tokenizer, name, token)


def _through_transformers(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers builds it, by the class that the folder names."""
    with _refusing(path):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{str(path)!r} has no fast tokenizer; save it with a tokenizer.json")
    return tokenizer


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UserError(f"no tokenizer in {str(path)!r}: {_short(error)}. A tokenizer.json is needed") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _transformers() -> ModuleType:
    """transformers, imported without its advice to install torch, which nothing here needs."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in the metadata of a GGUF file. See `load_tokenizer`."""
    file = GgufFile.open(path)
    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise UserError(f"{path}: tokenizer of type {kind!r} is not supported; supported: {', '.join(_BUILDERS)}")
    tokens = _vocabulary(file)
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if not 0 <= index < len(tokens):
                raise UserError(f"{path}: {key}_token_id is {index}, outside the vocabulary of {len(tokens)}")
            named[f"{name}_token"] = tokens[index]
    tokenizer = _BUILDERS[kind](meta, tokens, named, path)
    _add_special(tokenizer, tokens, meta["tokenizer.ggml.token_type"])
    # Where the file does not say, as llama.cpp: SentencePiece models begin with it, byte-level ones if their kind does.
    begins = kind == "llama" or CUTS[meta["tokenizer.ggml.pre"]].begins
    _add_ends(tokenizer, meta, named, default_bos=begins)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template"),
        model_max_length=file.config.max_position,
        # Else decoding would drop spaces before punctuation that were in the text.
        clean_up_tokenization_spaces=False,
        **named,
    )


def _vocabulary(file: GgufFile) -> list[str]:
    """The tokens, after a look at whether each has what it needs.

    Raises:
      UserError: if the file lacks a list, or one is of another length; llama.cpp's defaults would be silent.
    """
    meta, path = file.metadata, file.path
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _incomplete(path, "the list of tokens, 'tokenizer.ggml.tokens', is missing")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in collections.Counter(tokens).items() if count > 1)
        raise _incomplete(path, f"the list of tokens repeats itself ({twice!r})")
    if len(tokens) > file.config.vocab_size:
        raise _incomplete(path, f"{len(tokens)} tokens, but embeddings for {file.config.vocab_size}")
    needed = ["token_type", "scores"] if meta["tokenizer.ggml.model"] == "llama" else ["token_type"]
    for name in needed:
        given = meta.get(f"tokenizer.ggml.{name}")
        if not isinstance(given, list) or len(given) != len(tokens):
            found = f"has {len(given)} entries" if isinstance(given, list) else "is missing"
            raise _incomplete(path, f"'tokenizer.ggml.{name}' {found}; each of the {len(tokens)} tokens needs one")
    return tokens


def _incomplete(path: Path, what: str) -> UserError:
    return UserError(
        f"the tokenizer in {path} is incomplete: {what}. Text would be cut into other tokens than those that the model "
        "was trained on; get the file again, or convert the model again"
    )


def _byte_level(meta: dict[str, Any], tokens: list[str], named: dict[str, str], path: Path) -> Tokenizer:
    """Byte-level BPE, the "gpt2" type."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = meta.get("tokenizer.ggml.pre")
    if pre is None:
        raise _incomplete(
            path, "'tokenizer.ggml.pre', which says how text is cut before byte pairs are merged, is missing"
        )
    if pre not in CUTS:
        raise unknown(f"pre-tokenizer in {path}:", str(pre), CUTS)
    cut = CUTS[pre]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole, without going through the merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_pairs(meta, vocab, path), ignore_merges=cut.whole_words))
    tokenizer.pre_tokenizer = cut.pre_tokenizer()
    if cut.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pairs(meta: dict[str, Any], vocab: dict[str, int], path: Path) -> list[tuple[str, str]]:
    """The merges, each of two pieces of the vocabulary to a third."""
    merges = meta.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not merges:
        raise _incomplete(path, "the list of merges, 'tokenizer.ggml.merges', is missing")
    pairs = []
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise _incomplete(path, f"merge {number} is {merge!r}, and not two pieces with a space between them")
        pairs.append((left, right))
    for number, (left, right) in enumerate(pairs):
        strange = [piece for piece in (left, right, left + right) if piece not in vocab]
        if strange:
            raise _incomplete(path, f"merge {number}, '{left} {right}', needs {strange[0]!r}, which is no token")
    return pairs


def _sentencepiece(meta: dict[str, Any], tokens: list[str], named: dict[str, str], path: Path) -> Tokenizer:
    """SentencePiece BPE with byte fallback, the "llama" type.

    A piece's score is the rank of the merge that makes it. As llama.cpp does, and Llama 2's own tokenizer.json, a space
    is put before every stretch of text between special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores, types = meta["tokenizer.ggml.scores"], meta["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Control, user-defined and byte tokens are never made by merges.
    whole = {token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED, _BYTE)}
    ranks = {token: score for token, score in zip(tokens, scores, strict=True) if token not in whole}
    merges = _merges(ranks)
    if len(merges) > 1 and len({ranks[left + right] for left, right in merges}) == 1:
        raise _incomplete(path, "all scores are the same, so that they do not say which pieces are merged first")
    unknown_token = named.get("unk_token", tokens[0])
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the highest-scored piece first."""
    pairs = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens are special; those that the user defined are only kept whole."""
    from tokenizers import AddedToken

    def chosen(kind):
        return [token for token, given in zip(tokens, types, strict=True) if given == kind]

    # Not normalised: they are looked for in the text as it stands, before spaces become ▁.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in chosen(_CONTROL)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in chosen(_USER_DEFINED)])


def _add_ends(tokenizer: Tokenizer, meta: dict[str, Any], named: dict[str, str], default_bos: bool) -> None:
    """Makes encoding add the tokens that the file says begin or end a text."""
    from tokenizers import processors

    bos = named.get("bos_token") if meta.get("tokenizer.ggml.add_bos_token", default_bos) else None
    eos = named.get("eos_token") if meta.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    used = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]

    def one(text: str, number: int) -> list[str]:
        before = [f"{bos}:{number}"] if bos is not None else []
        return [*before, text, f"{eos}:{number}"] if eos is not None else [*before, text]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=one("$A:0", 0), pair=one("$A:0", 0) + one("$B:1", 1), special_tokens=used
    )
