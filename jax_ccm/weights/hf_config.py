"""`config.json` of Hugging Face models to and from `ModelConfig`.

Read by hand rather than through `transformers`: the spelling of several fields depends on the version of the library
that wrote the file, and every field that would change the computation must be implemented here or refused.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, rope
from jax_ccm.records.parsing import read_json
from jax_ccm.weights import hf_rope
from jax_ccm.weights.hf_fields import Fields, names

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Families whose files hold queries, keys and values, and gate and up, as one projection each.
FUSED = ("phi3",)
SUPPORTED = ", ".join(f"{family} ({name})" for family, name in ARCHITECTURES.items())
# Families whose attention may have biases.
_ATTENTION_BIAS = ("llama", "qwen3", "gemma2", "gemma3_text")
# What holds for every model of a family.
_GEMMA = {"activation": "gelu_tanh", "post_norms": True, "norm_offset": True, "scale_embeddings": True}
_ALWAYS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"qk_norm": True},
}
# Families whose layers have the sliding window but for each n-th.
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}

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
    "gemma2": {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096,
        "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072, "sliding_window": 4096,
        "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "rope_theta": 1e6,
    },
}  # fmt: skip

# Fields that change the computation in a way that is not implemented, and the value at which they do not.
_NEUTRAL: dict[str, tuple[Any, str]] = {
    "quantization_config": (None, "quantised safetensors are not read; give the unquantised model, or a GGUF file"),
    "compression_config": (None, "compressed safetensors are not read; give the uncompressed model, or a GGUF file"),
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
    "use_bidirectional_attention": (False, "text that sees what comes after it is not implemented"),
    "is_encoder_decoder": (False, "encoder-decoder models are not implemented"),
    "add_cross_attention": (False, "cross-attention is not implemented"),
}

# Of these, what is implemented for some families.
_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("final_logit_softcapping",),
}

# Fields without influence on the logits of a plain forward pass, or read below.
_KNOWN = set(
    """architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act hidden_activation query_pre_attn_scalar partial_rotary_factor
    rms_norm_eps max_position_embeddings tie_word_embeddings rope_theta
    rope_scaling rope_parameters original_max_position_embeddings attention_bias mlp_bias sliding_window
    use_sliding_window max_window_layers layer_types auto_map
    initializer_range use_cache attention_dropout hidden_dropout embd_pdrop resid_pdrop pretraining_tp torch_dtype dtype
    transformers_version ignore_keys_at_rope_validation
    _name_or_path bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    _attn_implementation _attn_implementation_autoset attn_implementation is_llama_config transformers.js_config
    max_sequence_length model_max_length use_bfloat16 output_attentions output_hidden_states return_dict
    chunk_size_feed_forward id2label label2id problem_type task_specific_params tokenizer_class unsloth_version
    unsloth_fixed cache_implementation sliding_window_pattern _sliding_window_pattern rope_local_base_freq""".split()
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
    architectures = names(raw, "architectures", where)
    wrong = [name for name in architectures if name != ARCHITECTURES.get(family)]
    if family not in ARCHITECTURES or wrong:
        named = ", ".join(wrong or architectures) or "none named"
        raise UserError(
            f"{where}: architecture {named} of model_type {family!r} is not supported; supported: {SUPPORTED}"
        )
    _refuse(raw, family, where)
    get = Fields(raw, _DEFAULTS[family], where)
    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    head_dim = get("head_dim", int, optional=True)
    if head_dim is None:
        if hidden % heads:
            raise UserError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    if head_dim % 2:
        raise UserError(f"{where}: head_dim is {head_dim}; rotary embedding needs an even number")
    bias = get("attention_bias", bool, default=False) if family in _ATTENTION_BIAS else False
    # What the family always has comes last, and holds whatever the file says.
    fields = {"qkv_bias": bias, "o_bias": bias} | _ALWAYS.get(family, {})
    fields |= hf_rope.read(get, family) | _window(get, family)
    if "query_pre_attn_scalar" in _DEFAULTS[family]:
        fields["query_scalar"] = get("query_pre_attn_scalar", int)
    for name, field in (("score_cap", "attn_logit_softcapping"), ("logit_cap", "final_logit_softcapping")):
        if field in _IMPLEMENTED.get(family, ()):
            fields[name] = get(field, float, optional=True)
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
            tie_embeddings=get("tie_word_embeddings", bool, default=False),
            mlp_bias=get("mlp_bias", bool, default=False) if family == "llama" else False,
            max_position=get("max_position_embeddings", int),
            **fields,
        )
        rope.frequencies(config)  # raises for factors that do not fit the head
        return config
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _refuse(raw: dict[str, Any], family: str, where: str) -> None:
    for name, (neutral, reason) in _NEUTRAL.items():
        # null counts as absent, as in transformers.
        if raw.get(name) not in (None, neutral) and name not in _IMPLEMENTED.get(family, ()):
            raise UserError(f"{where}: {name} is {raw[name]!r}: {reason}")
    gelu = _ALWAYS.get(family, {}).get("activation") == "gelu_tanh"
    field, known = ("hidden_activation", ("gelu_pytorch_tanh",)) if gelu else ("hidden_act", ("silu", "swish"))
    if raw.get(field) not in (None, *known):
        raise UserError(f"{where}: {field} is {raw[field]!r}; only {known[0]} is implemented")
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        raise UserError(f"{where}: auto_map says that the model is computed by Python code of its own; that is not run")
    strange = sorted(name for name, value in raw.items() if name not in _KNOWN and name not in _NEUTRAL and value)
    if strange:
        warnings.warn(f"{where}: fields that are not known, and have no effect: {', '.join(strange)}", stacklevel=4)


def _window(get: Fields, family: str) -> dict[str, Any]:
    """The sliding window, and the layers without it."""
    layers, where = get("num_hidden_layers", int), get.where
    kinds = names(get.raw, "layer_types", where)
    if set(kinds) - {"full_attention", "sliding_attention"} or len(kinds) not in (0, layers):
        raise UserError(
            f"{where}: layer_types are {kinds!r}; implemented are full_attention and sliding_attention, one for each "
            f"of the {layers} layers"
        )
    every = family in ("mistral", "phi3")
    has_window = every or family in _FULL_EVERY or get("use_sliding_window", bool, default=False)
    window = get("sliding_window", int, optional=True) if has_window and family != "llama" else None
    if not kinds and window is not None:

        def full(number):
            return False

        if family.startswith("qwen"):
            # 0 has a meaning here (every layer has the window), and is no positive number to `Fields`.
            first = 0 if get.raw.get("max_window_layers") == 0 else get("max_window_layers", int)

            def full(number):
                return number < first
        elif family in _FULL_EVERY:
            period = _FULL_EVERY[family]
            if family == "gemma3_text":
                # Files have one of these two where they have no layer_types.
                period = get("_sliding_window_pattern", int, default=get("sliding_window_pattern", int, default=period))

            def full(number):
                return (number + 1) % period == 0

        kinds = ["full_attention" if full(number) else "sliding_attention" for number in range(layers)]
    full_layers = tuple(number for number, kind in enumerate(kinds) if kind == "full_attention")
    wrong = "sliding_attention" if window is None else "full_attention" if every else None
    if wrong in kinds:
        raise UserError(f"{where}: layer_types say {wrong}, but the sliding window in force is {window}")
    # No layer has a window, so that the model is one without.
    if len(full_layers) == layers:
        return {}
    return {"sliding_window": window, "full_layers": full_layers}


def to_dict(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that transformers and `read` understand; ``dtype`` is that of the weights.

    Raises:
      UserError: if the family's format cannot say what the config says.
    """
    family = config.family
    if family not in ARCHITECTURES:
        raise UserError(f"family {family!r} cannot be written in Hugging Face layout; supported: {SUPPORTED}")
    scaling_said = None if config.rope_scaling is None else hf_rope.to_dict(config.rope_scaling)
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
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling_said,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    gelu = config.activation == "gelu_tanh"
    raw |= {"hidden_activation": "gelu_pytorch_tanh"} if gelu else {"hidden_act": "silu"}
    if family in _ATTENTION_BIAS:
        raw |= {"attention_bias": config.qkv_bias}
    if family == "llama":
        raw |= {"mlp_bias": config.mlp_bias}
    if "query_pre_attn_scalar" in _DEFAULTS[family]:
        raw |= {"query_pre_attn_scalar": config.query_scalar}
        raw |= {"attn_logit_softcapping": config.score_cap, "final_logit_softcapping": config.logit_cap}
    if family == "phi3":
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
            "max_window_layers": config.num_layers if window is None else len(config.full_layers),
        }
    if family in _FULL_EVERY:
        raw |= {"sliding_window": config.sliding_window}
    if family in hf_rope.WINDOW_THETA:
        raw |= {"rope_local_base_freq": config.window_theta}
    if config.full_layers:
        kinds = ("full_attention", "sliding_attention")
        raw |= {"layer_types": [kinds[windowed] for windowed in config.windowed]}
    # The length of sessions is chosen by who loads the file; it has no place in it.
    scaling = config.rope_scaling
    unsaid = None if scaling is None else dataclasses.replace(scaling, length=None)
    # What the file cannot say shows when it is read again.
    if from_dict(raw, "export") != dataclasses.replace(config, rope_scaling=unsaid):
        raise UserError(
            f"a {family!r} config.json cannot express this model: {config}. Its biases, q/k norm and window must be "
            "those of the family"
        )
    return raw
