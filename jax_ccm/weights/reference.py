"""The on-disk format of the CCM paper's code: PEFT's config beside ``pytorch_model.bin`` or ``model.safetensors``.

Keys are PEFT's (`jax_ccm.weights.peft`). The table of compression embeddings has n rows, COMP0 .. COMP(n - 1); for the
merge methods 2 n, the second half for SUM tokens. SUM tokens carry the merged memory there; their keys and values are
overwritten in every layer and their embeddings reach nothing, so here they are dropped on import and written as zeros.

The config has rank and alpha (16, so the scale is 2 for rank 8 and 1 for rank 16: it may differ between the two stages
of one run) but neither method nor base model. The caller gives them; the published folders' names say the method.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.records.parsing import read_json
from jax_ccm.rules.describe import describe_method, label
from jax_ccm.rules.types import Method
from jax_ccm.weights.folders import read_tensors
from jax_ccm.weights.lora import COMP, Lora
from jax_ccm.weights.peft import COMP_KEY, CONFIG_FILE, config_bytes, known, pack, tensor_bytes, unpack
from jax_ccm.weights.peft_modules import read_modules

BIN_FILE = "pytorch_model.bin"
TENSOR_FILE = "model.safetensors"

# Such as "llama-7b-no-online-merge_recur-ntok8-sink".
_RUN_NAME = re.compile(r"-online-(concat|merge)(_recur)?(?:-ntok(\d+))?(-sink)?(?![a-z])")


def read_reference(folder: Path, method: Method | None) -> Lora:
    """Reads an adapter of the reference implementation, without executing anything that is in its ``.bin``.

    Args:
      folder: with ``adapter_config.json`` and one of the two tensor files.
      method: the method it was trained for. Needed if it has compression tokens, unless the folder bears the name of
        a published run or is an export of ours: the files do not say whether half of the rows belong to SUM tokens.

    Raises:
      UserError: for damaged files, another number of rows than the method needs, unknown features or tensors.
    """
    path = folder / (BIN_FILE if (folder / BIN_FILE).is_file() else TENSOR_FILE)
    if (folder / BIN_FILE).is_file() and (folder / TENSOR_FILE).is_file():
        raise UserError(f"{folder} holds both {BIN_FILE} and {TENSOR_FILE}; remove the one that is out of date")
    modules = read_modules(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    tensors, metadata = read_tensors(path)
    found = unpack(tensors, modules, path)
    config, arrays = found.config, dict(found.arrays)
    # An export of ours says its method; else the folder's name may.
    about = known(metadata, path) or {"method": _method_of_run(folder)}
    if COMP in arrays:
        if about["method"] is None and method is None:
            raise UserError(
                f"{folder} is in the reference's format, which does not say the method, and its {len(arrays[COMP])} "
                "rows of embeddings mean different things for concat and merge; give the method it was trained for"
            )
        if about["method"] is None and method is not None:
            about["method"] = describe_method(method)
        arrays[COMP] = _comp_rows(arrays[COMP], about["method"], path)
        config = dataclasses.replace(config, tokens=len(arrays[COMP]))
    return Lora(config, arrays, **about, partial=found.partial, source=str(folder))


def reference_tensors(adapter: Lora) -> dict[str, np.ndarray]:
    """An adapter's tensors with the reference's keys and shapes; rows of SUM tokens, which nothing reads, are zero.

    Raises:
      UserError: for an adapter without LoRA, or with compression tokens and no known method, or of a method that the
        reference does not have.
    """
    tensors = pack(adapter)
    if COMP_KEY in tensors:
        if adapter.method is None:
            raise UserError(
                f"{adapter.source} does not say for which method it is, and the reference's format has other rows for "
                "merge than for concat; give the method"
            )
        if [token["embedding_index"] for token in adapter.method["closes"] if token["kind"] == "COMP"] != [
            *range(len(tensors[COMP_KEY]))
        ]:
            raise UserError(
                f"{adapter.source} was trained for {label(adapter.method)}, whose table of tokens is not that of the "
                "reference's methods (n compression tokens and nothing else); write it as 'own' or 'peft'"
            )
        if adapter.method["mix"] is not None:
            rows = tensors[COMP_KEY]
            # [2 n, D]: the second half for SUM tokens.
            tensors[COMP_KEY] = np.concatenate([rows, np.zeros_like(rows)])
    return tensors


def reference_files(adapter: Lora) -> dict[str, bytes]:
    """The files of an adapter in the reference's format, which its loader accepts."""
    return {CONFIG_FILE: config_bytes(adapter), TENSOR_FILE: tensor_bytes(reference_tensors(adapter), adapter)}


def _comp_rows(rows: np.ndarray, method: dict[str, Any], path: Path) -> np.ndarray:
    n, merges = len(method["closes"]), method["mix"] is not None
    if len(rows) != n * (1 + merges):
        kinds = f"{n} COMP" + f" and {n} SUM" * merges
        # The reference copies as many rows as both have, which for merge takes SUM embeddings for COMP.
        raise UserError(
            f"{path}: the table of compression tokens has {len(rows)} rows, but method {label(method)} needs "
            f"{n * (1 + merges)} ({kinds}). Taking only the rows that both have would mix up tokens, so it is refused; "
            "set comp_tokens to what it was trained with"
        )
    return rows[:n]


def _method_of_run(folder: Path) -> dict[str, Any] | None:
    """The method that the reference's own naming of a run gives, or None for a folder of another name."""
    found = _RUN_NAME.search(folder.absolute().name)
    if found is None:
        return None
    kind, recurrent, tokens, sink = found.groups()
    options = {"comp_tokens": int(tokens or 1), "sink": sink is not None, "independent": recurrent is None}
    return describe_method(build(f"ccm_{kind}", **options))
