"""Which tokens end a reply, as the files of a model say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.records.parsing import read_json
from jax_ccm.weights.gguf import GgufFile
from jax_ccm.weights.sources import locate

# The first that gives ids counts, as for transformers.
FILES = ("generation_config.json", "config.json")
GGUF_KEYS = ("eos", "eot", "eom")


def end_tokens(source: str | Path, vocab_size: int) -> tuple[int, ...]:
    """Ids of all tokens that end a reply: of the text, of a turn, of a message that a tool is to answer.

    Args:
      source: a local folder, a hub id, a ``.gguf`` file, or ``package:NAME/FILE.gguf``.
      vocab_size: V of the model.

    Returns:
      Ids in order; none if the files give none.

    Raises:
      UserError: for a damaged file, or something that is not an id of the model.
    """
    path = locate(source, FILES)
    if path.is_file():
        meta = GgufFile.open(path).metadata
        names = [f"tokenizer.ggml.{key}_token_id" for key in GGUF_KEYS]
        return tuple(sorted({i for name in names for i in _ids(meta.get(name), vocab_size, f"{path}: {name}")}))
    for name in FILES:
        file = path / name
        if file.is_file() and (found := _ids(read_json(file).get("eos_token_id"), vocab_size, f"{file}: eos_token_id")):
            return tuple(sorted(set(found)))
    return ()


def _ids(given: Any, vocab_size: int, where: str) -> list[int]:
    if given is None:
        return []
    ids = given if isinstance(given, list) else [given]
    for id in ids:
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size:
            raise UserError(
                f"{where} is {given!r}; it must be the id of a token, or a list of ids, each from 0 to {vocab_size - 1}"
            )
    return ids
