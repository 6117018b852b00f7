"""`config.json` of Hugging Face models to and from `ModelConfig`.

Read by hand rather than through `transformers`: the spelling of several fields depends on the version of the library
that wrote the file, and every field that would change the computation must be implemented here or refused.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, RopeScaling, rope
from jax_ccm.parsing import read_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# Families whose files hold queries, keys and values, and gate and up, as one projection each.
FUSED = ("phi3",)
SUPPORTED = ", ".join(f"{family} ({name})" for family, name in ARCHITECTURES.items())
# Parameters that a scaling of the rotary embedding may have besides its kind and base.
_ROPE: dict[str, tuple[str, ...]] = {
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

# What transformers assumes for a field that the file leaves out, where the families differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen2": {
        "num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768, "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "phi3": {
        "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip

# Fields that change the computation in a way that is not implemented, and the value at which they do not.
_NEUTRAL: dict[str, tuple[Any, str]] = {
    "quantization_config": (None, "quantised safetensors are not read; give the unquantised model, or a GGUF file"),
    "compression_config": (None, "compressed safetensors are not read; give the uncompressed model, or a GGUF file"),
    "partial_rotary_factor": (1.0, "rotary embedding of only a part of each head is not implemented"),
    "rope_interleaved": (False, "interleaved rotary pairs are not implemented"),
    "use_qk_norm": (False, "a norm of queries and keys is implemented for model_type qwen3 only"),
    "attn_logit_softcapping": (None, "soft-capped attention scores are not implemented"),
    "final_logit_softcapping": (None, "soft-capped logits are not implemented"),
    "logit_scale": (1.0, "scaled logits are not implemented"),
    "logits_scaling": (1.0, "scaled logits are not implemented"),
    "embedding_multiplier": (1.0, "scaled embeddings are not implemented"),
    "residual_multiplier": (1.0, "scaled residual branches are not implemented"),
    "attention_multiplier": (None, "another attention scale than head_dim ** -0.5 is not implemented"),
    "clip_qkv": (None, "clipped queries, keys and values are not implemented"),
    "no_rope_layers": (None, "layers without rotary embedding are not implemented"),
    "num_experts": (0, "mixtures of experts are not implemented"),
    "num_local_experts": (0, "mixtures of experts are not implemented"),
    "is_encoder_decoder": (False, "encoder-decoder models are not implemented"),
    "add_cross_attention": (False, "cross-attention is not implemented"),
}

# Of these, what is implemented for some families.
_IMPLEMENTED: dict[str, tuple[str, ...]] = {"phi3": ("partial_rotary_factor",)}

# Fields without influence on the logits of a plain forward pass, or read below.
_KNOWN = set(
    """architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act rms_norm_eps max_position_embeddings tie_word_embeddings rope_theta
    rope_scaling rope_parameters original_max_position_embeddings attention_bias mlp_bias sliding_window
    use_sliding_window max_window_layers layer_types auto_map
    initializer_range use_cache attention_dropout hidden_dropout embd_pdrop resid_pdrop pretraining_tp torch_dtype dtype
    transformers_version ignore_keys_at_rope_validation
    _name_or_path bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    _attn_implementation _attn_implementation_autoset attn_implementation is_llama_config transformers.js_config
    max_sequence_length model_max_length use_bfloat16 output_attentions output_hidden_states return_dict
    chunk_size_feed_forward id2label label2id problem_type task_specific_params tokenizer_class unsloth_version
    unsloth_fixed""".split()
)


def read(path: Path) -> ModelConfig:
    """The `ModelConfig` of a ``config.json``.

    Raises:
      UserError: if the file is missing or broken, the architecture is not supported, or a field asks for a
        computation that is not implemented.
    """
    if not path.is_file():
        raise UserError(f"there is no {path.name} in {str(path.parent)!r}; a model in Hugging Face layout has one")
    return from_dict(read_json(path), str(path))


def from_dict(raw: dict[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` of a parsed ``config.json``; ``where`` names it in errors. See `read`."""
    family = str(raw.get("model_type"))
    architectures = _names(raw, "architectures", where)
    wrong = [name for name in architectures if name != ARCHITECTURES.get(family)]
    if family not in ARCHITECTURES or wrong:
        named = ", ".join(wrong or architectures) or "none named"
        raise UserError(
            f"{where}: architecture {named} of model_type {family!r} is not supported; supported: {SUPPORTED}"
        )
    _refuse(raw, family, where)
    get = _Fields(raw, _DEFAULTS[family], where)
    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    head_dim = get("head_dim", int, optional=True)
    if head_dim is None:
        if hidden % heads:
            raise UserError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    if head_dim % 2:
        raise UserError(f"{where}: head_dim is {head_dim}; rotary embedding needs an even number")
    theta, scaling, rotated = _rope(raw, get, family, where)
    bias = get("attention_bias", bool, default=False) if family in ("llama", "qwen3") else False
    try:
        config = ModelConfig(
            family=family,
            vocab_size=get("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=get("intermediate_size", int),
            num_layers=get("num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", int, optional=True) or heads,
            head_dim=head_dim,
            norm_eps=get("rms_norm_eps", float, default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=get("tie_word_embeddings", bool, default=False),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=get("mlp_bias", bool, default=False) if family == "llama" else False,
            qk_norm=family == "qwen3",
            sliding_window=_window(raw, get, family, where),
            max_position=get("max_position_embeddings", int),
            rotary_factor=rotated,
        )
        rope.frequencies(config)  # raises for factors that do not fit the head
        return config
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Typed access to a ``config.json``."""

    raw: dict[str, Any]
    defaults: dict[str, Any]
    where: str

    def __call__(self, name: str, kind: type, *, default: Any = None, optional: bool = False) -> Any:
        value = self.raw[name] if name in self.raw else self.defaults.get(name, default)
        if value is None:
            if optional:
                return None
            value = default  # null counts as absent, as in transformers
        number = isinstance(value, int | float) and not isinstance(value, bool)
        positive = number and 0 < value < float("inf")
        whole = positive and isinstance(value, int)
        if not {int: whole, float: positive, bool: isinstance(value, bool)}[kind]:
            wanted = {int: "a positive integer", float: "a positive number", bool: "true or false"}[kind]
            given = f"is {value!r}" if name in self.raw else "is missing"
            raise UserError(f"{self.where}: {name} {given}; it must be {wanted}")
        return kind(value)


def _names(raw: dict[str, Any], field: str, where: str) -> list[str]:
    value = raw.get(field) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: {field} is {value!r}; it must be a list of names")
    return value


def _refuse(raw: dict[str, Any], family: str, where: str) -> None:
    for name, (neutral, reason) in _NEUTRAL.items():
        if raw.get(name) not in (None, neutral) and name not in _IMPLEMENTED.get(family, ()):
            raise UserError(f"{where}: {name} is {raw[name]!r}: {reason}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only silu is implemented")
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        raise UserError(f"{where}: auto_map says that the model is computed by Python code of its own; that is not run")
    strange = sorted(name for name, value in raw.items() if name not in _KNOWN and name not in _NEUTRAL and value)
    if strange:
        warnings.warn(f"{where}: fields that are not known, and have no effect: {', '.join(strange)}", stacklevel=4)


def _rope(raw: dict[str, Any], get: _Fields, family: str, where: str) -> tuple[float, RopeScaling | None, float]:
    """Base, scaling, and the share of a head that is rotated.

    From ``rope_theta`` and ``rope_scaling``, or ``rope_parameters`` (transformers 5).
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"{where}: rope parameters {given!r}: only one set for all layers is implemented")
    # A null entry counts as absent, as it does in transformers.
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # what early files call it
    if kind not in _ROPE:
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; supported: {', '.join(_ROPE)}")
    share = given.pop("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
    if share != 1.0 and "partial_rotary_factor" not in _IMPLEMENTED.get(family, ()):
        raise UserError(f"{where}: rope parameter partial_rotary_factor: {_NEUTRAL['partial_rotary_factor'][1]}")
    params = dataclasses.replace(get, raw=given, defaults={}, where=f"{where}: rope parameters")
    theta = params("rope_theta", float) if "rope_theta" in given else get("rope_theta", float, default=10000.0)
    strange = sorted(set(given) - set(_ROPE[kind]) - {"rope_theta", "factor", "original_max_position_embeddings"})
    if strange:
        raise UserError(f"{where}: rope parameter {strange[0]!r} is not known for {kind!r} rope")
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(f"{where}: partial_rotary_factor is {share!r}; it must be above 0 and at most 1")
    if kind == "default":
        return theta, None, share
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
        return theta, RopeScaling(kind, factor, original_max_position=longest if kind == "dynamic" else 8192), share
    if kind == "llama3":
        low, high = params("low_freq_factor", float), params("high_freq_factor", float)
        if low >= high:
            raise UserError(f"{where}: low_freq_factor {low} must be smaller than high_freq_factor {high}")
        return theta, RopeScaling(kind, factor, low, high, original), share
    scaling = RopeScaling(kind, factor, original_max_position=original)
    if kind == "longrope":
        shown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (_numbers(given, name, params.where) for name in ("short_factor", "long_factor"))
        scaling = dataclasses.replace(scaling, short_factor=short, long_factor=long)
    else:
        temper = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
        one, all_ = (params(name, float) if given.get(name) else 0.0 for name in ("mscale", "mscale_all_dim"))
        shown = temper(one) / temper(all_) if one and all_ else temper(1.0)
        scaling = dataclasses.replace(
            scaling,
            beta_fast=params("beta_fast", float, default=32.0),
            beta_slow=params("beta_slow", float, default=1.0),
            truncate=params("truncate", bool, default=True),
        )
    return theta, dataclasses.replace(scaling, attention_factor=params("attention_factor", float, default=shown)), share


def _numbers(given: dict[str, Any], name: str, where: str) -> tuple[float, ...]:
    value = given.get(name)
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf
    if not isinstance(value, list) or not all(map(number, value)):
        raise UserError(f"{where}: {name} is {value!r}; it must be a list of positive numbers")
    return tuple(map(float, value))


def _window(raw: dict[str, Any], get: _Fields, family: str, where: str) -> int | None:
    """The sliding window, if all layers have it; None if no layer has one."""
    kinds = set(_names(raw, "layer_types", where))
    if family == "llama":
        window = None
    elif family in ("mistral", "phi3") or get("use_sliding_window", bool, default=False):
        window = get("sliding_window", int, optional=True)
    else:
        window = None
    if not kinds and window is not None and family.startswith("qwen"):
        # Qwen: the first max_window_layers layers attend to everything, the others through the window.
        full = 0 if raw.get("max_window_layers") == 0 else get("max_window_layers", int)
        kinds = {"full_attention"} if full > 0 else set()
        kinds |= {"sliding_attention"} if full < get("num_hidden_layers", int) else set()
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        raise UserError(
            f"{where}: layers of different attention ({', '.join(sorted(kinds))}; see layer_types, max_window_layers) "
            "are not implemented: all layers must have the sliding window, or none"
        )
    unsaid = kinds == {"sliding_attention"} and window is None
    if unsaid or kinds == {"full_attention"} and family == "mistral" and window is not None:
        raise UserError(f"{where}: layer_types say {kinds.pop()}, but the sliding window in force is {window}")
    return None if kinds == {"full_attention"} else window


def to_dict(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that transformers and `read` understand; ``dtype`` is that of the weights.

    Raises:
      UserError: if the family's format cannot say what the config says.
    """
    family = config.family
    if family not in ARCHITECTURES:
        raise UserError(f"family {family!r} cannot be written in Hugging Face layout; supported: {SUPPORTED}")
    scaling_said = None if config.rope_scaling is None else _rope_dict(config.rope_scaling)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling_said,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if family == "llama":
        raw |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    elif family == "qwen3":
        raw |= {"attention_bias": config.qkv_bias}
    elif family == "phi3":
        raw |= {"partial_rotary_factor": config.rotary_factor}
        if config.rope_scaling is not None:
            raw |= {"original_max_position_embeddings": config.rope_scaling.original_max_position}
    if family in ("mistral", "phi3"):
        raw |= {"sliding_window": config.sliding_window}
    elif family.startswith("qwen"):
        window = config.sliding_window
        raw |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": config.num_layers if window is None else 0,
        }
    # The length of sessions is chosen by who loads the file; it has no place in it.
    scaling = config.rope_scaling
    unsaid = None if scaling is None else dataclasses.replace(scaling, length=None)
    if from_dict(raw, "export") != dataclasses.replace(config, rope_scaling=unsaid):
        raise UserError(
            f"a {family!r} config.json cannot express this model: {config}. Its biases, q/k norm and window must be "
            "those of the family"
        )
    return raw


def _rope_dict(scaling: RopeScaling) -> dict[str, Any]:
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
    used = {name: said[name] for name in _ROPE[scaling.kind] if name in said}
    return {"rope_type": scaling.kind, **used}
