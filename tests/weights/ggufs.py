"""Writes small GGUF files as llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
         "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip


def gguf_name(name: str, arch: str = "llama") -> str:
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{(NAMES | GEMMA if 'gemma' in arch else NAMES)[part]}.{leaf}"
    return f"{NAMES[stem]}.{leaf}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """From halves to neighbouring pairs, as the converter does to q and k of Llama models."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def metadata(config: dict, arch: str) -> dict:
    """The numbers of a config.json under llama.cpp's keys."""
    heads = config["num_attention_heads"]
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    return {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": rope["rope_theta"],
    }


def write(path: Path, arch: str, meta: dict, tensors: dict, most: int = 0) -> Path:
    """A file of ``tensors``: float32 arrays, or pairs of raw blocks (or an array to quantise) and a type.

    With ``most``, parts of so many tensors, as NAME-00001-of-00003.gguf.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=most)
    for key, value in meta.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, gguf.GGMLQuantizationType.F32)
        if data.dtype == np.float32:
            data = gguf.quantize(data, kind)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(
    case: Path, path: Path, kind=gguf.GGMLQuantizationType.F32, extra_meta=None, extra_tensors=None, most=0
) -> Path:
    """A recorded Hugging Face model as GGUF; ``kind`` is the type of its matrices, where it fits."""
    config = json.loads((case / "config.json").read_text())
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    tensors = {}
    for name, data in load_file(case / "model.safetensors").items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if arch == "llama" and part in name:
                data = permute(data, config[heads])
        if "gemma" in arch and name.endswith("norm.weight"):
            data = data + np.float32(1)
        fits = data.ndim == 2 and data.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        tensors[gguf_name(name, arch)] = (data, kind) if fits else data
    return write(path, arch, metadata(config, arch) | (extra_meta or {}), tensors | (extra_tensors or {}), most)
