"""PEFT's layout of an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensors are ``base_model.model.model.layers.{i}.{self_attn,mlp}.{q,k,v,o,gate,up,down}_proj.lora_A.weight`` ``[r, in]``
and ``….lora_B.weight`` ``[out, r]``. PEFT has no place for embeddings of compression tokens: they lie beside them in
the same file, as ``base_model.model.model.embed_tokens.comp_embeddings.weight`` ``[n, D]``, where PEFT's loader passes
them over. What PEFT's config has no field for (method and base model) is JSON in the metadata of the safetensors file,
under ``jax_ccm``.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.nn import AdapterConfig
from jax_ccm.nn.config import PROJECTIONS
from jax_ccm.records.parsing import parse_json, read_json
from jax_ccm.weights.folders import read_tensors, safetensors_bytes
from jax_ccm.weights.lora import COMP, Lora, belonging, depth, stem
from jax_ccm.weights.peft_modules import NOTE, Modules, read_modules

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
COMP_KEY = "base_model.model.model.embed_tokens.comp_embeddings.weight"
METADATA = "jax_ccm"
# More layers than any model has.
DEEPEST = 500

_LORA_KEY = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.(\w+)\.(\w+))\.lora_([AB])\.weight")
# The reference's older files spell the table differently.
_COMP_KEYS = (COMP_KEY, COMP_KEY.replace("comp_embeddings", "gist_embeddings"))
# Parts of the names of other tensors, and what they are.
_OTHERS = {
    "lora_magnitude_vector": "of DoRA, which also rescales the weights",
    "lora_embedding": "of a LoRA on the embeddings",
    "token_adapter": "rows of the vocabulary that were trained",
    "lm_head": "of the head",
    "embed_tokens": "the whole table of embeddings, which PEFT also saves where it was resized",
    "modules_to_save": "a whole module that was trained besides the LoRA",
    ".bias": "a bias that was trained",
}


def read_peft(folder: Path) -> Lora:
    """Reads an adapter in PEFT's layout: one of ours, or a plain LoRA of PEFT (which has no compression tokens).

    Raises:
      UserError: for damaged files, features that are not implemented, and tensors that are missing or not known.
    """
    modules = read_modules(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    path = folder / TENSOR_FILE
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        path = folder / "adapter_model.bin"
    tensors, metadata = read_tensors(path)
    return dataclasses.replace(unpack(tensors, modules, path), **known(metadata, path), source=str(folder))


def peft_files(adapter: Lora) -> dict[str, bytes]:
    """The files of an adapter in PEFT's layout.

    Raises:
      UserError: for an adapter without LoRA, which PEFT cannot express.
    """
    return {
        CONFIG_FILE: config_bytes(adapter, **({NOTE: True} if is_conditional(adapter) else {})),
        TENSOR_FILE: tensor_bytes(pack(adapter), adapter),
    }


def unpack(tensors: dict[str, np.ndarray], modules: Modules, path: Path) -> Lora:
    """An adapter from tensors with PEFT's keys, its arrays stacked over layers.

    All modules get the largest rank of any, padded with zeros, and the scale that most of them have; B takes what
    another scale differs by. Layers without a LoRA have zeros.

    Raises:
      UserError: naming the tensor, if one is missing, empty, not known, or of another shape than it should have.
    """
    found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    # Of the embeddings of compression tokens, if there are any.
    rows = None
    for key, x in tensors.items():
        match = _LORA_KEY.fullmatch(key)
        if not x.size:
            raise UserError(
                f"{path}: tensor {key!r} is empty, {list(x.shape)}: it was saved under DeepSpeed ZeRO-3, where each "
                "process holds a part only. Save the adapter again with stage3_gather_16bit_weights_on_model_save: true"
            )
        if match and PROJECTIONS.get(match[4]) == match[3]:
            if not modules.has(match[1]):
                raise UserError(f"{path} holds tensor {key!r}, but {CONFIG_FILE} gives that module no LoRA")
            found.setdefault((int(match[2]), match[4]), {})[match[5]] = x
        elif key in _COMP_KEYS and rows is None and x.ndim == 2:
            rows = x
        else:
            what = next((f", {what}," for part, what in _OTHERS.items() if part in key), "")
            raise UserError(
                f"{path}: tensor {key!r} {list(x.shape)}{what} is not known. An adapter holds lora_A and lora_B of "
                f"{', '.join(PROJECTIONS)} (base_model.model.model.layers.N...) and {COMP_KEY!r}"
            )
    # What the config gives a LoRA, up to the last layer that has tensors, must all be there.
    layers = 1 + max((layer for layer, _ in found), default=-1)

    def of_layer(layer):
        return [target for target in PROJECTIONS if modules.has(_module(layer, target))]

    wanted = [(layer, target) for layer in range(layers) for target in of_layer(layer)]
    _check(found, wanted or [(0, target) for target in of_layer(0)], modules, path)
    names = [_module(*module) for module in wanted]
    # Ours have one scale and one rank for all modules.
    scales = collections.Counter(map(modules.scale_of, names))
    # Not 0, unless all are: the others could not be written as multiples of it.
    scale, rank = max(scales, key=lambda x: (x > 0, scales[x])), max(map(modules.rank_of, names))
    # Exactly what the config says, where one number says it for all.
    plain = scale == modules.alpha / rank
    targets = tuple(target for target in PROJECTIONS if any(target == other for _, other in wanted))
    config = AdapterConfig(
        rank, modules.alpha if plain else scale * rank, modules.dropout, targets, 0 if rows is None else len(rows)
    )
    arrays = {} if rows is None else {COMP: rows}
    for target in targets:
        of_target = {layer: found[layer, other] for layer, other in wanted if other == target}
        first = next(iter(of_target.values()))
        a = np.zeros((layers, first["A"].shape[1], rank), np.float32)
        b = np.zeros((layers, rank, first["B"].shape[0]), np.float32)
        for layer, sides in of_target.items():
            own = modules.rank_of(_module(layer, target))
            factor = modules.scale_of(_module(layer, target)) / scale if scale else 1.0
            # [r, in] -> [in, r]; what a smaller rank leaves is zero, and adds nothing.
            a[layer, :, :own] = sides["A"].T
            # [out, r] -> [r, out]; another scale is multiplied in float64, so that it is rounded once.
            b[layer, :own] = sides["B"].T if factor == 1 else sides["B"].T.astype(np.float64) * factor
        arrays[f"{stem(target)}.lora_a"], arrays[f"{stem(target)}.lora_b"] = a, b
    # Only names that tell layers apart can have no module in any deeper layer.
    partial = not any(of_layer(layer) for layer in range(layers, layers + DEEPEST))
    return Lora(config, arrays, partial=partial, source=str(path.parent))


def _module(layer: int, target: str) -> str:
    return f"model.layers.{layer}.{PROJECTIONS[target]}.{target}"


def _key(layer: int, target: str, side: str) -> str:
    return f"base_model.model.{_module(layer, target)}.lora_{side}.weight"


def _check(found: dict, wanted: list[tuple[int, str]], modules: Modules, path: Path) -> None:
    """Every module that the config names has both tensors, of its rank, and as wide as in other layers."""
    sizes: dict[tuple[str, str], tuple[str, int]] = {}
    for layer, target in wanted:
        rank = modules.rank_of(_module(layer, target))
        for side, axis in (("A", 0), ("B", 1)):
            key = _key(layer, target, side)
            x = found.get((layer, target), {}).get(side)
            if x is None:
                raise UserError(f"{path} lacks tensor {key!r} of rank {rank}; get it again")
            if x.ndim != 2 or x.shape[axis] != rank:
                raise UserError(f"{path}: tensor {key!r} is {list(x.shape)}, but {CONFIG_FILE} says rank {rank}")
            other, size = sizes.setdefault((target, side), (key, x.shape[1 - axis]))
            if size != x.shape[1 - axis]:
                raise UserError(
                    f"{path}: tensor {key!r} is {list(x.shape)}, which is not as wide as {other!r} with {size}"
                )
    if not wanted:
        raise UserError(f"{path}: {CONFIG_FILE} gives none of {', '.join(PROJECTIONS)} of a layer a LoRA")


def pack(adapter: Lora) -> dict[str, np.ndarray]:
    """Tensors with PEFT's keys and shapes; the inverse of `unpack`."""
    tensors = {}
    for name, x in adapter.arrays.items():
        if name == COMP:
            tensors[COMP_KEY] = x
            continue
        target, leaf = name.split(".")[-2:]
        for layer in range(x.shape[0]):
            tensors[_key(layer, target, leaf[-1].upper())] = x[layer].T
    return tensors


