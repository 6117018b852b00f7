"""What a layer is made of: norms, attention's projections, the MLP, and the block of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jax_ccm.distributed.sharding import constrain
from jax_ccm.nn.config import AdapterConfig, ModelConfig
from jax_ccm.nn.linear import Fused, Linear
from jax_ccm.numerics import Precision


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` over the last axis, computed in float32; with an offset ``1 + scale``."""

    def __init__(self, size: int, config: ModelConfig, dtype):
        self.offset = config.norm_offset
        self.scale = nnx.Param((jnp.zeros if self.offset else jnp.ones)((size,), dtype))
        self.eps = config.norm_eps

    def __call__(self, x):
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            # Rounded once, as Gemma does.
            return ((1 + self.scale[...].astype(jnp.float32)) * h).astype(x.dtype)
        # Rounded before the scale, as Hugging Face's Llama does.
        return self.scale[...].astype(x.dtype) * h.astype(x.dtype)


def _projection(name: str, key, inputs: int, outputs: int, bias: bool, *, adapter: AdapterConfig | None, precision):
    lora = adapter if adapter is not None and name in adapter.targets else None
    return Linear(key, inputs, outputs, bias=bias, adapter=lora, precision=precision)


class Attention(nnx.Module):
    """Projections, rotation and output of one attention layer."""

    def __init__(self, key, config: ModelConfig, adapter: AdapterConfig | None, precision: Precision):
        keys = jax.random.split(key, 4)
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        make = functools.partial(_projection, adapter=adapter, precision=precision)
        self.q_proj = make("q_proj", keys[0], config.hidden_size, heads * size, config.qkv_bias)
        self.k_proj = make("k_proj", keys[1], config.hidden_size, kv_heads * size, config.qkv_bias)
        self.v_proj = make("v_proj", keys[2], config.hidden_size, kv_heads * size, config.qkv_bias)
        self.o_proj = make("o_proj", keys[3], heads * size, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(size, config, precision.params) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config, precision.params) if config.qk_norm else None
        self.head_dim = size
        self.fused: Fused | None = None

    def project(self, x, gate, keys):
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, not yet rotated."""

        def heads(y):
            # [..., N H] -> [..., N, H], or K heads of keys and values; the heads are what `tensor` spreads.
            return constrain(y.reshape(*y.shape[:-1], -1, self.head_dim), "rows", "tokens", "heads")

        if self.fused is not None:
            q, k, v = map(heads, self.fused(x, gate, keys[:3]))
        else:
            layers = self.q_proj, self.k_proj, self.v_proj
            q, k, v = (heads(layer(x, gate, key)) for layer, key in zip(layers, keys[:3], strict=True))
        # Over each head by itself, and before the rotation (Qwen3, Gemma 3).
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """A gated MLP: SwiGLU or GeGLU."""

    def __init__(self, key, config: ModelConfig, adapter: AdapterConfig | None, precision: Precision):
        keys = jax.random.split(key, 3)
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        make = functools.partial(_projection, adapter=adapter, precision=precision)
        self.gate_proj = make("gate_proj", keys[0], d, f, bias)
        self.up_proj = make("up_proj", keys[1], d, f, bias)
        self.down_proj = make("down_proj", keys[2], f, d, bias)
        self.activation = config.activation
        self.fused: Fused | None = None

    def __call__(self, x, gate, keys):
        """``[B, T, D]``; ``gate`` and a dropout key for each of the three projections as for `Linear`."""
        if self.fused is not None:
            open, up = self.fused(x, gate, keys[:2])
        else:
            open, up = self.gate_proj(x, gate, keys[0]), self.up_proj(x, gate, keys[1])
        return self.down_proj(constrain(self.gated(open, up), "rows", "tokens", "inner"), gate, keys[2])

    def gated(self, open, up):
        """``activation(open) * up``; these two alone, a layer's largest arrays, are kept for the backward pass."""

        def gated(open, up):
            return ACTIVATIONS[self.activation](open) * up

        # As for whole layers: within a loop over layers nothing is computed once where it was asked for twice.
        return jax.checkpoint(gated, prevent_cse=False)(open, up)


class Block(nnx.Module):
    """Attention and MLP, with norms before them, and behind them where the model has `ModelConfig.post_norms`.

    Norms have Hugging Face's names: "post_attention_layernorm" stands before the MLP, or, if there are norms behind,
    there.
    """

    def __init__(self, key, config: ModelConfig, adapter: AdapterConfig | None, precision: Precision):
        key_attn, key_mlp = jax.random.split(key)
        self.input_layernorm = RMSNorm(config.hidden_size, config, precision.params)
        self.self_attn = Attention(key_attn, config, adapter, precision)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, precision.params)
        self.mlp = MLP(key_mlp, config, adapter, precision)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config, precision.params)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config, precision.params)

    def after_attention(self, y):
        """What is added for the output ``y`` of attention."""
        return self.post_attention_layernorm(y) if self.post_norms else y

    def feed_forward(self, x, gate, keys):
        """What the MLP adds; ``gate`` and ``keys`` as for `MLP`."""
        if not self.post_norms:
            return self.mlp(self.post_attention_layernorm(x), gate, keys)
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), gate, keys))
