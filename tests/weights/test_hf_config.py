"""config.json: what each family says, in the spellings of both transformers 4 and 5, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.nn import ModelConfig, RopeScaling, rope
from jax_ccm.weights import hf_config, read_config
from tests.weights.test_parity import CASES, GOLDEN

SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=512)  # fmt: skip
LLAMA3 = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def read(family="llama", **fields) -> ModelConfig:
    return hf_config.from_dict({"model_type": family, **SIZES, **fields}, "config.json")


def test_llama_defaults():
    assert read() == ModelConfig("llama", 100, 32, 64, 3, 4, 4, 8, norm_eps=1e-6, max_position=512)
    assert read(num_key_value_heads=2, tie_word_embeddings=True, head_dim=None) == ModelConfig(
        "llama", 100, 32, 64, 3, 4, 2, 8, norm_eps=1e-6, tie_embeddings=True, max_position=512
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_left_out_fields_mean_what_transformers_assumes(family):
    from transformers import CONFIG_MAPPING

    sizes = {**SIZES, "num_attention_heads": 32, "hidden_size": 256}
    theirs = CONFIG_MAPPING[family](**{k: v for k, v in sizes.items() if k != "max_position_embeddings"})
    raw = {"model_type": family, **sizes}
    del raw["max_position_embeddings"]
    ours = hf_config.from_dict(raw, "config.json")
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // 32)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    ropes = theirs.rope_parameters
    if family == "gemma3_text":
        assert ours.window_theta == ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    assert ours.rope_theta == ropes["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
            RopeScaling("linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_both_spellings_of_rope(old, new, expected):
    assert read(**old) == read(**new)
    assert read(**old).rope_theta == 5e5 and read(**old).rope_scaling == expected


def test_two_bases_in_both_spellings():
    old = read("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_local_base_freq=5e3)
    kinds = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}  # fmt: skip
    assert old == read("gemma3_text", rope_parameters=kinds)
    assert old.rope_theta == 1e6 and old.window_theta == 5e3 and old.rope_scaling == RopeScaling("linear", 8.0)
    kinds["sliding_attention"] = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(UserError, match="of sliding_attention are .*; only a base .rope_theta. is implemented"):
        read("gemma3_text", rope_parameters=kinds)
    with pytest.raises(UserError, match="attn_logit_softcapping is 50.0: soft-capped"):
        read("gemma3_text", attn_logit_softcapping=50.0)


def test_biases_and_norms():
    biases = lambda config: (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm)
    assert biases(read(attention_bias=True)) == (True, True, False, False)
    assert biases(read(attention_bias=True, mlp_bias=True)) == (True, True, True, False)
    assert biases(read("qwen2", num_key_value_heads=4)) == (True, False, False, False)
    assert biases(read("qwen3", num_key_value_heads=4, attention_bias=True)) == (True, True, False, True)
    assert biases(read("mistral", num_key_value_heads=4)) == (False, False, False, False)


def test_phi3_in_the_spelling_of_its_early_files():
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    early = read(
        "phi3", partial_rotary_factor=0.75, rope_scaling={"type": "su", **factors}, max_position_embeddings=8192
    )
    assert early.rope_scaling == RopeScaling(
        "longrope", 2.0, original_max_position=4096, attention_factor=(13 / 12) ** 0.5, short_factor=(1.0,) * 3,
        long_factor=(2.0,) * 3,
    )  # fmt: skip
    assert early.rotary_dim == 6 and early.norm_eps == 1e-5 and early.sliding_window is None
    with pytest.raises(UserError, match="partial_rotary_factor is 1.5; it must be above 0 and at most 1"):
        read("phi3", partial_rotary_factor=1.5)


def test_sliding_window():
    mistral = lambda **fields: read("mistral", num_key_value_heads=2, **fields).sliding_window
    qwen = lambda **fields: read("qwen2", num_key_value_heads=2, sliding_window=64, **fields).sliding_window
    assert mistral() == 4096 and mistral(sliding_window=None) is None and mistral(sliding_window=16) == 16
    assert qwen() is None and qwen(use_sliding_window=False) is None
    assert qwen(use_sliding_window=True, max_window_layers=0) == 64
    assert qwen(use_sliding_window=True, max_window_layers=3) is None
    assert qwen(use_sliding_window=True, layer_types=["sliding_attention"] * 3) == 64
    assert qwen(layer_types=["full_attention"] * 3) is None
    mixed = ["full_attention", "sliding_attention", "sliding_attention"]
    for fields in ({"max_window_layers": 1}, {"layer_types": mixed}):
        found = read("qwen2", num_key_value_heads=2, sliding_window=64, use_sliding_window=True, **fields)
        assert found.sliding_window == 64 and found.full_layers == (0,)
        assert found.windowed == (False, True, True)
        assert hf_config.from_dict(hf_config.to_dict(found, "float32"), "x") == found
    with pytest.raises(UserError, match="one for each of the 3 layers"):
        qwen(use_sliding_window=True, layer_types=mixed[:2])
    with pytest.raises(UserError, match="layer_types say full_attention, but the sliding window in force is 16"):
        mistral(sliding_window=16, layer_types=mixed)
    assert read("gemma3_text", num_hidden_layers=8).full_layers == (5,)
    assert read("gemma3_text", sliding_window_pattern=2).full_layers == (1,)
    gemma = lambda **fields: read("gemma2", **fields)
    assert gemma().windowed == (True, False, True) and gemma(layer_types=mixed).full_layers == (0,)
    with pytest.raises(UserError, match="the sliding window in force is None"):
        qwen(layer_types=["sliding_attention"] * 3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel of model_type 'gpt2' is not"),
        ({"model_type": None}, "none named of model_type 'None' is not supported; supported: llama .LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification .* not supported"),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}},
            "'ntk' is not supported; supported: default, linear, l",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing; it must be a positive number"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "beta_fast": 4}},
            "'beta_fast' is not known for 'dyn",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "only one set for all layers"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "'mrope_section' is not known"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing; it must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised safetensors are not read"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "Python code of its own"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 7}, "rotary embedding needs an even number"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"vocab_size": "100"}, "vocab_size is '100'; it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
        ({"hidden_size": None}, "hidden_size is None; it must be a positive integer"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; it must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; it must be a positive number"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; it must be a list of names"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        read(**({"model_type": "llama"} | fields))


def test_missing_size_is_named():
    with pytest.raises(UserError, match="intermediate_size is missing"):
        hf_config.from_dict(
            {"model_type": "llama", **{k: v for k, v in SIZES.items() if k != "intermediate_size"}}, "c"
        )


def test_unknown_fields_are_not_dropped_in_silence():
    with pytest.warns(UserWarning, match="have no effect: new_trick"):
        read(new_trick=3, another=None)


def test_broken_file(tmp_path):
    with pytest.raises(UserError, match="there is no config.json in"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="config.json: not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list; an object is needed"):
        read_config(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_written_config_is_read_back_and_by_transformers(case):
    from transformers import CONFIG_MAPPING

    config = read_config(GOLDEN / case)
    raw = hf_config.to_dict(config, "float32")
    assert hf_config.from_dict(json.loads(json.dumps(raw)), "x") == config
    theirs = CONFIG_MAPPING[config.family].from_dict(raw)
    original = CONFIG_MAPPING[config.family].from_json_file(GOLDEN / case / "config.json")
    # What follows from the rest (the attention factor of YaRN) is written, too.
    assert theirs.rope_parameters == theirs.rope_parameters | original.rope_parameters
    for name in ("head_dim", "sliding_window", "layer_types", "attention_bias", "mlp_bias", "num_key_value_heads"):
        if hasattr(original, name):
            assert getattr(theirs, name) == getattr(original, name)


def test_what_the_format_cannot_say_is_not_written():
    config = dataclasses.replace(read(), qkv_bias=True)
    with pytest.raises(UserError, match="cannot express this model"):
        hf_config.to_dict(config, "float32")


@pytest.mark.parametrize("record", (GOLDEN / "ropes.jsonl").read_text().splitlines())
def test_frequencies_equal_transformers(record):
    """YaRN, dynamic NTK and longrope, for each length of a session, in both spellings."""
    record = json.loads(record)
    fields = dict(hidden_size=256, max_position_embeddings=8192)
    old = {k: v for k, v in record["rope"].items() if k not in ("rope_theta", "rope_type")}
    for spelling in (
        {"rope_parameters": record["rope"]},
        {"rope_theta": 10000.0, "rope_scaling": {"type": record["rope"]["rope_type"], **old}},
    ):
        config = read(**fields, **spelling).for_length(record["length"] if config_by_length(record) else None)
        np.testing.assert_allclose(rope.frequencies(config), record["frequencies"], rtol=2e-6)
        assert config.rope_scaling is not None
        assert config.rope_scaling.attention_factor == pytest.approx(record["factor"])
        cos, sin = rope.angles(config, np.array([0]))
        np.testing.assert_allclose(cos, record["factor"] * np.ones((1, 32)), rtol=1e-6)


def config_by_length(record) -> bool:
    return record["rope"]["rope_type"] in ("dynamic", "longrope")


def test_one_length_for_a_session():
    """The frequencies are chosen when the model is made, and the config says how far they serve."""
    with pytest.raises(ValueError, match="has no scaling and does not depend on a length; leave it out"):
        read().for_length(4096)
    with pytest.raises(ValueError, match="is scaled by 'linear' and does not depend on a length"):
        read(rope_scaling={"type": "linear", "factor": 2.0}).for_length(4096)
    dynamic = read(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert dynamic.positions == 512 and dynamic.for_length(2048).positions == 2048
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope = read(original_max_position_embeddings=64, rope_scaling={"type": "longrope", **factors})
    assert longrope.rope_scaling.factor == 8.0
    assert longrope.positions == 64 and longrope.for_length(65).positions == 512
    with pytest.raises(UserError, match="longrope has 3 factors for 4 pairs of dimensions"):
        read(rope_scaling={"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4})
    with pytest.raises(UserError, match="long_factor is None; it must be a list of positive numbers"):
        read(rope_scaling={"type": "longrope", "short_factor": [1.0] * 4})


def test_a_length_that_the_model_does_not_depend_on_is_refused():
    with pytest.raises(UserError, match="model.rope_length is 99, but the rope of this model has no scaling"):
        read_config(GOLDEN / "llama_mha", 99)
    assert read_config(GOLDEN / "llama_dynamic", 99).rope_scaling.length == 99