def is_conditional(adapter: Lora) -> bool:
    """Whether the LoRA is known to act on some tokens only, and PEFT would run it on all."""
    return adapter.method is not None and bool(adapter.method["gate"]) and "TEXT" not in adapter.method["gate"]


def config_bytes(adapter: Lora, **more: Any) -> bytes:
    """``adapter_config.json``, with the fields of PEFT 0.4 (which newer ones read), and ``more``.

    Raises:
      UserError: for an adapter without LoRA.
    """
    config = adapter.config
    if not config.rank:
        raise UserError("an adapter of rank 0 has no LoRA, and PEFT's layout cannot say so; save it in our own format")
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": (adapter.base or {}).get("name") or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": [*range(depth(adapter.arrays))] if adapter.partial else None,
        # PEFT declares an integer.
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "revision": None,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
    }
    return (json.dumps(fields | more, indent=2) + "\n").encode()


def tensor_bytes(tensors: dict[str, np.ndarray], adapter: Lora) -> bytes:
    """A safetensors file that carries what the config file has no field for."""
    about = {"method": adapter.method, "base": adapter.base, "extra": adapter.extra}
    # Transformers refuses a file whose metadata does not name its framework.
    metadata = {"format": "pt", METADATA: json.dumps(about)}
    return safetensors_bytes(tensors, metadata)


def known(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Method, base and extra as `tensor_bytes` wrote them; nothing for a file of another program."""
    if METADATA not in metadata:
        return {}
    where = f"{path}: its metadata {METADATA!r}"
    return belonging(parse_json(metadata[METADATA], where), where)
