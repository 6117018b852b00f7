"""What a run was made of: fingerprints of its base, adapters, tokenizer and data, kept with each checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.config.loading import base_source
from jax_ccm.config.schema import Config
from jax_ccm.data.batches import TrainingSet
from jax_ccm.data.tokenized import digest_of
from jax_ccm.errors import UserError

# Of a large file these are read: so many blocks of so many bytes at regular places, and more where they would lie
# further apart than this. Files of up to 2 MiB are read whole; of 7B parameters each projection is hit several times.
BLOCKS, BLOCK, APART = 4096, 512, 4 * 2**20
TOLD = ("README.md", "config.yaml")


def of_files(config: Config, base: str) -> dict[str, Any]:
    """Fingerprints of the files that a config names: base, adapters and tokenizer.

    Args:
      config: the config.
      base: what the base was loaded from; empty for one from scratch.

    Returns:
      JSON values: config key -> file name -> size and digest.
    """
    from jax_ccm.weights.sources import TOKENIZER_FILES, WEIGHT_FILES, locate, locate_adapter

    found = {}
    if base:
        found["model.source"] = _folder(Path(locate(base)), WEIGHT_FILES)
    tokenizer = config.model.tokenizer or base_source(config)
    # Recall data are token ids from the start: the tokenizer is never opened.
    if tokenizer and config.data.format != "recall":
        path = Path(locate(tokenizer, TOKENIZER_FILES))
        # config.json describes the base, and is compared as one of its files.
        found["model.tokenizer"] = _folder(path, [x for x in TOKENIZER_FILES if x != "config.json"])
    for key in ("merge", "load"):
        if folder := getattr(config.adapter, key):
            found[f"adapter.{key}"] = _folder(locate_adapter(folder), ("*",))
    return found


def _folder(path: Path, patterns: Sequence[str]) -> dict[str, str]:
    """``{name: "SIZE bytes, DIGEST"}`` of a file, or of the files of a folder that fit a pattern."""
    if path.is_file():
        return {path.name: _file(path)}
    files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    return {str(file.relative_to(path)): _file(file) for file in sorted(files)}


def _file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    count = max(BLOCKS, -(-size // APART))
    with path.open("rb") as file:
        if size <= count * BLOCK:
            digest.update(file.read())
        else:
            for number in range(count):
                # The first block begins with the file, the last one ends with it.
                file.seek(number * (size - BLOCK) // (count - 1))
                digest.update(file.read(BLOCK))
    return f"{size:,} bytes, {digest.hexdigest()[:16]}"


def of_data(data: TrainingSet) -> dict[str, Any]:
    """The fingerprint of data as they are trained or evaluated on: how many there are, and a digest of their tokens."""
    # Data that were tokenised before have a digest from then; to hash their units would read all of them again.
    digest = data.digest or digest_of(data.units).hexdigest()
    return {"records": data.report.records, "used": len(data.units), "tokens": digest[:16]}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is no longer as it was, in words; entries that only one side has are not compared."""
    found = []
    for key in before:
        if key not in now or before[key] == now[key]:
            continue
        old, new = before[key], now[key]
        if key.startswith("data."):
            found.append(f"{key}: {_data(old, new)}")
            continue
        for name in sorted(old.keys() | new.keys()):
            # What is told of an adapter is not what it is.
            if old.get(name) != new.get(name) and not (key.startswith("adapter.") and name in TOLD):

                def show(side, name=name):
                    return side.get(name, "not there")

                found.append(f"{key}: {name} was {show(old)}, now {show(new)}")
    return found


def _data(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def show(x):
        return f"{x['records']:,} records ({x['used']:,} examples are used)"

    if show(old) != show(new):
        return f"{show(old)} then, {show(new)} now"
    return f"as many records as before ({old['records']:,}), but other tokens"


def require_same(before: Mapping[str, Any] | None, now: Mapping[str, Any], where: Path, *, accept: bool) -> list[str]:
    """Refuses to go on with another base or other data than a run began with.

    Args:
      before: fingerprints in the checkpoint; None for one that has none.
      now: those of today.
      where: the folder, for the message.
      accept: go on nonetheless.

    Returns:
      The changes that were accepted.

    Raises:
      UserError: naming each change, and how to insist.
    """
    if before is None:
        print(
            f"the checkpoint in {where} does not say which base and data it was trained on (it was written by an "
            "earlier version): they are not compared this time"
        )
        return []
    found = changes(before, now)
    if found and not accept:
        raise UserError(
            f"the run in {where} began with another base or other data: {'; '.join(found)}. Put back what it began "
            "with, use another --workdir for a new run, or go on nonetheless with --accept_changes True, which is "
            "recorded in its checkpoints and summary.json"
        )
    for change in found:
        print(f"accepted: {change}")
    return found
