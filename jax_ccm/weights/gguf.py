"""Models in GGUF files (llama.cpp): config from the metadata, tensors dequantised row by row.

llama.cpp rotates neighbouring pairs of dimensions where Hugging Face rotates the two halves of a head, so its
converter reorders the rows of the query and key projections of Llama models. They are put back here.

What the file does not say cannot be restored: the converter writes Mistral models as Llama and leaves out the sliding
window of Mistral 7B v0.1, so that such a file is read, as llama.cpp does, as one with full attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, RopeScaling, rope
from jax_ccm.weights.gguf_names import ARCHITECTURES, FULL_EVERY, WIDE_QUERIES, gguf_name, hf_name
from jax_ccm.weights.hf import Index

_ROPE_FACTORS = "rope_freqs.weight"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # as llama-gguf-split names the parts of a model

# Metadata of an architecture that is read below, or says nothing that the tensors do not say.
_KNOWN = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
# Metadata that says nothing at these values.
_NEUTRAL = {
    "rope.scaling.attn_factor": 1.0, "attention.causal": True, "use_parallel_residual": False, "logit_scale": 1.0,
    "expert_count": 0, "expert_used_count": 0, "pooling_type": 0,
}  # fmt: skip


class GgufFile:
    """A model in a GGUF file, or in the parts of one; a `Tensors` under Hugging Face's names.

    Attributes:
      path: the file; of a model in parts the first, which holds the metadata.
      files: all files.
      metadata: all key/value pairs.
      config: the model's shape.
      shapes: of the tensors, by Hugging Face's names; a name that is not understood stays as it is in the file.
    """

    def __init__(self, path: Path):
        """Reads metadata and the list of tensors. `open` does the same and remembers the last file.

        Raises:
          UserError: if the file is damaged, of an unsupported architecture, or asks for what is not implemented.
        """
        parts = _parts(path)
        self.files = tuple(parts)
        self.path = self.files[0]
        self.metadata = parts[self.path].metadata
        found = [(file, tensor) for file, part in parts.items() for tensor in part.tensors]
        self._arch = self.metadata.get("general.architecture")
        self._tensors = {hf_name(tensor.name, self._arch): tensor for _, tensor in found}
        self._file = {hf_name(tensor.name, self._arch): file for file, tensor in found}
        # GGUF names the innermost dimension first.
        self.shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        try:
            self.config = self._config()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error
        for file, tensor in found:
            if tensor.tensor_type not in tensor_types():
                raise UserError(
                    f"tensor {tensor.name!r} in {file} is of type {tensor.tensor_type.name}; readable: "
                    f"{', '.join(kind.name for kind in tensor_types())}. Take another quantisation of the model"
                )
        # Read into the config above, and no parameter of the model.
        self.shapes.pop(_ROPE_FACTORS, None)

    @staticmethod
    def open(path: Path) -> GgufFile:
        """The file at ``path``; the last one is kept, since parsing the vocabulary takes seconds.

        Args:
          path: a file, or any part of a model in parts; the others are beside it.
        """
        match = _PART.fullmatch(path.name)
        files = sorted(path.parent.glob(f"{glob.escape(match[1])}-*-of-{match[3]}.gguf")) if match else [path]
        # Sizes and times of change are part of the key, so that a file that was replaced is read anew.
        return _open(path, tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))

    def describe(self, name: str) -> str:
        return repr(gguf_name(name, self._arch))

    def file(self, name: str) -> Path:
        return self._file.get(name, self.path)

    def read(self, name: str, index: Index) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        rows = self.row_order(name)
        # Blocks of a quantised tensor lie within a row, so rows may be picked before they are dequantised.
        data = tensor.data[index[0]] if rows is None else tensor.data[rows[index[0]]]
        values = gguf.dequantize(data, tensor.tensor_type)[(slice(None), *index[1:])]
        # llama.cpp's converter adds the 1 of norms that multiply by 1 + weight.
        return values - 1 if self.config.norm_offset and name.endswith("norm.weight") else values

    def row_order(self, name: str) -> np.ndarray | None:
        """Where in the file each row of a tensor is, or None for rows in order.

        llama.cpp's converter turns the rows of a head from (half, pair) into (pair, half) order, for queries and
        keys of Llama models only, weights and biases alike.
        """
        part = name.split(".")[-2]
        if self._arch != "llama" or part not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_heads if part == "q_proj" else self.config.num_kv_heads
        rows = np.arange(self.shapes[name][0])
        # [N, H / 2, 2] -> [N, 2, H / 2]
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _config(self) -> ModelConfig:
        if self._arch not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: GGUF architecture {self._arch!r} is not supported; supported: "
                f"{', '.join(ARCHITECTURES)} (Mistral and SmolLM2 are stored as llama)"
            )
        prefix = self._arch + "."
        for key, value in self.metadata.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in _KNOWN and value != _NEUTRAL.get(name):
                raise UserError(
                    f"{self.path}: metadata {key!r} = {value!r} may change the computation, and is not implemented"
                )
        if "model.embed_tokens.weight" not in self.shapes:
            raise UserError(f"{self.path} lacks tensor 'token_embd.weight'; it is not a whole language model")
        heads, hidden = self._int("attention.head_count"), self._int("embedding_length")
        head_dim = self._int("attention.key_length", hidden // heads)
        rotated = self._int("rope.dimension_count", head_dim)
        if self._int("attention.value_length", head_dim) != head_dim or rotated != head_dim and self._arch != "phi3":
            raise UserError(
                f"{self.path}: the head dimension is {head_dim}, but {prefix}attention.value_length is "
                f"{self._int('attention.value_length', head_dim)} and {prefix}rope.dimension_count is {rotated}; "
                "different sizes, and rotary embedding of a part of a head, are not implemented"
            )
        window = self._int("attention.sliding_window", 0) or None
        layers = self._int("block_count")

        # Biases and a head of its own are told by tensors that are there, not by metadata.
        def bias(part):
            return f"model.layers.0.{part}.bias" in self.shapes

        config = ModelConfig(
            **self._of_architecture(layers, width=hidden // heads, head_dim=head_dim, windowed=window is not None),
            vocab_size=self.shapes["model.embed_tokens.weight"][0],
            hidden_size=hidden,
            intermediate_size=self._int("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self._int("attention.head_count_kv", heads),
            head_dim=head_dim,
            norm_eps=self._float("attention.layer_norm_rms_epsilon"),
            rope_theta=self._float("rope.freq_base", 10000.0),
            rope_scaling=self._scaling(),
            tie_embeddings="lm_head.weight" not in self.shapes,
            qkv_bias=bias("self_attn.q_proj"),
            o_bias=bias("self_attn.o_proj"),
            mlp_bias=bias("mlp.gate_proj"),
            sliding_window=window,
            max_position=self._int("context_length"),
            rotary_factor=rotated / head_dim,
        )
        if _ROPE_FACTORS in self._tensors:
            config = _with_factors(config, self._tensors[_ROPE_FACTORS].data, self.metadata, self.path)
        return config

    def _of_architecture(self, layers: int, *, width: int, head_dim: int, windowed: bool) -> dict[str, Any]:
        """The fields of the config that follow from the architecture."""
        # Mistral is stored as llama; what tells them apart in Hugging Face's format is the window.
        family = "mistral" if self._arch == "llama" and windowed else self._arch
        fields: dict[str, Any] = {"family": family} | ARCHITECTURES[self._arch]
        if windowed and self._arch in FULL_EVERY:
            period = FULL_EVERY[self._arch]
            fields["full_layers"] = tuple(number for number in range(layers) if (number + 1) % period == 0)
            fields["query_scalar"] = width if layers == WIDE_QUERIES[self._arch] else head_dim
        if self._arch == "gemma2":
            fields["score_cap"] = self._float("attn_logit_softcapping", 50.0)
            fields["logit_cap"] = self._float("final_logit_softcapping", 30.0)
        return fields

    def _float(self, name: str, default: float | None = None) -> float:
        """A number of this architecture's metadata."""
        key = f"{self._arch}.{name}"
        value = self.metadata.get(key, default)
        # Some files give a number for each layer; here all layers have the same.
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            given = "is missing" if value is None else f"is {value!r}"
            given = "differs between layers" if isinstance(value, list) else given
            raise UserError(f"{self.path}: metadata {key!r} {given}; expected one number")
        # float32 in the file: 1e-5 must not become 9.999999747e-06.
        return float(value if isinstance(value, int) else str(np.float32(value)))

    def _int(self, name: str, default: int | None = None) -> int:
        value = self._float(name, default)
        if value < (0 if default == 0 else 1) or value != int(value):
            raise UserError(f"{self.path}: metadata '{self._arch}.{name}' is {value}; expected a positive whole number")
        return int(value)

    def _scaling(self) -> RopeScaling | None:
        kind = self.metadata.get(f"{self._arch}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "linear":
            raise UserError(f"{self.path}: rope scaling {kind!r} is not supported; supported: none, linear, llama3")
        factor = self._float("rope.scaling.factor", 1.0)
        return RopeScaling("linear", factor) if factor != 1.0 else None


@functools.lru_cache(maxsize=1)
def _open(path: Path, files: tuple[tuple[Path, int, int], ...]) -> GgufFile:
    return GgufFile(path)


@functools.cache
def tensor_types() -> tuple[Any, ...]:
    """The types that the gguf package dequantises, as `gguf.GGMLQuantizationType`."""
    import gguf

    readable = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):  # so gguf says that it cannot read a type
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
            readable.append(kind)
    return tuple(readable)


