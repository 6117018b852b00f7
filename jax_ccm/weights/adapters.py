"""Adapters in and out: one door for our own format, PEFT's layout, and that of the CCM paper's code.

Our own format is a folder with ``adapter.safetensors`` (arrays by parameter path, float32, layers stacked) and
``adapter.json``: what the adapter is (rank, alpha, tokens, ...), which method it was trained for, and on which base
model. Loading it for another method or another base is an error. Of foreign formats as much is checked as they tell.
Beside these files may lie ``config.yaml``, the experiment that it was trained in, and ``README.md``, its model card.

    adapter = Adapter.read(path, method=method)                          # any format
    model = adapter.onto(load_model(source), method=method, base=source)
    Adapter.of(model, method=method, base=source).write(path)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx

import jax_ccm
from jax_ccm.distributed import processes
from jax_ccm.errors import UserError, unknown
from jax_ccm.nn import AdapterConfig, Transformer, abstract_transformer
from jax_ccm.records import paths
from jax_ccm.records.parsing import fits, read_json
from jax_ccm.rules.describe import describe_method, label
from jax_ccm.rules.types import Method
from jax_ccm.weights import peft, reference
from jax_ccm.weights.folders import read_tensors, safetensors_bytes, write_folder
from jax_ccm.weights.hf import parameters
from jax_ccm.weights.identity import check_base, check_method, describe_base
from jax_ccm.weights.lora import COMP, Lora, belonging, depth, names, stem
from jax_ccm.weights.merging import add_low_rank
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


class Adapter(Lora):
    """A trained adapter: read from files of any format or taken out of a model, written, and put onto a model."""

    @classmethod
    def read(cls, path: str | Path, *, method: Method | None = None, format: Format | None = None) -> Adapter:
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
        format = format or format_of(path)
        if format == "own":
            found = _read_own(path)
        elif format == "peft":
            found = peft.read_peft(path)
        elif format == "reference":
            found = reference.read_reference(path, method)
        else:
            raise unknown("adapter format", format, FORMATS)
        adapter = cls(**vars(found))
        # What lies beside it (`loading.TRAINED_BASE`) is found from there: the copy on this machine holds the adapter
        # alone.
        if paths.is_remote(given):
            adapter = dataclasses.replace(adapter, source=given)
        if method is not None:
            adapter.check(method)
        return adapter

    @classmethod
    def of(cls, model: Transformer, *, method: Method, base: str, extra: dict[str, Any] | None = None) -> Adapter:
        """The adapter of a model, on the host, with what it belongs to.

        Args:
          model: the model.
          method: the method it was trained for.
          base: what a person calls the base model, usually its source.
          extra: JSON values to keep with it.

        Raises:
          UserError: if the model has no adapter, or the method another number of tokens.
        """
        # LoRAParam is the type of the embeddings of compression tokens, too.
        trained = parameters(nnx.state(model, nnx.LoRAParam))
        if model.adapter is None or not trained:
            raise UserError("this model has no adapter; build it with an AdapterConfig")
        arrays = {path: processes.whole(x).astype(np.float32) for path, x in trained.items()}
        about = {"method": describe_method(method), "base": describe_base(model, base), "extra": extra or {}}
        adapter = cls(model.adapter, arrays, **about)
        _check_tokens(adapter, method, "the model's adapter")
        return adapter

    def write(
        self,
        path: str | Path,
        *,
        format: Format = "own",
        stored: Stored = "float32",
        beside: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Writes the adapter as a whole or not at all.

        In a run of several processes all call it, and the first writes.

        Args:
          path: the folder; an adapter of the same format that is there is replaced.
          format: "own", "peft" or "reference".
          stored: type of the numbers in the file. Rounded to bfloat16 it is half as large; in memory it is float32
            again.
          beside: content of other files that go with it, by name (`BESIDE`).

        Returns:
          The folder.

        Raises:
          UserError: if the folder holds other files, or the format cannot express the adapter.
        """
        writers = {"own": _own_files, "peft": peft.peft_files, "reference": reference.reference_files}
        if format not in writers:
            raise unknown("adapter format", format, FORMATS)
        path = paths.of(path)
        # Arrays of an `Adapter` are on the host and whole, so that the others have nothing to give.
        if not processes.is_first():
            return path
        adapter = self
        if stored == "bfloat16":
            rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in self.arrays.items()}
            adapter = dataclasses.replace(self, arrays=rounded)
        write_folder(path, {**writers[format](adapter), **(beside or {})}, _FILES[format] | BESIDE)
        return path

    def check(self, method: Method) -> None:
        """Raises `UserError` if the adapter cannot serve a method."""
        if self.method is not None:
            check_method(self.method, method, self.source)
        _check_tokens(self._for(method), method, self.source)

    def trained_on(self, method: Method) -> Adapter:
        """The adapter as a start for another method: said to be for that, with as many compression tokens.

        Each begins as the one that was trained in its place: the first of its kind as the first, and so on; where there
        are more of a kind, the last again and again, since what tells one from the next at first is its position, and
        that it sees those before it. A kind that was not trained begins as the last that closes chunks.

        Raises:
          UserError: if the method has compression tokens, and the adapter none.
        """
        if not self.config.tokens:
            _check_tokens(self, method, self.source)
        described = describe_method(method)
        known, wanted = (_kinds(found) for found in (self.method or described, described))
        there = {row: kind for row, kind in sorted(known.items()) if row < self.config.tokens}
        closing = [row for row, kind in there.items() if kind != REPEATS] or [self.config.tokens - 1]

        def of_kind(kind):
            return [row for row, other in there.items() if other == kind] or closing[-1:]

        # For each row of the new table the row of the trained one that it begins as.
        taken, seen = np.zeros(method.num_embeddings, int), dict.fromkeys(wanted.values(), 0)
        for row, kind in sorted(wanted.items()):
            rows = of_kind(kind)
            taken[row] = rows[min(seen[kind], len(rows) - 1)]
            seen[kind] += 1
        return dataclasses.replace(self._with_rows(taken), method=described)

    def onto(
        self,
        model: Transformer,
        *,
        method: Method,
        base: str = "",
        accept_quantised_base: bool = False,
        shardings: Any = None,
    ) -> Transformer:
        """The model with this adapter.

        Args:
          model: with an adapter of the same shape, which is replaced (its dropout is kept), or without one. Not
            changed.
          method: the method that it is to serve.
          base: what a person calls the model's base, for messages.
          accept_quantised_base: also where the weights of the base are those of another quantisation of the same model,
            such as the original of a GGUF file that the adapter was trained on; a warning says how far they are apart.
          shardings: where its arrays go, a tree of the structure of the resulting model; None for where those lie that
            it replaces, or the default device.

        Returns:
          A new model that shares the base arrays.

        Raises:
          UserError: if the adapter is for another method or base model (both named), or does not fit.
        """
        self.check(method)
        adapter = self._for(method)
        if adapter.base is not None:
            check_base(adapter.base, model, base, adapter.source, accept_quantised=accept_quantised_base)
        adapter = adapter._with_depth(model.config.num_layers)
        if model.adapter is not None:
            _require_shape(adapter, model.adapter)
        # The model's own for its dropout; the shapes are the same.
        config = model.adapter or adapter.config
        _require_arrays(adapter, model, config)
        # By path, since a model without an adapter has other leaves than the one that results.
        there = parameters(nnx.state(model, nnx.LoRAParam) if shardings is None else shardings)

        def sharding_of(path):
            return there[path].sharding if shardings is None and path in there else there.get(path)

        arrays = {path: jax.device_put(x, sharding_of(path)) for path, x in adapter.arrays.items()}
        return model.with_adapter(config, arrays)

    def merged_into(self, model: Transformer, *, base: str = "", accept_quantised_base: bool = False) -> Transformer:
        """The model with a plain LoRA in its base weights, ``W + (alpha / r) A B``: stage 1 of the paper's recipe.

        Computed in float32, then rounded to the dtype of the weights.

        Args:
          model: the base model; an adapter that it has stays as it is. Not changed.
          base: what a person calls it, for messages.
          accept_quantised_base: as for `onto`.

        Raises:
          UserError: for an adapter with compression tokens, for another base model, or that does not fit.
        """
        if self.base is not None:
            check_base(self.base, model, base, self.source, accept_quantised=accept_quantised_base)
        if self.config.tokens:
            raise UserError(
                f"{self.source} is a compression adapter with {self.config.tokens} compression tokens. Its LoRA acts "
                "on those tokens only and cannot be merged; only a plain LoRA (stage 1) can"
            )
        adapter = self._with_depth(model.config.num_layers)
        graphdef, state = nnx.split(model)
        leaves = parameters(state)
        for target in adapter.config.targets if adapter.config.rank else ():
            path = stem(target)
            kernel, a, b = leaves[f"{path}.kernel"], adapter.arrays[f"{path}.lora_a"], adapter.arrays[f"{path}.lora_b"]
            # kernel [L, in, out], A [L, in, r], B [L, r, out]
            if kernel.shape != (a.shape[0], a.shape[1], b.shape[2]):
                raise UserError(
                    f"{adapter.source} does not fit this model: tensors {path + '.lora_a'!r} {list(a.shape)} and "
                    f"lora_b {list(b.shape)} against a weight of {list(kernel.shape)}"
                )
            merge = jax.jit(add_low_rank, static_argnames="scale", out_shardings=kernel.sharding)
            leaves[f"{path}.kernel"] = merge(kernel, a, b, scale=adapter.config.scale)
        # `parameters` keeps the order of the leaves.
        return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), list(leaves.values())))

    def _for(self, method: Method) -> Adapter:
        """With only the rows that a method that it fits uses: the first; it may have been trained with more."""
        rows = method.num_embeddings
        return self if self.method is None or self.config.tokens <= rows else self._with_rows(np.arange(rows))

    def _with_rows(self, taken: np.ndarray) -> Adapter:
        """With some of its compression tokens, by their numbers, in this order."""
        config = dataclasses.replace(self.config, tokens=len(taken))
        arrays = {path: self.arrays[path][taken] if path == COMP else self.arrays[path] for path in names(config)}
        return dataclasses.replace(self, config=config, arrays=arrays)

    def _with_depth(self, layers: int) -> Adapter:
        """A `partial` adapter with zeros for the layers behind its last; others as they are."""
        more = layers - depth(self.arrays)
        if not self.partial or more < 0:
            return self

        def pad(path, x):
            return x if path == COMP else np.pad(x, ((0, more), (0, 0), (0, 0)))

        return dataclasses.replace(self, arrays={path: pad(path, x) for path, x in self.arrays.items()})


