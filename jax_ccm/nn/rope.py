"""Rotary position embedding, in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.nn.config import ModelConfig, RopeScaling


def _linear(freqs: np.ndarray, scaling: RopeScaling, base: float) -> np.ndarray:
    return freqs / scaling.factor


def _llama3(freqs: np.ndarray, scaling: RopeScaling, base: float) -> np.ndarray:
    """Llama 3.1: long waves are slowed by the factor, short ones kept, a linear ramp between."""
    wavelength = 2 * np.pi / freqs
    ramp = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    # 1 keeps a frequency, 0 divides it by the factor.
    ramp = np.clip(ramp, 0.0, 1.0)
    return (1 - ramp) * freqs / scaling.factor + ramp * freqs


def _yarn(freqs: np.ndarray, scaling: RopeScaling, base: float) -> np.ndarray:
    """YaRN (Peng et al. 2023, section 3.2): as llama3, but the ramp is linear in the number of the pair."""
    size = 2 * len(freqs)

    # The dimension whose wave turns so often within the old context.
    def turning(turns):
        # The pair i with ``original / (2 pi base**(2 i / size)) = turns``.
        return size * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / math.log(base) / 2

    low, high = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # 0.001 as in Hugging Face's code, where both edges fall together.
    slowed = np.clip((np.arange(len(freqs)) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return slowed * freqs / scaling.factor + (1 - slowed) * freqs


def _dynamic(freqs: np.ndarray, scaling: RopeScaling, base: float) -> np.ndarray:
    """Dynamic NTK: beyond the old context the base grows so that the longest wave is slowed with the length."""
    size = 2 * len(freqs)
    longer = max((scaling.length or 0) / scaling.original_max_position, 1.0)
    # The exponent makes the last pair, ``base**-((size - 2) / size)``, slower by just what stands in brackets.
    growth = (scaling.factor * longer - scaling.factor + 1) ** (size / (size - 2))
    return freqs * growth ** -(np.arange(0, size, 2) / size)


def _longrope(freqs: np.ndarray, scaling: RopeScaling, base: float) -> np.ndarray:
    """LongRoPE (Ding et al. 2024): each wave is slowed by a factor of its own."""
    factors = scaling.long_factor if (scaling.length or 0) > scaling.original_max_position else scaling.short_factor
    if len(factors) != len(freqs):
        raise ValueError(f"longrope has {len(factors)} factors for {len(freqs)} pairs of dimensions")
    return freqs / np.asarray(factors)


SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "dynamic": _dynamic, "longrope": _longrope}


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency of each pair of dimensions that is rotated, ``float32 [R / 2]``.

    Raises:
      ValueError: for a scaling kind that is not implemented, or factors that do not fit.
    """
    freqs = config.rope_theta ** -(np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs.astype(np.float32)
    if scaling.kind not in SCALINGS:
        raise ValueError(f"rope scaling {scaling.kind!r} is not supported; supported: {', '.join(SCALINGS)}")
    return SCALINGS[scaling.kind](freqs, scaling, config.rope_theta).astype(np.float32)


def angles(config: ModelConfig, position):
    """Cosine and sine for positions ``int32 [...]``, with the attention factor: two float32 arrays ``[..., R / 2]``."""
    cos, sin = _turns(config, position)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return (cos, sin) if factor == 1.0 else (factor * cos, factor * sin)


def _turns(config: ModelConfig, position):
    # Positions are exact in float32 up to 2**24.
    angle = position[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def moved(config: ModelConfig, k, by):
    """Keys of a cache, which are rotated already, at other positions.

    Args:
      config: of the model.
      k: ``[L, B, S, K, H]``.
      by: ``int32 [B, S]``, by how many positions further each entry is rotated; it may be negative.

    Returns:
      The keys, of their type; rounded once.
    """
    kinds = sorted(set(config.windowed))
    # [kinds, B, S, R / 2]; the attention factor is in the keys.
    cos, sin = (jnp.stack(x) for x in zip(*(_turns(config.as_seen(kind), by) for kind in kinds), strict=True))
    which = jnp.asarray([kinds.index(kind) for kind in config.windowed])
    return jax.vmap(lambda k, kind: _rotated(k, cos[kind], sin[kind]))(k, which)


@jax.custom_vjp
def rotate(x, cos, sin):
    """Rotates the first R numbers of heads ``[B, T, heads, H]`` by angles ``[B, T, R / 2]``; computed in float32.

    A gradient is turned back in one pass: that of taking apart and joining would be padded and added up. There is none
    for the angles.
    """
    return _rotated(x, cos, sin)


rotate.defvjp(
    lambda x, cos, sin: (_rotated(x, cos, sin), (cos, sin)),
    # The transposed map is the rotation by the opposite angle; a factor in cosine and sine stays as it is.
    lambda angles, g: (_rotated(g, angles[0], -angles[1]), None, None),
)


def _rotated(x, cos, sin):
    half = cos.shape[-1]
    rest = [x[..., 2 * half :]] if 2 * half < x.shape[-1] else []
    # Split first and joined last: the whole of x and of its gradient then lies in memory in its own type alone.
    first, second = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    # [B, T, 1, R / 2]: the same angles for all heads.
    cos, sin = cos[..., None, :], sin[..., None, :]
    halves = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([*(half.astype(x.dtype) for half in halves), *rest], axis=-1)
