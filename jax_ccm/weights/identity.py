"""What an adapter belongs to: a method and a base model, written down so that they can be compared later."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_ccm.distributed import processes
from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, RopeScaling, Transformer
from jax_ccm.rules.describe import completed, describe_method, label
from jax_ccm.rules.types import Method
from jax_ccm.weights.hf import base_parameters

# How a method is called, and where its keys are rotated, is not what the adapter has learned: streaming with an adapter
# that was trained without is the paper's own use (CCM, section 4.3), and gisting-online is gisting's adapter with the
# context in chunks. The weight of a loss matters in training only.
_IRRELEVANT = ("name", "rope", "context", "repeat_weight", "repeat_share", "min_comp_tokens")
# Numbers sampled of each array, and at least so many of each layer: a LoRA may have changed a single one.
_SAMPLES, _OF_A_LAYER = 64, 4
# Share of unequal samples that is no difference: merging a LoRA elsewhere rounds a few the other way, and of weights
# that lay in float16 in between one in sixteen is a neighbour of what it would be.
_ROUNDED = 0.2
# Up to this relative distance two sets of weights may be one model in two quantisations. Measured on SmolLM2-135M, the
# largest of all arrays: to the original 0.009 (Q8_0), 0.05 (Q5_1), 0.07 (Q5_0), 0.10 (Q4_1), 0.13 (Q4_0, MXFP4), and in
# blocks of 16 weights 0.22 (3 bits) and 0.48 (2 bits); between two files of 4 bits up to 0.17. Two models of one shape
# are 1.5 to 1.7 apart. Noise of 3 % on each weight, as much as a long fine-tuning, gives 0.04: nothing here tells it
# from quantisation.
FARTHEST_QUANTISED = 0.5


def check_method(stored: dict[str, Any], method: Method, source: str) -> None:
    """Compares the method that an adapter was trained for with the one it is to serve.

    Streaming is no difference, an adapter that was trained with a random number of closing tokens
    (`Method.min_comp_tokens`) serves any of these numbers, and any `Method.ratio` where they begin at 1, one that was
    trained to repeat chunks also serves the method without it, and how many recent chunks stay as text changes nothing
    in how one is compressed. Where closing tokens are one token wherever they stand (CCM's ``positions: stride``), an
    adapter serves any `Method.ratio` and any number of them. Among methods that compress nothing only whether the LoRA
    acts counts: a plain LoRA serves full context, a window and no context alike, and text that is pooled.

    Raises:
      UserError: with both names and what differs.
    """
    there = completed(stored)
    here = describe_method(method)
    # Each of these makes equal what is no difference to the adapter; what then differs is one.
    if there["closes"] or here["closes"] or there["pool"]:
        if serves_fewer(stored, method):
            there = there | {"closes": here["closes"]}
        if method.repeat is None:
            there, here = _without_repetition(there), _without_repetition(here)
        there, here = _without_recent(there), _without_recent(here)
        there, here = _at_any_ratio(there), _at_any_ratio(here)
        if there["min_comp_tokens"] == 1:
            there = there | {"ratio": here["ratio"]}  # a short chunk has one
        differ = [key for key in sorted(there | here) if there.get(key) != here.get(key) and key not in _IRRELEVANT]
    else:
        differ = ["gate"] * (bool(there["gate"]) != bool(here["gate"]))
    if differ:

        def show(key):
            return f"{key}: {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} here"

        raise UserError(
            f"{source} was trained for the method {label(there)}, but the method here is {label(here)}. They differ "
            f"({'; '.join(map(show, differ))}). Use the adapter's method, or an adapter for this one"
        )


def serves_fewer(stored: dict[str, Any], method: Method) -> bool:
    """Whether an adapter was trained to serve a method that closes chunks with fewer of its tokens, and this is one."""
    min_comp_tokens, closes = stored.get("min_comp_tokens"), describe_method(method)["closes"]
    return bool(min_comp_tokens) and len(closes) >= min_comp_tokens and stored["closes"][: len(closes)] == closes


def _without_repetition(method: dict[str, Any]) -> dict[str, Any]:
    """A described method without its repetition tokens, which nobody else sees: what is left of it outside training."""

    def kinds(names):
        return [name for name in names if name != "REPEAT"]

    sees = {pair: spans for pair, spans in method["sees"].items() if not pair.startswith("REPEAT ")}
    return method | {
        "repeat": None,
        "repeat_by": None,
        "sees": sees,
        **{key: kinds(method[key]) for key in ("gate", "both_ways")},
    }


def _without_recent(method: dict[str, Any]) -> dict[str, Any]:
    """A described method as it is when no closed chunk stays as text (`Method.recent`)."""
    recent, sees = method["recent"], {}
    for pair, spans in method["sees"].items():
        query, _, key = pair.partition(" sees ")
        if recent and query in ("TEXT", "QUERY") and key in ("TEXT", "QUERY"):
            spans = [[0, 0]]
        elif recent and query in ("TEXT", "QUERY") and key == "MEMORY":
            spans = [[nearest - recent, None if farthest is None else farthest - recent] for nearest, farthest in spans]
        sees[pair] = spans
    return method | {"recent": 0, "sees": sees}


def _at_any_ratio(method: dict[str, Any]) -> dict[str, Any]:
    """A described method as all are that differ only in how far its tokens, which are one token, stand apart."""
    # Of a file that was tampered with anything may stand here, which then differs as it is.
    closes, starts = method["closes"], method["starts_from"]
    if not (method["ratio"] and closes and isinstance(closes, list) and all(isinstance(x, dict) for x in closes)):
        return method
    first, *others = ({key: value for key, value in token.items() if key != "offset"} for token in closes)
    if not first.get("from_begin") or any(token != first for token in others):
        return method
    starts = starts | {"window": None} if isinstance(starts, dict) else starts
    return method | {"closes": [first], "ratio": "any", "starts_from": starts}


def describe_base(model: Transformer, name: str) -> dict[str, Any]:
    """A base model as JSON values: what a person calls it, its shape, and a sample of its weights.

    The sample is a few numbers of every array, at regular places, rounded to bfloat16: the same for a model that was
    loaded in float32 and in bfloat16, on whatever devices.
    """
    config = dataclasses.asdict(model.config)
    # How far positions were trained has no part in the computation.
    config.pop("max_position")
    arrays = base_parameters(model)
    counts = {path: min(x.size, max(_SAMPLES, _OF_A_LAYER * _layers(path, x))) for path, x in arrays.items()}
    # Of a fixed byte order: the same text on every machine.
    sample = {path: x.view(np.uint16).astype(">u2").tobytes().hex() for path, x in _samples(arrays, counts).items()}
    text = json.dumps([{k: _short(v) for k, v in sorted(config.items())}, sample])
    return {
        "name": name,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        "config": config,
        "sample": sample,
    }


def _layers(path: str, x: Any) -> int:
    return x.shape[0] if path.startswith("layers.") else 1


def _sample_indices(size: int, count: int) -> np.ndarray:
    """Where a sample of so many is taken in an array, laid out flat: the number of samples says the places."""
    return np.linspace(0, size - 1, count).astype(np.int64)


def _samples(arrays: dict[str, Any], counts: dict[str, int]) -> dict[str, np.ndarray]:
    """So many numbers of each array, bfloat16, on the host."""
    arrays = {path: arrays[path] for path in counts}
    # A place for each axis: flat places of a large stack do not fit int32, and to flatten an array that is spread would
    # gather it.
    where = {path: np.unravel_index(_sample_indices(x.size, counts[path]), x.shape) for path, x in arrays.items()}
    return {path: processes.whole(x).astype(ml_dtypes.bfloat16) for path, x in _take(arrays, where).items()}


@jax.jit
def _take(arrays, where):
    return {path: x.at[where[path]].get(mode="promise_in_bounds") for path, x in arrays.items()}


def _order(x: np.ndarray) -> np.ndarray:
    """Whole numbers that count the bfloat16 values: neighbours differ by one."""
    bits = x.view(np.int16).astype(np.int32)
    # A sign and a magnitude: negative values are turned around, and both zeros are 0.
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def _short(value: Any) -> Any:
    """Numbers as they survive float32: a GGUF file stores 1e-05 as 9.99999974e-06."""
    if isinstance(value, dict):
        return {key: _short(x) for key, x in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_short(x) for x in value]
    return f"{value:.6g}" if isinstance(value, float | int) and not isinstance(value, bool) else value


def check_base(
    stored: dict[str, Any], model: Transformer, name: str, source: str, *, accept_quantised: bool = False
) -> None:
    """Compares the base model that an adapter was trained on with the one it is to serve.

    Args:
      stored: `describe_base` of the one. Arrays that it does not tell of, being older, are not compared.
      model: the other.
      name: what a person calls it.
      source: the adapter, for messages.
      accept_quantised: weights may differ as those of one model do in several quantisations, up to
        `FARTHEST_QUANTISED`; a warning then says by how much. A base that was trained a little further differs less
        than that, and is accepted, too: whoever sets this vouches for the model.

    Raises:
      UserError: with both names and what differs.
    """
    here, there = dataclasses.asdict(model.config), _with_defaults(ModelConfig, stored.get("config", {}))
    if there["rope_scaling"]:
        there["rope_scaling"] = _with_defaults(RopeScaling, there["rope_scaling"])
    differ = [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in here | there
        if key != "max_position" and _short(there.get(key)) != _short(here.get(key))
    ]
    if not differ:
        change = _compare(stored.get("sample", {}), model)
        if change is None:
            return
        text, distance = change
        differ = [text]
        if accept_quantised and distance <= FARTHEST_QUANTISED:
            warnings.warn(
                f"{source} was trained on {stored.get('name') or 'an unnamed model'!r}, and is used with other weights "
                f"of the same shape: {text}. This is accepted as another quantisation (adapter.accept_quantised_base)",
                stacklevel=2,
            )
            return
        if distance > FARTHEST_QUANTISED:
            differ.append(f"quantisations of one model stay within {FARTHEST_QUANTISED}, so this is another model")
        else:
            differ.append(
                f"should both be one model that is quantised in different ways (distances up to {FARTHEST_QUANTISED}), "
                "set adapter.accept_quantised_base: true"
            )
    if differ:

        def called(base):
            return f"{base.get('name') or 'an unnamed model'!r} (fingerprint {base.get('fingerprint', '?')})"

        raise UserError(
            f"{source} was trained on the base model {called(stored)}, but the base model here is "
            f"{called(describe_base(model, name))}: "
            f"{'; '.join(differ)}. Use the adapter's base model; if a stage-1 LoRA was merged into that one, do so "
            "here as well"
        )


def _with_defaults(kind: type, stored: dict[str, Any]) -> dict[str, Any]:
    """What was stored of a dataclass; a field that an older file does not have yet has its default there."""

    def default(field):
        return None if field.default is dataclasses.MISSING else field.default

    return {field.name: default(field) for field in dataclasses.fields(kind)} | stored


def _compare(there: dict[str, str], model: Transformer) -> tuple[str, float] | None:
    """What differs between stored samples and a model's weights, and how far they are apart; None for the same model.

    Each array and each layer of it is judged by itself: a LoRA that was merged may have changed a single one. Of a
    layer there are few samples, so there only those count that are not even neighbours.
    """
    arrays = base_parameters(model)
    stored = {
        path: np.frombuffer(bytes.fromhex(there[path]), ">u2").astype(np.uint16).view(ml_dtypes.bfloat16)
        for path in sorted(there.keys() & arrays.keys())
    }
    here = _samples(arrays, {path: a.size for path, a in stored.items()})
    changed, equal, total, farthest = [], 0, 0, 0.0
    for path, a in stored.items():
        x, b = arrays[path], here[path]
        unequal, far = a != b, np.abs(_order(a) - _order(b)) > 1
        # The layer that each sample is of.
        layer = _sample_indices(x.size, a.size) * _layers(path, x) // x.size
        counts, wrong = np.bincount(layer), np.bincount(layer, far)
        if unequal.mean() > _ROUNDED or (wrong > np.maximum(_ROUNDED * counts, 1)).any():
            changed.append(path)
        equal, total = equal + int((~unequal).sum()), total + a.size
        a, b = a.astype(np.float64), b.astype(np.float64)
        gap, norm = np.linalg.norm(a - b), np.linalg.norm(a)
        farthest = max(farthest, gap / norm if norm else gap)
    if total and not changed:
        return None
    if not total:
        return "nothing is known of the weights there", float("inf")
    names = ", ".join(changed[:3]) + ", ..." * (len(changed) > 3)
    return (
        f"same shape, but {equal / total:.1%} of the sampled weights are equal (not those of {names}), and they are "
        f"up to {farthest:.2g} apart (relative distance of an array)",
        float(farthest),
    )
