"""Folding a LoRA into the base weights, and putting a fresh adapter beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_ccm.nn.config import AdapterConfig
from jax_ccm.nn.transformer import Transformer, abstract_transformer, initial_comp_embeddings


def merge_lora(model: Transformer) -> Transformer:
    """The model with its LoRA folded into the base, and no adapter (CCM, section 4: the first of two stages).

    ``W <- W + (alpha / r) A B`` in float32, then cast back.

    Raises:
      ValueError: if the adapter has compression tokens; a LoRA that acts on some tokens only is no change of weights.
    """
    adapter = model.adapter
    if adapter is None:
        return model
    if adapter.tokens:
        raise ValueError(
            f"an adapter with {adapter.tokens} compression tokens cannot be merged into the base: its LoRA acts on "
            "those tokens only. Only a plain LoRA, trained on all tokens, can"
        )
    add = lambda x: (x[0].astype(jnp.float32) + adapter.scale * (x[1] @ x[2])).astype(x[0].dtype)
    # Layer by layer, so that the float32 copy is of one layer.
    fold = jax.jit(lambda kernel, a, b: jax.lax.map(add, (kernel, a, b)))
    base = nnx.to_pure_dict(nnx.state(model))
    for projection in base["layers"]["self_attn"].values():
        if "lora_a" in projection:
            a, b = projection.pop("lora_a"), projection.pop("lora_b")
            projection["kernel"] = fold(projection["kernel"], a, b)
    return nnx.merge(nnx.split(abstract_transformer(model.config))[0], base)


def attach(model: Transformer, adapter: AdapterConfig, key) -> Transformer:
    """The base of a model with a fresh adapter in place of any it had; the arrays of the base are shared.

    Args:
      model: the base, with or without an adapter.
      adapter: what to add.
      key: PRNG key of the adapter's initialisation.
    """
    _, _, base = nnx.split(model, nnx.LoRAParam, ...)

    def fresh(key, table):
        # Only the adapter is asked for, so the compiler drops the random base model.
        state = nnx.to_pure_dict(nnx.state(Transformer(key, model.config, adapter), nnx.LoRAParam))
        if adapter.tokens:
            state["embed_tokens"]["comp"] = initial_comp_embeddings(table, adapter.tokens)
        return state

    table = model.embed_tokens.embedding[...]
    graphdef, _, _ = nnx.split(abstract_transformer(model.config, adapter), nnx.LoRAParam, ...)
    return nnx.merge(graphdef, jax.jit(fresh)(key, table), nnx.to_pure_dict(base))
