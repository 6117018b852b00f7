"""The base model: config and weights from any source, straight to arrays on their devices."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jax_ccm.errors import UserError
from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer, abstract_transformer
from jax_ccm.nn.transformer import initial_comp_embeddings
from jax_ccm.numerics import Precision, resolved
from jax_ccm.weights import hf_config
from jax_ccm.weights.gguf import GgufFile
from jax_ccm.weights.hf import Index, Safetensors, Tensors, base_parameters, hf_name, parameters, split
from jax_ccm.weights.sources import CONFIG_FILES, locate

logger = logging.getLogger(__name__)

# Rows of a tensor that are read at once, and how many threads read: what is in the making takes some hundred MiB.
PIECE, READERS = 4096, min(os.cpu_count() or 1, 8)


def read_config(source: str | Path, rope_length: int | None = None) -> ModelConfig:
    """The shape of the model that ``source`` names.

    Args:
      source: a local folder, a hub id, a ``.gguf`` file, or ``package:NAME/FILE.gguf``.
      rope_length: positions that sessions will reach, for models whose rope depends on it (`RopeScaling.length`).

    Raises:
      UserError: if there is nothing there, the model is of a kind that is not implemented, or its rope does not depend
        on a length that is given.
    """
    path = locate(source, CONFIG_FILES)
    config = GgufFile.open(path).config if path.is_file() else hf_config.read(path / "config.json")
    return _for_length(config, rope_length, path)


def _for_length(config: ModelConfig, length: int | None, path: Path) -> ModelConfig:
    try:
        return config.for_length(length)
    except ValueError as error:
        raise UserError(f"{path}: model.rope_length is {length}, but {error}") from error


def load_model(
    source: str | Path,
    *,
    adapter: AdapterConfig | None = None,
    precision: str | Precision = "auto",
    key=None,
    shardings=None,
    rope_length: int | None = None,
) -> Transformer:
    """Loads a base model, and puts a fresh adapter beside it.

    Each parameter is read from disk when its array is made, only the slices that the devices of this process
    hold, and no random base model is ever allocated.

    Args:
      source: a local folder, a hub id, a ``.gguf`` file, or ``package:NAME/FILE.gguf``.
      adapter: the adapter to initialise, or None. LoRA starts as the identity; embeddings of compression tokens
        start as `initial_comp_embeddings` of the loaded table. Always float32.
      precision: types of the base's weights, of products and of activations (`jax_ccm.numerics.Precision`); "auto" for
        what is fastest on the default backend, which is logged with the reason (INFO). Weights that are to be trained
        themselves need float32.
      key: PRNG key of the adapter's initialisation; required with an adapter.
      shardings: where the arrays go: None for the default device, one `jax.sharding.Sharding` for all of them, or a
        tree of the structure of `abstract_transformer` (or its state) with a sharding for each.
      rope_length: as for `read_config`.

    Raises:
      UserError: for a missing, truncated or unexpected file or tensor, a wrong shape, an unsupported architecture.
      ValueError: for an adapter without a key, or shardings that do not match the model.
    """
    if adapter is not None and key is None:
        raise ValueError("load_model got an adapter but no PRNG key; pass key=jax.random.key(seed)")
    path = locate(source)
    tensors: Tensors
    if path.is_file():
        tensors = GgufFile.open(path)
        config = tensors.config
    else:
        config = hf_config.read(path / "config.json")
        tensors = Safetensors(path)
    config = _for_length(config, rope_length, path)
    tensors = split(tensors, config)
    precision, reason = resolved(precision, jax.default_backend())
    if reason:
        logger.info(f"{source}: precision {precision} ({reason})")
    target = abstract_transformer(config, adapter, precision)
    sharding_of = _shardings(target, shardings)
    # Names and shapes come first: nothing large is read of a model that is refused.
    _check(target, config, tensors)
    arrays = {
        name: _place(leaf, sharding_of[name], functools.partial(_read_parameter, tensors, name))
        for name, leaf in base_parameters(target).items()
    }
    if adapter is not None:
        arrays |= _fresh_adapter(key, config, adapter, sharding_of, arrays["embed_tokens.embedding"])
    leaves = [arrays[name] for name in parameters(target)]
    # The model is put together without its constructor, which would make random weights.
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _shardings(target: Transformer, shardings) -> dict[str, jax.sharding.Sharding]:
    names = list(parameters(target))
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(names, shardings)
    sharding_of = parameters(shardings)
    if set(sharding_of) != set(names):
        odd = sorted(set(sharding_of) ^ set(names))
        raise ValueError(f"the shardings do not have the structure of the model; they differ in {', '.join(odd[:5])}")
    return sharding_of


def _check(target: Transformer, config: ModelConfig, tensors: Tensors) -> None:
    """Every tensor that the model needs is there with the right shape, and no other."""
    expected = {}
    for path, leaf in base_parameters(target).items():
        stacked = path.startswith("layers.")
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if path.endswith(".kernel") else shape
        for layer in range(leaf.shape[0] if stacked else 1):
            expected[hf_name(path).format(layer=layer)] = shape
    missing = [name for name in expected if name not in tensors.shapes]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = ". If the head is the transposed embedding, the config must say so (tie_word_embeddings: true)"
        raise UserError(f"{tensors.file(missing[0])} lacks {_some(missing, tensors)}{hint}")
    # Old Llama files hold the frequencies of the rotary embedding as a tensor; they follow from the config.
    unexpected = [name for name in tensors.shapes if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings and "lm_head.weight" in unexpected:
        _check_tied(tensors)
        unexpected.remove("lm_head.weight")
    if unexpected:
        raise UserError(
            f"{tensors.file(unexpected[0])} holds {_some(unexpected, tensors)} that a {config.family} model of this "
            "config does not have; leaving it out could change the result, so the model is refused"
        )
    for name, shape in expected.items():
        if tensors.shapes[name] != shape:
            raise UserError(
                f"tensor {tensors.describe(name)} in {tensors.file(name)} has shape {list(tensors.shapes[name])}, but "
                f"the config asks for {list(shape)}"
            )


def _some(names: list[str], tensors: Tensors) -> str:
    shown = ", ".join(tensors.describe(name) for name in names[:3])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors ({shown}{', ...' * (len(names) > 3)})"


def _check_tied(tensors: Tensors) -> None:
    """A tied model may store its head nonetheless, as long as it is the embedding."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    same = tensors.shapes[head] == tensors.shapes[table]
    rows = tensors.shapes[table][0]
    # In blocks, since each table may have gigabytes.
    for start in range(0, rows if same else 0, 8192):
        index = (slice(start, min(start + 8192, rows)), slice(None))
        same = same and np.array_equal(tensors.read(head, index), tensors.read(table, index))
    if not same:
        raise UserError(
            f"{tensors.file(head)}: the config ties the head to the embedding, but tensor {tensors.describe(head)} "
            f"differs from {tensors.describe(table)}; set tie_word_embeddings to false if the head is to be used"
        )


