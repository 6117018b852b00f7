"""PEFT's layout: keys, a plain LoRA of PEFT, and every feature that is refused."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.weights import peft
from jax_ccm.weights.adapters import read_adapter, save_adapter
from tests import cases

GOLDEN = Path(__file__).parents[1] / "golden" / "ccm" / "adapters_safetensors"


@pytest.fixture
def plain(tmp_path):
    """A plain LoRA as PEFT saves it."""
    shutil.copytree(GOLDEN / "full_lora", tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "plain" / "adapter_model.safetensors")
    return tmp_path / "plain"


def edit(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_plain_lora_of_peft(plain):
    adapter = read_adapter(plain, method=build("full"))
    assert (adapter.config.rank, adapter.config.scale, adapter.config.tokens) == (8, 2.0, 0)
    assert adapter.config.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    tensors = load_file(plain / "adapter_model.safetensors")
    for layer in range(4):
        key = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_"
        np.testing.assert_array_equal(
            adapter.arrays["layers.self_attn.v_proj.lora_a"][layer].T, tensors[f"{key}A.weight"]
        )
        np.testing.assert_array_equal(
            adapter.arrays["layers.self_attn.v_proj.lora_b"][layer].T, tensors[f"{key}B.weight"]
        )
    with pytest.raises(UserError, match=r"plain LoRA without compression tokens, but method ccm_merge \(2 tokens\)"):
        read_adapter(plain, method=build("ccm_merge", comp_tokens=2))


def test_a_bin_file_of_peft(plain):
    (plain / "adapter_model.safetensors").unlink()
    shutil.copy(GOLDEN.with_name("adapters") / "full_lora" / "pytorch_model.bin", plain / "adapter_model.bin")
    assert read_adapter(plain).config.rank == 8


def test_narrow_floats_widen_exactly(plain):
    whole = read_adapter(plain)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        edit_tensors(plain, lambda t, dtype=dtype: t.update({k: x.astype(dtype) for k, x in t.items()}))
        narrow = read_adapter(plain)
        for name, x in narrow.arrays.items():
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x.astype(dtype), whole.arrays[name].astype(ml_dtypes.bfloat16).astype(dtype))


def test_export_has_pefts_keys_and_shapes(tmp_path):
    model = cases.model(tokens=2)
    path = save_adapter(tmp_path / "a", model, method=build("ccm_merge", comp_tokens=2), base="org/tiny", format="peft")
    tensors = load_file(path / "adapter_model.safetensors")
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    expected = {peft.COMP_KEY: (2, 32)}
    for layer in range(3):
        for target, (i, o) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            expected |= {f"{stem}.lora_A.weight": (4, i), f"{stem}.lora_B.weight": (o, 4)}
    assert {name: x.shape for name, x in tensors.items()} == expected
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    stem = "base_model.model.model.layers.2.self_attn.k_proj.lora_B.weight"
    np.testing.assert_array_equal(tensors[stem].T, model.layers.self_attn.k_proj.lora_b[...][2])
    config = json.loads((path / "adapter_config.json").read_text())
    golden = json.loads((GOLDEN / "merge_n2" / "adapter_config.json").read_text())
    assert set(config) == set(golden)
    assert config["base_model_name_or_path"] == "org/tiny" and (config["r"], config["lora_alpha"]) == (4, 16)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
        (dict(use_rslora=True), r"use_rslora is True \(the scale alpha / sqrt\(r\)\)"),
        (dict(use_dora=True), "use_dora is True .*DoRA"),
        (dict(bias="lora_only"), "bias is 'lora_only' .*trained biases"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
        (dict(layers_to_transform=[0, 1]), "layers_to_transform"),
        (dict(layer_replication=[[0, 4]]), "layer_replication"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa' .*base weights"),
        (dict(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
        (dict(trainable_token_indices=[1]), "trained rows of the vocabulary"),
        (dict(some_future_feature={"on": 1}), "some_future_feature"),
        (dict(target_modules=["q_proj", "up_proj"]), r"target_modules is \['q_proj', 'up_proj'\]; implemented"),
        (dict(target_modules="all-linear"), "'all-linear'"),
        (dict(target_modules=None), "target_modules is None"),
        (dict(r="8"), "r is '8'; it must be an integer from 1"),
        (dict(r=0), "r is 0"),
        (dict(r=True), "r is True"),
        (dict(lora_alpha=None), "lora_alpha is None"),
        (dict(lora_dropout=1.5), "dropout 1.5"),
        (dict(r=4), r"lora_a' is \[4, 64, 8\]; expected are \[layers, in, 4\]"),
        (dict(target_modules=["q_proj"]), "lora_a', which its own description does not name"),
    ],
)
def test_what_is_not_implemented_is_refused_with_a_reason(plain, fields, message):
    edit(plain, **fields)
    with pytest.raises(UserError, match=message):
        read_adapter(plain)


def test_settings_without_effect_are_accepted(plain):
    edit(plain, revision="main", use_rslora=False, rank_pattern={}, megatron_core="megatron.core", qalora_group_size=16)
    edit(plain, peft_version="0.18.0", layers_pattern="layers", init_lora_weights="gaussian", inference_mode=True)
    read_adapter(plain)


def set_shape(name, shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


LORA_A = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(LORA_A), rf"lacks tensor '{LORA_A}' \[8, 64\]"),
        (lambda t: [t.pop(k) for k in [*t] if "v_proj.lora_B" in k], "lacks tensor 'layers.self_attn.v_proj.lora_b"),
        (set_shape(LORA_A, (8, 32)), rf"{LORA_A}' is \[8, 32\], but .*layers.0.self_attn.q_proj.lora_A.* is \[8, 64\]"),
        (set_shape("base_model.model.lm_head.weight", (9, 8)), r"lm_head.weight' \[9, 8\] is not known"),
        (set_shape(LORA_A.replace("self_attn.q_proj", "mlp.up_proj"), (8, 64)), r"mlp.up_proj.* is not known"),
        (lambda t: t.update({LORA_A: np.ones((8, 64))}), "is of type float64"),
    ],
)  # fmt: skip
def test_tensors_that_are_wrong(plain, change, message):
    edit_tensors(plain, change)
    with pytest.raises(UserError, match=message):
        read_adapter(plain)


def test_damaged_files(plain):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = (plain / name).read_bytes()
        (plain / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=name):
            read_adapter(plain)
        (plain / name).write_bytes(whole)
    (plain / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list"):
        read_adapter(plain)
    (plain / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter(plain)