REPEATS = "repeats"


def _kinds(described: Mapping[str, Any]) -> dict[int, str]:
    """What each row of the embeddings is for: the kind of its token, or that it asks for a repetition."""
    repeat = described.get("repeat")
    found = {repeat["embedding_index"]: REPEATS} if repeat else {}
    return found | {token["embedding_index"]: token["kind"] for token in described.get("closes") or ()}


def load_adapter(
    source: str | Path,
    model: Transformer,
    *,
    method: Method,
    base: str = "",
    accept_quantised_base: bool = False,
) -> Transformer:
    """The model with an adapter that was saved: `Adapter.read` and `Adapter.onto`, whose arguments and errors it has.

    Args:
      source: a folder of any format, a name, or a hub id.
      model: with an adapter of the same shape, which is replaced, or without one. Not changed.
      method: the method that it is to serve.
      base: what a person calls the model's base, for messages.
      accept_quantised_base: also onto another quantisation of the same base.

    Returns:
      A new model that shares the base arrays.

    Raises:
      UserError: if the adapter is for another method or base model (both named), does not fit, or cannot be read.
    """
    adapter = Adapter.read(source, method=method)
    return adapter.onto(model, method=method, base=base, accept_quantised_base=accept_quantised_base)


def format_of(path: str | Path) -> Format:
    """The format of an adapter's folder, by the files in it.

    Raises:
      UserError: if it is no folder, or holds no adapter, or more than one.
    """
    path = locate_adapter(path)

    def there(*names):
        return any((path / name).is_file() for name in names)

    found: list[Format] = []
    if there(CONFIG_FILE, TENSOR_FILE):
        found.append("own")
    # Two formats share this file; the name of the tensor file tells them apart.
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