@dataclasses.dataclass(frozen=True)
class _Part:
    metadata: dict[str, Any]
    tensors: list[Any]


@functools.cache
def _reader() -> type:
    """`gguf.GGUFReader` over a plain array of the mapped file.

    It takes a slice for each entry of the vocabulary, and one of `numpy.memmap` costs several times as much.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    return Reader


def _read(path: Path) -> _Part:
    try:
        reader = _reader()(path)
        return _Part({name: field.contents() for name, field in reader.fields.items()}, reader.tensors)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError) as error:
        size = path.stat().st_size
        raise UserError(f"{path} ({size} bytes) is not a whole GGUF file: {error}; get it again") from error


def _parts(path: Path) -> dict[Path, _Part]:
    """The file at ``path``, or all parts of the model that it is one of, in order.

    Raises:
      UserError: for a damaged or missing part, and for parts that do not belong together.
    """
    given = _read(path)
    count = given.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return {path: given}
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts, and does not bear the name of one, by which the others are found; name "
            f"them NAME-00001-of-{count:05d}.gguf to NAME-{count:05d}-of-{count:05d}.gguf again"
        )
    files = [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path} is one of {count} parts, and {', '.join(missing)} is not beside it; get it, too")
    parts = {file: given if file == path else _read(file) for file in files}
    first = parts[files[0]].metadata
    for number, (file, part) in enumerate(parts.items()):
        # Numbered from 1 in the names, from 0 in the metadata.
        place = part.metadata.get("split.no"), part.metadata.get("split.count")
        if place != (number, count):
            raise UserError(f"{file} says split.no, split.count = {place}, not {(number, count)}; get it again")
        # Of the keys that the reader adds (GGUF.), the number of tensors differs between parts.
        shared = [key for key in part.metadata.keys() & first if not key.startswith(("split.no", "GGUF."))]
        odd = sorted(key for key in shared if part.metadata[key] != first[key])
        if odd:
            raise UserError(f"{file} and {files[0]} are parts of different models: they differ in {odd[0]!r}")
    names = [tensor.name for part in parts.values() for tensor in part.tensors]
    total = first.get("split.tensors.count", len(names))
    if len(names) != total or len(set(names)) != total:
        raise UserError(
            f"the {count} parts of {files[0]} hold {len(names)} tensors under {len(set(names))} names, and "
            f"split.tensors.count is {total}; they are not parts of one model: get them again"
        )
    return parts


def _with_factors(config: ModelConfig, factors: np.ndarray, metadata: dict, path: Path) -> ModelConfig:
    """The config with the Llama 3.1 scaling that ``rope_freqs.weight`` holds as one divisor for each pair.

    The file does not hold the four numbers behind the divisors. All Llama 3.1, 3.2 and 3.3 models have the same band
    edges; if those give other divisors than the file's, there is no saying what they mean.
    """
    if np.all(factors == 1.0):
        return config
    key = f"{metadata['general.architecture']}.rope.scaling.original_context_length"
    scaling = RopeScaling("llama3", float(np.max(factors)), 1.0, 4.0, int(metadata.get(key, 8192)))
    plain = dataclasses.replace(config, rope_scaling=None)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    # [H / 2]
    expected = rope.frequencies(plain) / rope.frequencies(scaled)
    fits = factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4)
    if config.rope_scaling is not None or not fits:
        raise UserError(
            f"{path}: the frequency factors in {_ROPE_FACTORS!r} are not those of Llama 3.1 scaling (low 1, high 4, "
            f"original context {scaling.original_max_position}); other factors are not implemented"
        )
    return scaled
