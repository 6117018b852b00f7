"""Records logits of tiny random Hugging Face models, frequencies of scaled rotary embeddings, and ids of a tiny
SentencePiece model, for tests/weights.

Needs torch, transformers (5.23 was used; 5.3 for the cases of `SMALL`) and sentencepiece, which the project itself does
not:

    python tests/golden/record_hf.py FOLDER [CASE ...]

Each case becomes a folder with ``config.json``, ``model.safetensors`` and ``expected.npz`` (input_ids ``[2, 48]``,
logits float32 ``[2, 48, V]``). Weights are large enough for logits of a few units, so that an error shows.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             rms_norm_eps=1e-5, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)  # fmt: skip
# Band edges that fall between the wavelengths of 48 positions, unlike those of the real models.
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
SMALL = SIZES | dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64, beta_fast=4.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=3.0)
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[1.0, 2.0, 4.0, 8.0])  # fmt: skip
NO_IDS = dict(pad_token_id=None)
CASES = {
    "llama_mha": LlamaConfig(**SIZES),
    "llama_gqa": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "llama_llama3_tied": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama_linear": LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
    ),
    "llama_biases": LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "smollm2_tied": LlamaConfig(
        **SIZES | dict(hidden_size=48, num_attention_heads=6), num_key_value_heads=2, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e5),
    ),
    "mistral_window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=12),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_window": Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=12, max_window_layers=0
    ),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "llama_yarn": LlamaConfig(**SMALL, rope_parameters=YARN),
    # 48 tokens, for a length of 48.
    "llama_dynamic": LlamaConfig(**SMALL | dict(max_position_embeddings=24), rope_parameters=DYNAMIC),
    "phi3": Phi3Config(**SMALL, **NO_IDS, partial_rotary_factor=0.5, sliding_window=12),
    "phi3_longrope": Phi3Config(
        **SMALL | dict(num_key_value_heads=2), **NO_IDS, original_max_position_embeddings=24, rope_parameters=LONGROPE
    ),
    # Caps that bend what stands before them; the scale of the scores is not that of the head.
    "gemma2": Gemma2Config(
        **SMALL | dict(num_hidden_layers=3), **NO_IDS, head_dim=16, query_pre_attn_scalar=24, sliding_window=12,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
    ),
    # Seven layers: five with the window, one without, and another with.
    "gemma3": Gemma3TextConfig(
        **SMALL | dict(num_hidden_layers=7), **NO_IDS, head_dim=8, query_pre_attn_scalar=6, sliding_window=12,
        rope_parameters={
            "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
            "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
        },
    ),
}  # fmt: skip

# A head of 64 numbers, with the lengths to record.
ROPES = [
    (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048), [None]),
    (dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.5),
     [None]),
    (dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0,
          truncate=False, attention_factor=1.25), [None]),
    (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32), [None]),
    (dict(rope_type="dynamic", factor=2.0), [None, 4096, 8192, 30000]),
    (dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=2048,
          short_factor=[1 + i / 100 for i in range(32)], long_factor=[1 + i / 2 for i in range(32)]),
     [None, 2048, 2049, 8192]),
    (dict(rope_type="longrope", factor=16.0, original_max_position_embeddings=512, attention_factor=1.5,
          short_factor=[1.0] * 32, long_factor=[2.0] * 32), [512, 8192]),
]  # fmt: skip

CORPUS = """The memory of a conversation is smaller than the conversation. What was said in the morning is needed in the
evening: a name, a place, a number, a change of mind. He read the whole letter; she remembered only three words of it.
In 1987 there were 12 houses on the hill, and in 2024 there are 340. Nobody counts the trees any more. "You remember?"
she asked. "No," he said, "but I wrote it down." Compression is forgetting on purpose, and choosing what to forget."""
TEXTS = [
    "The memory of the conversation", "In 2024 she wrote 12 letters.", " leading space, and  two  spaces",
    "naïve café — 記憶 🙂", "tabs\tand\nnew lines\n\n", "remembering the rememberer", "x", "    four",
    "What was said: nothing!",
]  # fmt: skip


def record_model(config, folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # Gemma's norms multiply by 1 + weight.
                parameter.copy_((0 if "gemma" in config.model_type else 1) + 0.2 * noise)
            elif "bias" in name:
                parameter.copy_(0.5 * noise)
            else:
                # Gemma multiplies its embeddings by the square root of their size.
                embedding = 0.3 if "gemma" in config.model_type else 0.2 if config.tie_word_embeddings else 1.0
                parameter.copy_(noise * (embedding if "embed" in name else 1.2 * parameter.shape[-1] ** -0.5))
        ids = torch.randint(0, config.vocab_size, (2, 48), generator=generator)
        logits = model(ids, use_cache=False).logits
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", input_ids=ids.numpy().astype(np.int32), logits=logits.numpy())
    print(f"{folder.name}: {model.num_parameters()} parameters, logits up to {logits.abs().max():.2f}")


def record_ropes(path: Path) -> None:
    sizes = dict(hidden_size=256, num_attention_heads=4, max_position_embeddings=8192)
    records = []
    for rope, lengths in ROPES:
        rope = {"rope_theta": 10000.0, **rope}
        for length in lengths:
            config = LlamaConfig(**sizes, rope_parameters=dict(rope))
            found, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=length)
            records.append({"rope": rope, "length": length, "factor": factor, "frequencies": found.tolist()})
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    print(f"{path.name}: {len(records)} records")


def record_sentencepiece(path: Path) -> None:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "corpus.txt").write_text(CORPUS)
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/corpus.txt", model_prefix=f"{folder}/model", vocab_size=420, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model")
    ids = range(model.vocab_size())
    # Values of GGUF's tokenizer.ggml.token_type.
    kind = lambda i: 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
    record = {
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "types": [kind(i) for i in ids],
        "texts": [{"text": text, "ids": model.encode(text)} for text in [*TEXTS, CORPUS]],
    }
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{path.name}: {len(record['tokens'])} pieces")


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "hf"
    wanted = sys.argv[2:] or [*CASES, "ropes.jsonl", "sentencepiece.json"]
    for number, (name, case) in enumerate(CASES.items()):
        if name in wanted:
            record_model(case, root / name, seed=number)
    if "ropes.jsonl" in wanted:
        record_ropes(root / "ropes.jsonl")
    if "sentencepiece.json" in wanted:
        record_sentencepiece(root / "sentencepiece.json")
