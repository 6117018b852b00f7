"""An adapter apart from its model: out of a model, into a model, or merged into the base weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_ccm.distributed import processes
from jax_ccm.errors import UserError
from jax_ccm.nn import AdapterConfig, Transformer, abstract_transformer
from jax_ccm.nn.config import PROJECTIONS
from jax_ccm.weights.hf import parameters

COMP = "embed_tokens.comp"


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter and what is known of where it belongs.

    Attributes:
      config: its shape and scale. Build a model with it, or give the adapter to `attach`.
      arrays: float32, by parameter path: "layers.self_attn.q_proj.lora_a" ``[L, in, r]``, "….lora_b" ``[L, r, out]``,
        "embed_tokens.comp" ``[n, D]``.
      method: description of the method it was trained for (`identity.describe_method`), or None if unknown.
      base: description of its base model (`identity.describe_base`), or None if unknown.
      extra: anything else that was saved with it, such as the training step.
      partial: its LoRA is on some layers only; layers behind the last of its arrays have none.
      source: where it was read from, for messages.
    """

    config: AdapterConfig
    arrays: dict[str, np.ndarray]
    method: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    partial: bool = False
    source: str = "the adapter"

    def __post_init__(self):
        expected = names(self.config)
        where = self.source
        missing = [name for name in expected if name not in self.arrays]
        if missing:
            raise UserError(f"{where} lacks tensor {missing[0]!r}, one of {len(expected)} it should have; get it again")
        odd = [name for name in self.arrays if name not in expected]
        if odd:
            raise UserError(f"{where} holds tensor {odd[0]!r}, which its own description does not name")
        rank, rows = self.config.rank, self.config.tokens
        layers = {x.shape[0] for name, x in self.arrays.items() if name != COMP and x.ndim == 3}
        for name, x in self.arrays.items():
            axis, size = {"lora_a": (2, rank), "lora_b": (1, rank), "comp": (0, rows)}[name.rsplit(".", 1)[1]]
            if x.ndim != (2 if name == COMP else 3) or x.shape[axis] != size or len(layers) > 1:
                raise UserError(
                    f"{where}: tensor {name!r} is {list(x.shape)}; expected are [layers, in, {rank}] for lora_a, "
                    f"[layers, {rank}, out] for lora_b, [{rows}, width] for {COMP}, and as many layers in all"
                )
            if not np.isfinite(x).all():
                raise UserError(f"{where}: tensor {name!r} holds NaN or infinite numbers, from a run that failed")


def names(config: AdapterConfig) -> list[str]:
    """Parameter paths of an adapter of this shape."""
    lora = [f"{stem(target)}.{leaf}" for target in config.targets for leaf in ("lora_a", "lora_b")]
    return (lora if config.rank else []) + ([COMP] if config.tokens else [])


def stem(target: str) -> str:
    """The path of a projection's arrays, such as "layers.mlp.up_proj"."""
    return f"layers.{PROJECTIONS[target]}.{target}"


def depth(arrays: dict[str, np.ndarray]) -> int:
    """Layers of an adapter's arrays; 0 without a LoRA."""
    return max((x.shape[0] for path, x in arrays.items() if path != COMP), default=0)


def _for_depth(adapter: Adapter, layers: int) -> Adapter:
    """A `partial` adapter with zeros for the layers behind its last; others as they are."""
    more = layers - depth(adapter.arrays)
    if not adapter.partial or more < 0:
        return adapter
    pad = lambda path, x: x if path == COMP else np.pad(x, ((0, more), (0, 0), (0, 0)))
    return dataclasses.replace(adapter, arrays={path: pad(path, x) for path, x in adapter.arrays.items()})


def extract(model: Transformer) -> Adapter:
    """The adapter of a model, on the host.

    Raises:
      UserError: if the model has none.
    """
    arrays = {
        path: processes.whole(x).astype(np.float32) for path, x in parameters(nnx.state(model, nnx.LoRAParam)).items()
    }
    if model.adapter is None or not arrays:
        raise UserError("this model has no adapter; build it with an AdapterConfig")
    return Adapter(model.adapter, arrays)


def attach(model: Transformer, adapter: Adapter) -> Transformer:
    """The model with this adapter.

    Args:
      model: with an adapter of the same shape, whose numbers are replaced and whose dropout is kept; or with none,
        and this one is put beside it. Not changed.
      adapter: the adapter.

    Returns:
      A new model that shares the base arrays.

    Raises:
      UserError: if the adapter does not fit, with the tensor and both shapes.
    """
    here, there = model.adapter, adapter.config
    if here is not None:
        for field in ("rank", "alpha", "tokens", "targets"):
            mine, theirs = getattr(here, field), getattr(there, field)
            if mine != theirs and not (field == "targets" and set(mine) == set(theirs)):
                raise UserError(
                    f"{adapter.source} has {field} {theirs}, but the model was built for {field} {mine}; set the "
                    "adapter's values in the config, or build the model with the adapter's own config"
                )
    adapter = _for_depth(adapter, model.config.num_layers)
    graphdef, old, base = nnx.split(model, nnx.LoRAParam, ...)
    if here is None:
        graphdef, old, _ = nnx.split(abstract_transformer(model.config, there, model.precision), nnx.LoRAParam, ...)
    slots = parameters(old)
    for path, slot in slots.items():
        if slot.shape != adapter.arrays[path].shape:
            owner = (adapter.base or {}).get("name") or "another base model"
            raise UserError(
                f"{adapter.source} is for {owner}: tensor {path!r} is {list(adapter.arrays[path].shape)}, but this "
                f"model needs {list(slot.shape)}"
            )
    put = lambda path, slot: jax.device_put(adapter.arrays[path], slot.sharding if here is not None else None)
    leaves = [put(path, slot) for path, slot in slots.items()]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(old), leaves), base)


def merge_into_base(model: Transformer, adapter: Adapter) -> Transformer:
    """The model with a plain LoRA added to its base weights: ``W + (alpha / r) A B`` (stage 1 of the paper's recipe).

    Computed in float32, then rounded to the dtype of the weights. An adapter that the model has stays as it is.

    Raises:
      UserError: if the adapter has compression tokens, or does not fit.
    """
    if adapter.config.tokens:
        raise UserError(
            f"{adapter.source} is a compression adapter with {adapter.config.tokens} compression tokens. Its LoRA acts "
            "on those tokens only and cannot be merged; only a plain LoRA (stage 1) can"
        )
    adapter = _for_depth(adapter, model.config.num_layers)
    graphdef, state = nnx.split(model)
    leaves = parameters(state)
    for target in adapter.config.targets if adapter.config.rank else ():
        path = stem(target)
        kernel, a, b = leaves[f"{path}.kernel"], adapter.arrays[f"{path}.lora_a"], adapter.arrays[f"{path}.lora_b"]
        if kernel.shape != (a.shape[0], a.shape[1], b.shape[2]):
            raise UserError(
                f"{adapter.source} does not fit this model: tensors {path + '.lora_a'!r} {list(a.shape)} and lora_b "
                f"{list(b.shape)} against a weight of {list(kernel.shape)}"
            )
        merge = jax.jit(_add_low_rank, static_argnames="scale", out_shardings=kernel.sharding)
        leaves[f"{path}.kernel"] = merge(kernel, a, b, scale=adapter.config.scale)
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), list(leaves.values())))


def _add_low_rank(kernel, a, b, scale: float):
    # Layer by layer: a float32 copy of a whole stack would not fit beside a large model.
    def layer(args):
        w, a, b = args
        return (w.astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")).astype(w.dtype)

    return jax.lax.map(layer, (kernel, a, b))