def _read_parameter(tensors: Tensors, path: str, out: np.ndarray, index: Index) -> None:
    """Fills ``out`` with the slice ``index`` of a parameter, stacking and transposing.

    Pieces are read side by side: numpy dequantises, converts and copies without the interpreter's lock.
    """
    if path.startswith("layers."):
        # One tensor for each layer of the stack: its name, its place in the stack, and the slice of it that is asked
        # for.
        parts = [(hf_name(path).format(layer=index[0].start + n), out[n], index[1:]) for n in range(out.shape[0])]
    else:
        parts = [(hf_name(path), out, index)]
    if path.endswith(".kernel"):
        # Kernels are [out, in] in the file. part.T is a view: what is written into it stands transposed in ``out``.
        parts = [(name, part.T, at[::-1]) for name, part, at in parts]
    pieces = [
        (name, part[n : n + PIECE], (slice(at[0].start + n, min(at[0].start + n + PIECE, at[0].stop)), *at[1:]))
        for name, part, at in parts
        for n in range(0, part.shape[0], PIECE)
    ]

    def fill(piece: tuple[str, np.ndarray, Index]) -> None:
        name, part, at = piece
        # Converted before it is transposed: that moves fewer bytes.
        part[...] = tensors.read(name, at).astype(part.dtype, copy=False)

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(fill, pieces):  # raises what a piece has raised
            pass


def _place(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, read: Callable) -> jax.Array:
    """An array on its devices; each distinct slice is read once."""
    pieces: dict[tuple, np.ndarray] = {}

    def piece(index: Index | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        # Devices that hold the same slice (replicas) share one copy on the host.
        if bounds not in pieces:
            out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            read(out, tuple(slice(*b) for b in bounds))
            pieces[bounds] = out
        return pieces[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, piece)


def _fresh_adapter(key, config: ModelConfig, adapter: AdapterConfig, sharding_of: dict, table: jax.Array) -> dict:
    """The adapter as `Transformer` initialises it, except that its embeddings come from the real table."""

    def lora(key):
        # Only these outputs are asked for, so the compiler drops the random base model.
        state = nnx.state(Transformer(key, config, adapter), nnx.LoRAParam)
        return {path: leaf for path, leaf in parameters(state).items() if path != "embed_tokens.comp"}

    shapes = jax.eval_shape(lora, key)
    arrays = jax.jit(lora, out_shardings={path: sharding_of[path] for path in shapes})(key)
    if adapter.tokens:
        comp = functools.partial(initial_comp_embeddings, rows=adapter.tokens)
        arrays["embed_tokens.comp"] = jax.jit(comp, out_shardings=sharding_of["embed_tokens.comp"])(table)
    return arrays
