"""Adapters in and out: one door for our own format, PEFT's layout, and that of the CCM paper's code.

Our own format is a folder with ``adapter.safetensors`` (arrays by parameter path, float32, layers stacked) and
``adapter.json``: what the adapter is (rank, alpha, tokens, ...), which method it was trained for, and on which base
model. Loading it for another method or another base is an error. Of foreign formats as much is checked as they tell.
Beside these files may lie ``config.yaml``, the experiment that it was trained in, and ``README.md``, its model card.

    adapter = read_adapter(path, method=method)                          # any format
    model = load_model(source, adapter=adapter.config, key=key)
    model = load_adapter(adapter, model, method=method, base=source)
    save_adapter(path, model, method=method, base=source)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes

import jax_ccm
from jax_ccm.distributed import processes
from jax_ccm.errors import UserError, unknown
from jax_ccm.nn import AdapterConfig, Transformer
from jax_ccm.records import paths
from jax_ccm.records.parsing import read_json
from jax_ccm.rules.describe import describe_method, label, upgraded
from jax_ccm.rules.types import Method
from jax_ccm.weights import lora, peft, reference
from jax_ccm.weights.folders import read_tensors, safetensors_bytes, write_folder
from jax_ccm.weights.identity import check_base, check_method, describe_base
from jax_ccm.weights.lora import COMP, Adapter
from jax_ccm.weights.sources import locate_adapter

Format = Literal["own", "peft", "reference"]
Stored = Literal["float32", "bfloat16"]
FORMATS = ("own", "peft", "reference")
CONFIG_FILE = "adapter.json"
TENSOR_FILE = "adapter.safetensors"
VERSION = 1
_NAME = "jax_ccm adapter"
# What may lie beside the files of any format.
BESIDE = {"config.yaml", "README.md"}

_FILES = {
    "own": {CONFIG_FILE, TENSOR_FILE},
    "peft": {peft.CONFIG_FILE, peft.TENSOR_FILE},
    "reference": {reference.CONFIG_FILE, reference.TENSOR_FILE},
}


def save_adapter(
    path: str | Path,
    model: Transformer,
    *,
    method: Method,
    base: str,
    extra: dict[str, Any] | None = None,
    format: Format = "own",
) -> Path:
    """Writes the adapter of a model in float32, as a whole or not at all.

    In a run of several processes all call it, and the first writes.

    Args:
      path: the folder; an adapter of the same format that is there is replaced.
      model: the model.
      method: the method it was trained for.
      base: what a person calls the base model, usually its source.
      extra: JSON values to keep with it.
      format: "own", "peft" or "reference".

    Returns:
      The folder.

    Raises:
      UserError: if the model has no adapter, the method another number of tokens, or the folder holds other files.
    """
    adapter = adapter_of(model, method=method, base=base, extra=extra)
    return write_adapter(path, adapter, format=format) if processes.is_first() else paths.of(path)


def adapter_of(model: Transformer, *, method: Method, base: str, extra: dict[str, Any] | None = None) -> Adapter:
    """The adapter of a model, with what it belongs to. Arguments and errors as `save_adapter`."""
    adapter = lora.extract(model)
    _check_tokens(adapter, method, "the model's adapter")
    about = {"method": describe_method(method), "base": describe_base(model, base), "extra": extra or {}}
    return dataclasses.replace(adapter, **about)


def write_adapter(
    path: str | Path,
    adapter: Adapter,
    *,
    format: Format = "own",
    stored: Stored = "float32",
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes an adapter without its model, as a whole or not at all.

    Args:
      path: the folder; an adapter of the same format that is there is replaced.
      adapter: the adapter.
      format: "own", "peft" or "reference".
      stored: type of the numbers in the file. Rounded to bfloat16 it is half as large; in memory it is float32 again.
      beside: content of other files that go with it, by name (`BESIDE`).

    Raises:
      UserError: if the folder holds other files, or the format cannot express the adapter.
    """
    writers = {"own": _own_files, "peft": peft.peft_files, "reference": reference.reference_files}
    if format not in writers:
        raise unknown("adapter format", format, FORMATS)
    path = paths.of(path)
    if stored == "bfloat16":
        rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in adapter.arrays.items()}
        adapter = dataclasses.replace(adapter, arrays=rounded)
    write_folder(path, {**writers[format](adapter), **(beside or {})}, _FILES[format] | BESIDE)
    return path


def read_adapter(path: str | Path, *, method: Method | None = None, format: Format | None = None) -> Adapter:
    """Reads an adapter of any format, without a model.

    Args:
      path: the folder, the name of an adapter that comes with the library, or a hub id, ``ORG/NAME`` or
        ``ORG/NAME@REVISION``.
      method: the method it is to serve. It is compared with what the files say, if they do; the reference's format
        cannot be read without it.
      format: None to tell from the files in the folder.

    Raises:
      UserError: for missing, damaged or unknown files, another method, or a feature that is not implemented.
    """
    given, path = str(path), locate_adapter(path)
    format = format or detect_format(path)
    if format == "own":
        adapter = _read_own(path)
    elif format == "peft":
        adapter = peft.read_peft(path)
    elif format == "reference":
        adapter = reference.read_reference(path, method)
    else:
        raise unknown("adapter format", format, FORMATS)
    if paths.is_remote(given):
        adapter = dataclasses.replace(adapter, source=given)
    if method is not None:
        _check_fits(adapter, method)
    return adapter