def _own_files(adapter: Lora) -> dict[str, bytes]:
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


def _read_own(folder: Path) -> Lora:
    path = folder / CONFIG_FILE
    about = read_json(path)
    if about.get("format") != _NAME:
        raise UserError(f"{path} does not describe an adapter: its 'format' is {about.get('format')!r}, not {_NAME!r}")
    if about.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {about.get('version')!r} (written by jax_ccm {about.get('library')}); this jax_ccm "
            f"reads version {VERSION}. Install a matching one"
        )
    numbers = dict.fromkeys(("alpha", "dropout"), (int, float))
    if not fits(about, {"adapter": {"rank": int, **numbers, "targets": [str], "tokens": int}, "sha256": str}):
        raise UserError(f"{path} is damaged: it does not say of what shape the adapter is; get it again")
    fields = about["adapter"]
    try:
        config = AdapterConfig(**(fields | {"targets": tuple(fields["targets"])}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from error
    belongs = belonging(about, str(path))
    tensors, _ = read_tensors(folder / TENSOR_FILE)
    if hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest() != about["sha256"]:
        raise UserError(f"{folder / TENSOR_FILE} is not the file that {path} describes; get both again")
    partial = about.get("partial") is True  # older files do not say
    return Lora(config, tensors, **belongs, partial=partial, source=str(folder))


def _require_shape(adapter: Adapter, here: AdapterConfig) -> None:
    """The adapter that a model was built with, and another one that is to take its place, are of one shape."""
    for field in ("rank", "alpha", "tokens", "targets"):
        mine, theirs = getattr(here, field), getattr(adapter.config, field)
        if mine != theirs and not (field == "targets" and set(mine) == set(theirs)):
            raise UserError(
                f"{adapter.source} has {field} {theirs}, but the model was built for {field} {mine}; set the "
                "adapter's values in the config, or build the model with the adapter's own config"
            )


def _require_arrays(adapter: Adapter, model: Transformer, config: AdapterConfig) -> None:
    """The adapter's arrays have the shapes that the model needs."""
    needed = parameters(nnx.state(abstract_transformer(model.config, config, model.precision), nnx.LoRAParam))
    for path, slot in needed.items():
        if slot.shape != adapter.arrays[path].shape:
            owner = (adapter.base or {}).get("name") or "another base model"
            raise UserError(
                f"{adapter.source} is for {owner}: tensor {path!r} is {list(adapter.arrays[path].shape)}, but this "
                f"model needs {list(slot.shape)}"
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
