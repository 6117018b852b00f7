"""Rotary position embedding, in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jax_ccm.nn.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency of each pair of dimensions, ``float32 [H / 2]``.

    Raises:
      ValueError: for a scaling kind that is not implemented.
    """
    freqs = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs.astype(np.float32)
    if scaling.kind == "linear":
        return (freqs / scaling.factor).astype(np.float32)
    if scaling.kind != "llama3":
        raise ValueError(f"rope scaling {scaling.kind!r} is not supported; supported: linear, llama3")
    # Llama 3.1: long waves are slowed by the factor, short ones kept, a linear ramp between.
    wavelength = 2 * np.pi / freqs
    ramp = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    ramp = np.clip(ramp, 0.0, 1.0)
    return ((1 - ramp) * freqs / scaling.factor + ramp * freqs).astype(np.float32)


def angles(freqs: np.ndarray, position):
    """Cosine and sine for positions ``int32 [...]``: two float32 arrays ``[..., H / 2]``."""
    angle = position[..., None].astype(jnp.float32) * freqs
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x, cos, sin):
    """Rotates heads ``[B, T, heads, H]`` by angles ``[B, T, H / 2]``; computed in float32."""
    # Split first and joined last: the whole of x and of its gradient then lies in memory in its own type alone.
    first, second = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    cos, sin = cos[..., None, :], sin[..., None, :]
    halves = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([half.astype(x.dtype) for half in halves], axis=-1)
