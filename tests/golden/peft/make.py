"""Writes the adapters of this folder with PEFT, and the logits that PEFT computes with them.

    python tests/golden/peft/make.py        # needs torch, transformers and peft; recorded with peft 0.21.2

The base is ``base``, a tiny llama of transformers. Each adapter has a random B of its own, so that it does something;
``expected.npz`` holds the logits of the same few tokens for each.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
LAYERS = 3
IDS = [[1, 7, 3, 30, 12, 22, 5, 9]]

ADAPTERS = {
    "mlp": dict(target_modules=["gate_proj", "up_proj", "down_proj"], r=2, lora_alpha=3),
    "all_linear": dict(target_modules="all-linear", r=2, lora_alpha=4),
    "rslora": dict(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=5, use_rslora=True),
    "ranks": dict(
        target_modules=["q_proj", "k_proj", "up_proj"], r=2, lora_alpha=4,
        rank_pattern={"k_proj": 3, "layers.1.self_attn.q_proj": 1}, alpha_pattern={r".*layers\.2\.mlp\.up_proj": 7},
    ),
    "rslora_ranks": dict(
        target_modules=["v_proj", "down_proj"], r=2, lora_alpha=4, use_rslora=True, rank_pattern={"down_proj": 5},
        alpha_pattern={"layers.0.self_attn.v_proj": 1},
    ),
    "regex": dict(target_modules=r".*layers\.[02]\.(self_attn\.[qk]_proj|mlp\.up_proj)", r=2, lora_alpha=2),
    "regex_all": dict(target_modules=r".*\.(q|v)_proj", r=2, lora_alpha=2),
    "full_names": dict(
        target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"], r=2, lora_alpha=2,
    ),
    "excluded": dict(target_modules=["q_proj", "o_proj"], exclude_modules=["layers.1.self_attn.q_proj"], r=2),
    "excluded_regex": dict(target_modules="all-linear", exclude_modules=r".*\.(mlp\..*|k_proj)", r=2),
    "layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1], r=2),
    "one_layer": dict(target_modules=["v_proj"], layers_to_transform=1, layers_pattern="layers", r=2),
    # What is refused.
    "dora": dict(target_modules=["v_proj"], use_dora=True, r=1),
    "saved_modules": dict(target_modules=["v_proj"], modules_to_save=["norm"], r=1),
    "token_rows": dict(target_modules=["v_proj"], trainable_token_indices=[3, 5], r=1),
    "head": dict(target_modules=["v_proj", "lm_head"], r=1),
    "bias": dict(target_modules=["v_proj"], bias="lora_only", r=1),
}  # fmt: skip


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    config = LlamaConfig(vocab_size=32, num_hidden_layers=LAYERS, tie_word_embeddings=False, **sizes)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    return model.eval()


def main() -> None:
    model = base()
    shutil.rmtree(HERE / "base", ignore_errors=True)
    model.save_pretrained(HERE / "base")
    expected = {"ids": np.array(IDS), "base": model(torch.tensor(IDS)).logits.detach().numpy()}
    for number, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number + 1)
        wrapped = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **options))
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.data = torch.randn_like(parameter) * 0.5
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        wrapped.save_pretrained(folder)
        (folder / "README.md").unlink()
        again = PeftModel.from_pretrained(base(), folder).eval()
        expected[name] = again(torch.tensor(IDS)).logits.detach().numpy()
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"] = sorted(t) if isinstance(t := config["target_modules"], list) else t
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    np.savez_compressed(HERE / "expected.npz", **expected)


if __name__ == "__main__":
    sys.exit(main())
