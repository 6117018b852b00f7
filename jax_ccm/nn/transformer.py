"""A Llama-like decoder that attends to its own tokens and to a memory.

It knows no compression method: visibility comes from slots and a rule, the LoRA gate is an array, and the
memory is either packed out of the tokens themselves (`Packed`, parallel) or given (`MemoryCache`, recurrent).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jax_ccm.distributed.sharding import constrain, in_order, path_of
from jax_ccm.nn.blocks import Block, RMSNorm
from jax_ccm.nn.config import AdapterConfig, ModelConfig
from jax_ccm.nn.layer import LayerInputs
from jax_ccm.nn.linear import Fused, Linear, transposed
from jax_ccm.numerics import Precision
from jax_ccm.rules.batch import Packed
from jax_ccm.rules.types import MemoryCache, Rule, Slots

Remat = Literal["none", "dots", "all"]


class Embedding(nnx.Module):
    """The vocabulary's table, and beside it the adapter's table of compression tokens.

    Attributes:
      embedding: ``[V, D]``.
      comp: float32 ``[n, D]`` for ids V .. V + n - 1, or None.
    """

    def __init__(self, key, config: ModelConfig, adapter: AdapterConfig | None, precision: Precision):
        table = jax.random.normal(key, (config.vocab_size, config.hidden_size), jnp.float32) * 0.02
        self.embedding = nnx.Param(table.astype(precision.params))
        self.output = precision.output
        rows = adapter.tokens if adapter is not None else 0
        self.comp = nnx.LoRAParam(initial_comp_embeddings(table, rows)) if rows else None

    def __call__(self, tokens, starts=None):
        """``[B, T, D]`` for ids ``int32 [B, T]``; to those of compression tokens ``starts`` of this shape are added."""
        table = self.embedding[...]
        vocab = table.shape[0]
        # Ids of compression tokens are beyond the table: they read any row of it, which is replaced below.
        x = table[jnp.minimum(tokens, vocab - 1)].astype(self.output)
        if self.comp is None:
            return x
        comp = self.comp[...]
        extra = comp[jnp.clip(tokens - vocab, 0, comp.shape[0] - 1)]
        extra = extra if starts is None else extra + starts
        return jnp.where((tokens >= vocab)[..., None], extra.astype(x.dtype), x)


def initial_comp_embeddings(table, rows: int):
    """Initial embeddings of compression tokens, float32 ``[rows, D]``.

    Row ``rows - 1 - k`` is the mean of the vocabulary rows ``k, k + rows, k + 2 rows, ...``: the reference's
    initialisation, reversed order included.
    """
    table = jnp.asarray(table, jnp.float32)
    return jnp.stack([table[rows - 1 - row :: rows].mean(axis=0) for row in range(rows)])


class Transformer(nnx.Module):
    """The decoder. Layers are stacked along a leading axis and run by one `jax.lax.scan`, or `unstacked`.

    What computes ``attention`` is static: "xla", "pallas", or what suits the device ("auto"; see `memory_attention`).
    """

    def __init__(
        self, key, config: ModelConfig, adapter: AdapterConfig | None = None, precision: str | Precision = "float32"
    ):
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        self.config = config
        self.adapter = adapter
        self.precision = precision = Precision.of(precision)
        self.attention = "auto"
        self.embed_tokens = Embedding(key_embed, config, adapter, precision)

        def make(key):
            return Block(key, config, adapter, precision)

        self.layers = jax.vmap(make)(jax.random.split(key_layers, config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config, precision.params)
        self.transposed_embedding: nnx.Param | None = None
        # Compression tokens have no column even where the head is a matrix of its own (CCM: the head is not extended).
        if not config.tie_embeddings:
            self.lm_head = Linear(key_head, config.hidden_size, config.vocab_size, precision=precision)

    def __call__(
        self,
        tokens,
        slots: Slots,
        gate,
        *,
        rule: Rule,
        memory: Packed | MemoryCache | None = None,
        positions=None,
        starts=None,
        dropout_key=None,
        remat: Remat = "none",
        output_hidden_states: bool = False,
        observe=None,
        attended_at=None,
        store=None,
    ):
        """Runs the decoder over a row of tokens and a memory.

        Args:
          tokens: ``int32 [B, T]``.
          slots: `Slots` of ``[B, T]``, in order of index but for padding.
          gate: ``float32 [B, T]``, 1 where the adapter's LoRA acts; a `Gate` of few tokens; None for nowhere.
          rule: who sees whom.
          memory: keys and values besides the tokens' own.
          positions: ``int32 [B, T]`` or None. If given, RoPE goes by the index in the cache and not by
            `Slots.position`: the tokens take these, the entries of a `MemoryCache` their index, and keys are returned
            unrotated.
          starts: ``float32 [B, T, D]`` or None, added to the embeddings of compression tokens.
          dropout_key: PRNG key, or None to run without dropout.
          remat: what the backward pass recomputes of each layer: "none" of it; all but the products with weights
            ("dots"), which are most of the work; or "all" of it, which keeps one activation a layer.
          output_hidden_states: also return the hidden state before each layer and after the final norm.
          observe: ``float32 [B, T]`` or None. If given, also return the attention that every key receives, each query
            counting so much. Needs a `MemoryCache`.
          attended_at: ``int32 [B, Q]`` or None. If given, also return what attention gives the tokens at these indices
            of their rows, before the output projection.
          store: ``(own, new) -> own`` or None. If given, it replaces what a `MemoryCache` keeps of a layer
            (`MemoryCache.stored`: keys and values ``[B, S, K, H]`` and what follows them) by means of the tokens' keys
            and values ``[B, T, K, H]``, layer by layer, in place, and the whole is returned instead of these, which are
            then never held for all layers at once.

        Returns:
          ``hidden [B, T, D]`` after the final norm; keys and values ``[L, B, T, K, H]`` of the tokens (with ``store``
          what the cache keeps); and the one that was asked for, else None: ``[L + 1, B, T, D]`` hidden states,
          attention received by the tokens themselves ``float32 [L, B, T, K]`` and by the entries of the cache
          ``[L, B, S, K]``, summed over the heads of a group, or attention outputs ``[L, B, Q, N, H]``.
        """
        implementation = None if self.attention == "auto" else self.attention
        run = LayerInputs.of(
            self.config, self.precision, slots, gate, rule, memory,
            by_index=positions, observe=observe, attended_at=attended_at, single=tokens.shape[1] == 1,
            implementation=implementation,
        )  # fmt: skip

        def body(carry, scanned):
            # Without `store` the cache is scanned input, a layer at a time. With it, the cache is part of the carry,
            # which changes in place; as input and output of the scan it would be there twice.
            x, whole = carry
            block, past, number, key = scanned
            # Laid out as they are stored, so that only a layer is ever turned around (`sharding.in_order`).
            held = None if whole is None else tuple(in_order(each[number], "rows", None, "heads") for each in whole)
            out, new, more = run.layer(block, x, past if held is None else held[:2], number, key)
            if whole is not None and held is not None:
                replaced = (in_order(layer, "rows", None, "heads") for layer in store(held, new))

                def update(each, layer):
                    return jax.lax.dynamic_update_index_in_dim(each, layer, number, 0)

                # Nothing is stacked over layers: the tokens' keys and values are in the cache.
                whole, new = tuple(map(update, whole, replaced)), ()
            return (out, whole), (new, out if output_hidden_states else more)

        if remat != "none":
            # Products with weights have no batch dimensions; those of attention, with rows and heads in front, have.
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        x = constrain(self.embed_tokens(tokens, starts), "rows", "tokens")
        # The root is rounded to the type of the activations first, as Gemma's code does.
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)
        past = (memory.k, memory.v) if isinstance(memory, MemoryCache) else None
        whole, past = (None, past) if store is None else (memory.stored, None)
        numbers = jnp.arange(self.config.num_layers)
        (hidden, whole), (new, more) = _over_layers(body, (x, whole), (self.layers, past, numbers, keys))
        kept: Any = new if whole is None else whole
        hidden = self.norm(hidden)
        if output_hidden_states:
            # The last entry is taken after the final norm, as Hugging Face does.
            more = jnp.concatenate([x[None], more[:-1], hidden[None]])
        return hidden, kept, more

    def with_adapter(self, adapter: AdapterConfig | None, arrays: Mapping[str, jax.Array] = {}) -> Transformer:
        """The decoder with another adapter beside the same base arrays. This one stays as it is.

        Args:
          adapter: its shape; None for the base alone.
          arrays: by path, such as "layers.self_attn.q_proj.lora_a" and "embed_tokens.comp".
        """
        target = abstract_transformer(self.config, adapter, self.precision)
        # The most specific type first: a `LoRAParam` is a `Param`, too.
        graphdef, slots, _ = nnx.split(target, nnx.LoRAParam, ...)
        found = jax.tree_util.tree_map_with_path(lambda keys, _: arrays[path_of(keys)], slots)
        return nnx.merge(graphdef, found, nnx.split(self, nnx.LoRAParam, ...)[2]).with_attention(self.attention)

    def with_attention(self, attention: str) -> Transformer:
        """The same decoder, whose attention something else computes; its arrays are shared."""
        model = copy.copy(self)
        model.attention = attention
        return model

    def unstacked(self) -> Transformer:
        """The same decoder in the form that reads one token fastest on a CPU: each layer has arrays of its own.

        A layer taken out of the stack is copied, so that decoding moves its weights three times; from here they are
        read once. Kernels with the same input are fused, and those with many inputs transposed, as are embeddings that
        serve as the head. Weights are kept in the type of the activations: a matrix of another type is turned into it
        for every vector, which takes longer than to read it. Programs take several times as long to compile. Files are
        written from the stack alone.
        """
        unstacked, kept, output = copy.copy(self), jnp.dtype(self.precision.params), self.precision.output
        unstacked.precision = Precision.of(output)

        def read(x):
            return x.astype(output) if x.dtype == kept else x

        # An adapter stays float32, whatever type the weights are kept in.
        graphdef, adapter, base = nnx.split(self.layers, nnx.LoRAParam, ...)

        def layer(number):
            own = jax.tree.map(lambda x: x[number], adapter)
            return nnx.merge(graphdef, own, jax.tree.map(lambda x: read(x[number]), base))

        unstacked.layers = nnx.List([layer(number) for number in range(self.config.num_layers)])
        if self.config.tie_embeddings:
            unstacked.transposed_embedding = nnx.data(nnx.Param(read(self.embed_tokens.embedding[...]).T))
        else:
            unstacked.lm_head = jax.tree.map(read, self.lm_head)
            unstacked.lm_head.precision = unstacked.precision
        for block in unstacked.layers:
            attention, mlp = block.self_attn, block.mlp
            for module in (attention, mlp):
                for linear in (x for x in vars(module).values() if isinstance(x, Linear)):
                    linear.precision = unstacked.precision
            attention.fused = nnx.data(Fused([attention.q_proj, attention.k_proj, attention.v_proj]))
            mlp.fused = nnx.data(Fused([mlp.gate_proj, mlp.up_proj]))
            attention.o_proj, mlp.down_proj = transposed(attention.o_proj), transposed(mlp.down_proj)
            del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        return unstacked

    def logits(self, hidden):
        """``float32 [..., V]`` for hidden states ``[..., D]``. Compression tokens have no column."""
        # Accumulated and kept in float32: rounding logits to bfloat16 would cost more than it saves.
        head, axes = self.head
        hidden, head = (x.astype(self.precision.compute) for x in (hidden, head))
        logits = jnp.einsum(f"...d,{axes}->...v", hidden, head, preferred_element_type=jnp.float32)
        return capped(logits, self.config.logit_cap)

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations, and so of the keys and values of a cache."""
        return jnp.dtype(self.precision.output)

    @property
    def head(self) -> tuple[jax.Array, Literal["vd", "dv"]]:
        """The projection to the vocabulary, and the order of its axes: ``[V, D]`` where embeddings are tied.

        Its products are logits before `ModelConfig.logit_cap`.
        """
        if self.transposed_embedding is not None:
            return self.transposed_embedding[...], "dv"
        if self.config.tie_embeddings:
            return self.embed_tokens.embedding[...], "vd"
        return self.lm_head.kernel[...], "dv"


def capped(logits, cap: float | None):
    """``cap * tanh(logits / cap)``; the logits where there is no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _over_layers(body, carry, scanned):
    """`jax.lax.scan` over layers, which come first in what is scanned, or the same over layers that are `unstacked`."""
    layers, *rest = scanned
    if not isinstance(layers, nnx.List):
        return jax.lax.scan(body, carry, scanned)
    # Traced once; the compiler gets a copy for each layer.
    body, outs = jax.jit(body), []
    for number, layer in enumerate(layers):
        carry, out = body(carry, (layer, *jax.tree.map(lambda x, number=number: x[number], rest)))
        outs.append(out)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outs)


def abstract_transformer(
    config: ModelConfig, adapter: AdapterConfig | None = None, precision: str | Precision = "float32"
) -> Transformer:
    """A `Transformer` whose arrays are `jax.ShapeDtypeStruct`: shapes without memory."""
    return jax.eval_shape(lambda key: Transformer(key, config, adapter, precision), jax.random.key(0))