def load_adapter(
    source: str | Path | Adapter,
    model: Transformer,
    *,
    method: Method,
    base: str = "",
    accept_quantised_base: bool = False,
) -> Transformer:
    """The model with an adapter that was saved.

    Args:
      source: a folder of any format, or what `read_adapter` returned.
      model: with an adapter of the same shape, which is replaced (its dropout is kept), or without one. Not changed.
      method: the method that it is to serve.
      base: what a person calls the model's base, for messages.
      accept_quantised_base: also where the weights of the base are those of another quantisation of the same model,
        such as the original of a GGUF file that the adapter was trained on; a warning says how far they are apart.

    Returns:
      A new model that shares the base arrays.

    Raises:
      UserError: if the adapter is for another method or base model (both named), does not fit, or cannot be read.
    """
    adapter = source if isinstance(source, Adapter) else read_adapter(source, method=method)
    _check_fits(adapter, method)
    adapter = _with_rows(adapter, method)
    if adapter.base is not None:
        check_base(adapter.base, model, base, adapter.source, accept_quantised=accept_quantised_base)
    return lora.attach(model, adapter)


def merge_adapter(
    source: str | Path | Adapter, model: Transformer, *, base: str = "", accept_quantised_base: bool = False
) -> Transformer:
    """The model with a plain LoRA merged into its base weights, ``W + (alpha / r) A B``: stage 1 of the paper's recipe.

    Args:
      source: a folder of any format, or what `read_adapter` returned.
      model: the base model; an adapter that it has stays as it is. Not changed.
      base: what a person calls it, for messages.
      accept_quantised_base: as for `load_adapter`.

    Raises:
      UserError: for an adapter with compression tokens, for another base model, that does not fit or cannot be read.
    """
    adapter = source if isinstance(source, Adapter) else read_adapter(source)
    if adapter.base is not None:
        check_base(adapter.base, model, base, adapter.source, accept_quantised=accept_quantised_base)
    return lora.merge_into_base(model, adapter)


def detect_format(path: str | Path) -> Format:
    """The format of an adapter's folder, by the files in it.

    Raises:
      UserError: if it is no folder, or holds no adapter, or more than one.
    """
    path = locate_adapter(path)
    there = lambda *names: any((path / name).is_file() for name in names)
    found: list[Format] = []
    if there(CONFIG_FILE, TENSOR_FILE):
        found.append("own")
    if there(peft.CONFIG_FILE):
        if there(peft.TENSOR_FILE, "adapter_model.bin"):
            found.append("peft")
        if there(reference.BIN_FILE, reference.TENSOR_FILE):
            found.append("reference")
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds adapters in several formats ({', '.join(found)}); keep one, or give the format")
    files = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path} holds no adapter. Our own is {CONFIG_FILE} with {TENSOR_FILE}; PEFT's {peft.CONFIG_FILE} with "
        f"{peft.TENSOR_FILE}; the reference's {reference.CONFIG_FILE} with {reference.BIN_FILE} or "
        f"{reference.TENSOR_FILE}. There: {files}"
    )


def _own_files(adapter: Adapter) -> dict[str, bytes]:
    tensors = safetensors_bytes(adapter.arrays)
    about = {
        "format": _NAME,
        "version": VERSION,
        "library": jax_ccm.__version__,
        "adapter": dataclasses.asdict(adapter.config),
        "method": adapter.method,
        "base": adapter.base,
        "extra": adapter.extra,
        "partial": adapter.partial,
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    return {CONFIG_FILE: (json.dumps(about, indent=2) + "\n").encode(), TENSOR_FILE: tensors}


def _read_own(folder: Path) -> Adapter:
    path = folder / CONFIG_FILE
    about = read_json(path)
    if about.get("format") != _NAME:
        raise UserError(f"{path} does not describe an adapter: its 'format' is {about.get('format')!r}, not {_NAME!r}")
    if about.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {about.get('version')!r} (written by jax_ccm {about.get('library')}); this jax_ccm "
            f"reads version {VERSION}. Install a matching one"
        )
    try:
        fields = about["adapter"]
        config = AdapterConfig(**(fields | {"targets": tuple(fields["targets"])}))
        method, base, extra, digest = _method(about, path), about["base"], about["extra"], about["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from error
    tensors, _ = read_tensors(folder / TENSOR_FILE)
    if hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest() != digest:
        raise UserError(f"{folder / TENSOR_FILE} is not the file that {path} describes; get both again")
    partial = about.get("partial") is True  # older files do not say
    return Adapter(config, tensors, method, base, extra, partial, source=str(folder))


def _method(about: dict[str, Any], path: Path) -> dict[str, Any] | None:
    return None if about["method"] is None else upgraded(about["method"], str(path))


def _check_fits(adapter: Adapter, method: Method) -> None:
    if adapter.method is not None:
        check_method(adapter.method, method, adapter.source)
    _check_tokens(_with_rows(adapter, method), method, adapter.source)


def _with_rows(adapter: Adapter, method: Method) -> Adapter:
    """The adapter with only the rows that a method that it fits uses: the first; it may have been trained with more."""
    if adapter.method is None or adapter.config.tokens <= method.num_embeddings:
        return adapter
    arrays = {path: x[: method.num_embeddings] if path == COMP else x for path, x in adapter.arrays.items()}
    return dataclasses.replace(
        adapter, config=dataclasses.replace(adapter.config, tokens=method.num_embeddings), arrays=arrays
    )


def _check_tokens(adapter: Adapter, method: Method, source: str) -> None:
    have, need = adapter.config.tokens, method.num_embeddings
    if have == need:
        return
    if not have:
        raise UserError(
            f"{source} is a plain LoRA without compression tokens, but method {label(describe_method(method))} needs "
            f"{need}. Use it with method 'full', or merge it into the base model first (stage 1)"
        )
    raise UserError(
        f"{source} has {have} compression tokens, but method {label(describe_method(method))} has {need}; "
        "use the method that it was trained for"
    )
