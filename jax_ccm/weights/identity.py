"""What an adapter belongs to: a method and a base model, written down so that they can be compared later."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np

from jax_ccm import processes
from jax_ccm.describe import describe_method, label
from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, RopeScaling, Transformer
from jax_ccm.types import Method, Rule
from jax_ccm.weights.hf import parameters

# How a method is called, and where its keys are rotated, is not what the adapter has learned: streaming with an adapter
# that was trained without is the paper's own use (CCM, section 4.3), and gisting-online is gisting's adapter with the
# context in chunks. The weight of a loss matters in training only.
_IRRELEVANT = ("name", "rope", "context", "repeat_weight", "fewest")
_SAMPLED = ("embed_tokens.embedding", "layers.self_attn.q_proj.kernel", "layers.self_attn.v_proj.kernel",
            "layers.mlp.down_proj.kernel")  # fmt: skip
_SAMPLES = 64
_AGREEMENT = 0.9


def check_method(stored: dict[str, Any], method: Method, source: str) -> None:
    """Compares the method that an adapter was trained for with the one it is to serve.

    Streaming is no difference, an adapter that was trained with a random number of closing tokens (`Method.fewest`)
    serves any of these numbers, and one that was trained to repeat chunks also serves the method without it. Among
    methods that compress nothing only whether the LoRA acts counts: a plain LoRA serves full context, a window and no
    context alike, and text that is pooled.

    Raises:
      UserError: with both names and what differs.
    """
    # A field that an older file does not have yet has its default there.
    there = describe_method(Method("", Rule(()))) | stored
    here = describe_method(method)
    if there["closes"] or here["closes"] or there["pool"]:
        if serves_fewer(stored, method):
            there = there | {"closes": here["closes"]}
        if method.repeat is None:
            there, here = _without_repetition(there), _without_repetition(here)
        differ = [key for key in sorted(there | here) if there.get(key) != here.get(key) and key not in _IRRELEVANT]
    else:
        differ = ["gate"] * (bool(there["gate"]) != bool(here["gate"]))
    if differ:
        show = lambda key: f"{key}: {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} here"
        raise UserError(
            f"{source} was trained for the method {label(there)}, but the method here is {label(here)}. They differ "
            f"({'; '.join(map(show, differ))}). Use the adapter's method, or an adapter for this one"
        )


def serves_fewer(stored: dict[str, Any], method: Method) -> bool:
    """Whether an adapter was trained to serve a method that closes chunks with fewer of its tokens, and this is one."""
    fewest, closes = stored.get("fewest"), describe_method(method)["closes"]
    return bool(fewest) and len(closes) >= fewest and stored["closes"][: len(closes)] == closes


def _without_repetition(method: dict[str, Any]) -> dict[str, Any]:
    """A described method without its repetition tokens, which nobody else sees: what is left of it outside training."""
    kinds = lambda names: [name for name in names if name != "REPEAT"]
    sees = {pair: spans for pair, spans in method["sees"].items() if not pair.startswith("REPEAT ")}
    return method | {"repeat": None, "sees": sees, **{key: kinds(method[key]) for key in ("gate", "both_ways")}}


def describe_base(model: Transformer, name: str) -> dict[str, Any]:
    """A base model as JSON values: what a person calls it, its shape, and a sample of its weights.

    The sample is a few numbers at regular places, rounded to bfloat16: the same for a model that was loaded in
    float32 and in bfloat16, on whatever devices.
    """
    config = dataclasses.asdict(model.config)
    # How far positions were trained has no part in the computation.
    config.pop("max_position")
    sample = _sample(model)
    text = json.dumps([{k: _short(v) for k, v in sorted(config.items())}, sample])
    return {
        "name": name,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        "config": config,
        "sample": sample,
    }


def _sample(model: Transformer) -> dict[str, str]:
    arrays, out = parameters(model), {}
    for path in _SAMPLED:
        x = arrays[path]
        places = np.linspace(0, x.size - 1, min(_SAMPLES, x.size)).astype(np.int64)
        picked = processes.whole(x[np.unravel_index(places, x.shape)]).astype(ml_dtypes.bfloat16)
        out[path] = picked.view(np.uint16).astype(">u2").tobytes().hex()
    return out


def _short(value: Any) -> Any:
    """Numbers as they survive float32: a GGUF file stores 1e-05 as 9.99999974e-06."""
    if isinstance(value, dict):
        return {key: _short(x) for key, x in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_short(x) for x in value]
    return f"{value:.6g}" if isinstance(value, float | int) and not isinstance(value, bool) else value


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config; a field that an older file does not have yet has its default there."""
    defaults = lambda kind: {
        f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING
    }
    scaling = config.get("rope_scaling")
    if scaling:
        config = config | {"rope_scaling": defaults(RopeScaling) | scaling}
    return defaults(ModelConfig) | config


def check_base(stored: dict[str, Any], model: Transformer, name: str, source: str) -> None:
    """Compares the base model that an adapter was trained on with the one it is to serve.

    Raises:
      UserError: with both names and what differs.
    """
    here = describe_base(model, name)
    there_config = {key: _short(x) for key, x in _whole(stored.get("config", {})).items()}
    differ = [
        f"{key}: {_whole(stored.get('config', {})).get(key)} there, {value} here"
        for key, value in here["config"].items()
        if there_config.get(key) != _short(value)
    ]
    share = _agreement(stored.get("sample", {}), here["sample"])
    if not differ and share < _AGREEMENT:
        differ = [f"same shape, but {share:.0%} of the sampled weights are equal"]
    if differ:
        called = lambda base: f"{base.get('name') or 'an unnamed model'!r} (fingerprint {base.get('fingerprint', '?')})"
        raise UserError(
            f"{source} was trained on the base model {called(stored)}, but the base model here is {called(here)}: "
            f"{'; '.join(differ)}. Use the adapter's base model; if a stage-1 LoRA was merged into that one, do so "
            "here as well"
        )


def _agreement(there: dict[str, str], here: dict[str, str]) -> float:
    """Share of equal samples. Not all of them must be: merging a LoRA elsewhere may round a few the other way."""
    pairs = [
        (there.get(path, "")[i : i + 4], hexes[i : i + 4])
        for path, hexes in here.items()
        for i in range(0, len(hexes), 4)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)
