"""PEFT's layout of an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensors are ``base_model.model.model.layers.{i}.self_attn.{q,k,v,o}_proj.lora_A.weight`` ``[r, in]`` and
``….lora_B.weight`` ``[out, r]``. PEFT has no place for embeddings of compression tokens: they lie beside them in the
same file, as ``base_model.model.model.embed_tokens.comp_embeddings.weight`` ``[n, D]``, where PEFT's own loader passes
them over. What PEFT's config has no field for (method and base model) is JSON in the metadata of the safetensors file,
under ``jax_ccm``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.nn import AdapterConfig
from jax_ccm.parsing import parse_json, read_json
from jax_ccm.weights.folders import read_tensors, safetensors_bytes
from jax_ccm.weights.lora import COMP, Adapter

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
COMP_KEY = "base_model.model.model.embed_tokens.comp_embeddings.weight"
METADATA = "jax_ccm"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

_LORA_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qkvo]_proj)\.lora_([AB])\.weight")
# The reference's older files spell the table differently.
_COMP_KEYS = (COMP_KEY, COMP_KEY.replace("comp_embeddings", "gist_embeddings"))

# Fields of a PEFT config that do not change the computation of a finished adapter, whatever they hold.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
    "target_modules",
}  # fmt: skip
# Fields that do: the values with which they do nothing. Any other field must be empty.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "task_type": ("CAUSAL_LM", None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
_REASONS = {
    "alora_invocation_tokens": "a LoRA that starts at some token",
    "alpha_pattern": "a scale of its own for some layers",
    "bias": "trained biases",
    "fan_in_fan_out": "kernels stored the other way round",
    "init_lora_weights": "an initialisation that also changes the base weights, so that the adapter fits no other base",
    "layer_replication": "repeated layers",
    "layers_to_transform": "a LoRA on some layers only",
    "lora_bias": "a bias in the LoRA",
    "modules_to_save": "whole modules that were trained besides the LoRA",
    "rank_pattern": "a rank of its own for some layers",
    "target_parameters": "a LoRA on bare parameters",
    "task_type": "a head other than the language model's",
    "trainable_token_indices": "trained rows of the vocabulary",
    "use_dora": "DoRA, which also rescales the weights",
    "use_rslora": "the scale alpha / sqrt(r)",
}


def read_peft(folder: Path) -> Adapter:
    """Reads an adapter in PEFT's layout: one of ours, or a plain LoRA of PEFT (which has no compression tokens).

    Raises:
      UserError: for damaged files, features that are not implemented, and tensors that are missing or not known.
    """
    config = read_json(folder / CONFIG_FILE)
    path = folder / TENSOR_FILE
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        path = folder / "adapter_model.bin"
    tensors, metadata = read_tensors(path)
    arrays = unpack(tensors, path)
    rows = arrays[COMP].shape[0] if COMP in arrays else 0
    return Adapter(
        lora_config(config, folder / CONFIG_FILE, tokens=rows),
        arrays,
        **known(metadata, path),
        source=str(folder),
    )


def peft_files(adapter: Adapter) -> dict[str, bytes]:
    """The files of an adapter in PEFT's layout.

    Raises:
      UserError: for an adapter without LoRA, which PEFT cannot express.
    """
    return {
        CONFIG_FILE: config_bytes(adapter),
        TENSOR_FILE: tensor_bytes(pack(adapter), adapter),
    }


def lora_config(config: dict[str, Any], path: Path, *, tokens: int) -> AdapterConfig:
    """The shape and scale of an adapter from PEFT's config.

    Raises:
      UserError: naming the field, if it asks for something that is not implemented.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}; only LORA is implemented")
    for field, value in config.items():
        neutral = value in _NEUTRAL[field] if field in _NEUTRAL else not value
        if field not in _HARMLESS and not neutral:
            reason = f" ({_REASONS[field]})" if field in _REASONS else ""
            raise UserError(f"{path}: {field} is {value!r}{reason}, which is not implemented; refused")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    for field, value in (("r", rank), ("lora_alpha", alpha), ("lora_dropout", dropout)):
        kinds = (int,) if field == "r" else (int, float)
        if type(value) not in kinds or value < (field == "r"):
            need = "an integer from 1" if field == "r" else "a number, not negative"
            raise UserError(f"{path}: {field} is {value!r}; it must be {need}")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not set(targets) <= set(TARGETS):
        raise UserError(f"{path}: target_modules is {targets!r}; implemented is a list out of {', '.join(TARGETS)}")
    try:
        return AdapterConfig(rank, float(alpha), float(dropout), tuple(t for t in TARGETS if t in targets), tokens)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def unpack(tensors: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Arrays by our names, stacked over layers, from a file with PEFT's keys.

    Raises:
      UserError: naming the tensor, if one is missing, not known, or of another shape than its fellows.
    """
    arrays, stacks = {}, {}
    for name, x in tensors.items():
        found = _LORA_KEY.fullmatch(name)
        if found:
            layer, target, side = found.groups()
            stacks.setdefault(f"layers.self_attn.{target}.lora_{side.lower()}", {})[int(layer)] = (name, x)
        elif name in _COMP_KEYS and COMP not in arrays:
            arrays[COMP] = x
        else:
            raise UserError(
                f"{path}: tensor {name!r} {list(x.shape)} is not known. An adapter holds lora_A and lora_B of q_proj, "
                f"k_proj, v_proj, o_proj (base_model.model.model.layers.N.self_attn...) and {COMP_KEY!r}"
            )
    layers = 1 + max((layer for stack in stacks.values() for layer in stack), default=-1)
    for array, stack in stacks.items():
        first, x0 = next(iter(stack.values()))
        for layer in range(layers):
            if layer not in stack:
                name = re.sub(r"layers\.\d+", f"layers.{layer}", first)
                raise UserError(f"{path} lacks tensor {name!r} {list(x0.shape)}; get it again")
            name, x = stack[layer]
            if x.ndim != 2 or x.shape != x0.shape:
                raise UserError(f"{path}: tensor {name!r} is {list(x.shape)}, but {first!r} is {list(x0.shape)}")
        arrays[array] = np.stack([stack[layer][1].T for layer in range(layers)])
    return arrays


def pack(adapter: Adapter) -> dict[str, np.ndarray]:
    """Tensors with PEFT's keys and shapes; the inverse of `unpack`."""
    tensors = {}
    for name, x in adapter.arrays.items():
        if name == COMP:
            tensors[COMP_KEY] = x
            continue
        target, leaf = name.split(".")[-2:]
        for layer in range(x.shape[0]):
            key = f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{leaf[-1].upper()}.weight"
            tensors[key] = x[layer].T
    return tensors


def config_bytes(adapter: Adapter) -> bytes:
    """``adapter_config.json``, with the fields of PEFT 0.4 (which newer ones read).

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
        "layers_to_transform": None,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "revision": None,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def tensor_bytes(tensors: dict[str, np.ndarray], adapter: Adapter) -> bytes:
    """A safetensors file that carries what the config file has no field for."""
    about = {"method": adapter.method, "base": adapter.base, "extra": adapter.extra}
    # Transformers refuses a file whose metadata does not name its framework.
    metadata = {"format": "pt", METADATA: json.dumps(about)}
    return safetensors_bytes(tensors, metadata)


def known(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Method, base and extra as `tensor_bytes` wrote them; nothing for a file of another program."""
    if METADATA not in metadata:
        return {}
    try:
        found = parse_json(metadata[METADATA], f"{path}: its metadata {METADATA!r}")
        return {"method": found["method"], "base": found["base"], "extra": found["extra"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its metadata {METADATA!r} is damaged ({error!r})") from error
