"""Rotary embedding in ``config.json``: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters`` (transformers 5)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.nn import RopeScaling
from jax_ccm.weights.hf_fields import Fields, numbers

# Families of which a part of each head may be rotated.
PARTIAL = ("phi3",)
# Families whose layers with a window have a base of their own.
WINDOW_THETA = ("gemma3_text",)
# Parameters that a scaling of the rotary embedding may have besides its kind and base.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip


def read(get: Fields, family: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that say how heads are rotated.

    Raises:
      UserError: naming the field, for what is not implemented or damaged.
    """
    raw, where = get.raw, get.where
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    nested = isinstance(given, dict) and any(isinstance(value, dict) for value in given.values())
    if not isinstance(given, dict) or nested and family not in WINDOW_THETA:
        raise UserError(f"{where}: rope parameters {given!r}: only one set for all layers is implemented")
    found: dict[str, Any] = {}
    if family in WINDOW_THETA:
        found["window_theta"] = _window_theta(get, given.get("sliding_attention") if nested else None)
        given = (given.get("full_attention") or {}) if nested else given
    # A null entry counts as absent, as it does in transformers.
    given = {name: value for name, value in given.items() if value is not None}
    # Older files call it "type"; some have both.
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # what early files call it
    if kind not in PARAMETERS:
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; supported: {', '.join(PARAMETERS)}")
    share = given.pop("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(f"{where}: partial_rotary_factor is {share!r}; it must be above 0 and at most 1")
    if share != 1.0 and family not in PARTIAL:
        raise UserError(
            f"{where}: partial_rotary_factor is {share!r}: rotary embedding of only a part of each head is implemented "
            f"for {', '.join(PARTIAL)} only"
        )
    # Without defaults: those of the family are of the fields around these.
    params = dataclasses.replace(get, raw=given, defaults={}, where=f"{where}: rope parameters")
    theta = params("rope_theta", float) if "rope_theta" in given else get("rope_theta", float, default=10000.0)
    strange = sorted(set(given) - set(PARAMETERS[kind]) - {"rope_theta", "factor", "original_max_position_embeddings"})
    if strange:
        raise UserError(f"{where}: rope parameter {strange[0]!r} is not known for {kind!r} rope")
    scaling = None if kind == "default" else _scaling(kind, get, params)
    return found | {"rope_theta": theta, "rope_scaling": scaling, "rotary_factor": float(share)}


def _window_theta(get: Fields, given: dict[str, Any] | None) -> float:
    """The base of layers with the window: ``rope_local_base_freq``, or its own rope parameters (transformers 5)."""
    if not given:
        return get("rope_local_base_freq", float, default=10000.0)
    own = dict(given)
    kind = own.pop("rope_type", own.pop("type", "default"))
    odd = sorted(name for name in own if name != "rope_theta" and own[name] is not None)
    if kind != "default" or odd:
        raise UserError(
            f"{get.where}: rope parameters of sliding_attention are {given!r}; only a base (rope_theta) is implemented"
        )
    return dataclasses.replace(get, raw=own, defaults={})("rope_theta", float, default=10000.0)


def _scaling(kind: str, get: Fields, params: Fields) -> RopeScaling:
    """The scaling that ``params`` say; ``get`` are the fields around them."""
    raw, given = get.raw, params.raw
    longest = get("max_position_embeddings", int)
    original = longest
    if raw.get("original_max_position_embeddings") or "original_max_position_embeddings" in get.defaults:
        original = get("original_max_position_embeddings", int)
    elif "original_max_position_embeddings" in given:
        original = params("original_max_position_embeddings", int)
    # Phi-3 and others leave the factor to the ratio of the two lengths.
    factor = longest / original if kind == "longrope" and "factor" not in given else params("factor", float)
    if kind in ("linear", "dynamic"):
        # What dynamic NTK takes for the old context is the context that the file names.
        # 8192 is the default of the field, which linear scaling does not use.
        return RopeScaling(kind, factor, original_max_position=longest if kind == "dynamic" else 8192)
    if kind == "llama3":
        low, high = params("low_freq_factor", float), params("high_freq_factor", float)
        if low >= high:
            raise UserError(f"{params.where}: low_freq_factor {low} must be smaller than high_freq_factor {high}")
        return RopeScaling(kind, factor, low, high, original)
    scaling = RopeScaling(kind, factor, original_max_position=original)
    if kind == "longrope":
        # As transformers computes it where the file does not say.
        shown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (numbers(given, name, params.where) for name in ("short_factor", "long_factor"))
        scaling = dataclasses.replace(scaling, short_factor=short, long_factor=long)
    else:

        def temper(scale):
            # YaRN's temperature of the scores, as a factor of cosine and sine.
            return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

        one, all_ = (params(name, float) if given.get(name) else 0.0 for name in ("mscale", "mscale_all_dim"))
        shown = temper(one) / temper(all_) if one and all_ else temper(1.0)
        scaling = dataclasses.replace(
            scaling,
            beta_fast=params("beta_fast", float, default=32.0),
            beta_slow=params("beta_slow", float, default=1.0),
            truncate=params("truncate", bool, default=True),
        )
    return dataclasses.replace(scaling, attention_factor=params("attention_factor", float, default=shown))


def to_dict(scaling: RopeScaling) -> dict[str, Any]:
    """The rope parameters of a ``config.json``."""
    said = {
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "attention_factor": scaling.attention_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
        "short_factor": list(scaling.short_factor),
        "long_factor": list(scaling.long_factor),
    }
    used = {name: said[name] for name in PARAMETERS[scaling.kind] if name in said}
    return {"rope_type": scaling.kind, **used}
