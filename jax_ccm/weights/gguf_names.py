"""What GGUF architectures call the tensors, and what holds for all models of one."""

from __future__ import annotations

from typing import Any

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS: dict[Any, dict[str, str]] = {
    "gemma2": _GEMMA_LAYER,
    "gemma3": _GEMMA_LAYER,
    "phi3": _LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
_GEMMA = {"activation": "gelu_tanh", "post_norms": True, "norm_offset": True, "scale_embeddings": True}
# Fields of `ModelConfig`, for all architectures that are supported. The files do not say them.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"qk_norm": True},
    "phi3": {},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | {"qk_norm": True, "family": "gemma3_text", "window_theta": 10000.0},
}
# Architectures whose layers have the sliding window but for each n-th.
FULL_EVERY = {"gemma2": 2, "gemma3": 6}
# Gemma models of so many layers, the largest, whose scores are divided by the root of D / N and not of H.
WIDE_QUERIES = {"gemma2": 46, "gemma3": 62}


def hf_name(name: str, architecture: Any) -> str:
    """Hugging Face's name of a tensor; one that is not understood stays as it is."""
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    layer, parts = _LAYERS.get(architecture, _LAYER), stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in layer:
        return f"model.layers.{parts[1]}.{layer[parts[2]]}.{leaf}"
    return name


def gguf_name(name: str, architecture: Any) -> str:
    """The name in the file: the inverse of `hf_name`."""
    stem, _, leaf = name.rpartition(".")
    for ours, theirs in _TOP.items():
        if stem == theirs:
            return f"{ours}.{leaf}"
    for ours, theirs in _LAYERS.get(architecture, _LAYER).items():
        if stem.startswith("model.layers.") and stem.endswith("." + theirs):
            return f"blk.{stem.split('.')[2]}.{ours}.{leaf}"
    return name
