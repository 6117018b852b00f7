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
from jax_ccm.nn.config import PROJECTIONS
from jax_ccm.weights import load_model, peft
from jax_ccm.weights.adapters import Adapter
from jax_ccm.weights.peft_modules import NOTE
from tests import cases
from tests.weights.common import logits

GOLDEN = Path(__file__).parents[1] / "golden" / "ccm" / "adapters_safetensors"
# Written by PEFT itself: tests/golden/peft/make.py.
REAL = Path(__file__).parents[1] / "golden" / "peft"


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
    adapter = Adapter.read(plain, method=build("full"))
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
        Adapter.read(plain, method=build("ccm_merge", comp_tokens=2))


def test_a_bin_file_of_peft(plain):
    (plain / "adapter_model.safetensors").unlink()
    shutil.copy(GOLDEN.with_name("adapters") / "full_lora" / "pytorch_model.bin", plain / "adapter_model.bin")
    assert Adapter.read(plain).config.rank == 8


def test_narrow_floats_widen_exactly(plain):
    whole = Adapter.read(plain)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        edit_tensors(plain, lambda t, dtype=dtype: t.update({k: x.astype(dtype) for k, x in t.items()}))
        narrow = Adapter.read(plain)
        for name, x in narrow.arrays.items():
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x.astype(dtype), whole.arrays[name].astype(ml_dtypes.bfloat16).astype(dtype))


def test_export_has_pefts_keys_and_shapes(tmp_path):
    model = cases.model(tokens=2)
    path = Adapter.of(model, method=build("ccm_merge", comp_tokens=2), base="org/tiny").write(
        tmp_path / "a", format="peft"
    )
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
    assert set(config) == set(golden) | {NOTE} and config[NOTE] is True
    assert config["base_model_name_or_path"] == "org/tiny" and (config["r"], config["lora_alpha"]) == (4, 16)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
        (dict(use_dora=True), "use_dora is True .*DoRA"),
        (dict(bias="lora_only"), "bias is 'lora_only' .*trained biases"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (dict(rank_pattern={"q_proj": 4}), r"q_proj.lora_A.weight' is \[8, 64\], but adapter_config.json says rank 4"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern is .* an integer from 1"),
        (dict(alpha_pattern={"q(": 4}), "alpha_pattern is .* a number for each pattern"),
        (dict(alpha_pattern=[4]), "alpha_pattern is .* a number for each pattern"),
        (dict(layers_to_transform=[0, 1]), "layers.2.*but adapter_config.json gives that module no LoRA"),
        (dict(layers_to_transform="all"), "layers_to_transform is 'all'; it must be a number of a layer"),
        (dict(layers_to_transform=[0], target_modules="q_proj"), "empty where target_modules is a regular expression"),
        (dict(layers_pattern="h", layers_to_transform=[0]), "gives that module no LoRA"),
        (dict(exclude_modules=["k_proj"]), "k_proj.*gives that module no LoRA"),
        (dict(exclude_modules=7), "exclude_modules is 7; it must be a list of names"),
        (dict(layer_replication=[[0, 4]]), "layer_replication"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa' .*base weights"),
        (dict(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
        (dict(trainable_token_indices=[1]), "trained rows of the vocabulary"),
        (dict(some_future_feature={"on": 1}), "some_future_feature"),
        (dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]), "lacks tensor '.*up_proj.lora_A"),
        (dict(target_modules=["q_proj", "lm_head"]), "target_modules names 'lm_head'; implemented is a LoRA on q_proj"),
        (dict(target_modules="all-linear"), "lacks tensor .*gate_proj"),
        (dict(target_modules=None), "target_modules is None; it must be a list of names"),
        (dict(target_modules="(q_proj"), "one regular expression"),
        (dict(target_modules=".*lm_head"), "gives that module no LoRA"),
        (dict(r="8"), "r is '8'; it must be an integer from 1"),
        (dict(r=0), "r is 0"),
        (dict(r=True), "r is True"),
        (dict(lora_alpha=None), "lora_alpha is None"),
        (dict(lora_dropout=1.5), "lora_dropout is 1.5; it must be below 1"),
        (dict(r=4), r"lora_A.weight' is \[8, 64\], but adapter_config.json says rank 4"),
        (dict(target_modules=["q_proj"]), "k_proj.*but adapter_config.json gives that module no LoRA"),
    ],
)
def test_what_is_not_implemented_is_refused_with_a_reason(plain, fields, message):
    edit(plain, **fields)
    with pytest.raises(UserError, match=message):
        Adapter.read(plain)


def test_settings_without_effect_are_accepted(plain):
    edit(plain, revision="main", use_rslora=False, rank_pattern={}, megatron_core="megatron.core", qalora_group_size=16)
    edit(plain, loftq_config={"loftq_bits": 4}, eva_config={"rho": 2.0})
    edit(plain, peft_version="0.18.0", layers_pattern="layers", init_lora_weights="gaussian", inference_mode=True)
    Adapter.read(plain)


def set_shape(name, shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


LORA_A = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(LORA_A), rf"lacks tensor '{LORA_A}' of rank 8"),
        (lambda t: [t.pop(k) for k in [*t] if "v_proj.lora_B" in k], "lacks tensor '.*layers.0.*v_proj.lora_B"),
        (set_shape(LORA_A, (8, 32)), rf"{LORA_A}' is \[8, 32\], .* not as wide as '.*layers.0.self_attn.q_proj.lora_A"),
        (set_shape(LORA_A, (0,)), r"q_proj.lora_A.weight' is empty, \[0\]: it was saved under DeepSpeed ZeRO-3"),
        (set_shape(LORA_A.replace("lora_A.weight", "lora_magnitude_vector"), (8,)), "of DoRA"),
        (set_shape("base_model.model.model.embed_tokens.weight", (9, 8)), "the whole table of embeddings"),
        (set_shape("base_model.model.lm_head.weight", (9, 8)), r"lm_head.weight' \[9, 8\], of the head, is not known"),
        (set_shape(LORA_A.replace("self_attn.q_proj", "mlp.up_proj"), (8, 64)), "mlp.up_proj.*no LoRA"),
        (lambda t: t.update({LORA_A: np.ones((8, 64))}), "is of type float64"),
    ],
)  # fmt: skip
def test_tensors_that_are_wrong(plain, change, message):
    edit_tensors(plain, change)
    with pytest.raises(UserError, match=message):
        Adapter.read(plain)


def test_damaged_files(plain):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = (plain / name).read_bytes()
        (plain / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=name):
            Adapter.read(plain)
        (plain / name).write_bytes(whole)
    (plain / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list"):
        Adapter.read(plain)
    (plain / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="holds no adapter"):
        Adapter.read(plain)


@pytest.fixture(scope="module")
def base():
    return load_model(REAL / "base")


@pytest.mark.parametrize(
    "name, rank, targets",
    [
        ("mlp", 2, ["gate_proj", "up_proj", "down_proj"]),
        ("all_linear", 2, [*PROJECTIONS]),
        ("rslora", 3, ["q_proj", "v_proj"]),
        ("ranks", 3, ["q_proj", "k_proj", "up_proj"]),
        ("rslora_ranks", 5, ["v_proj", "down_proj"]),
        ("regex", 2, ["q_proj", "k_proj", "up_proj"]),
        ("regex_all", 2, ["q_proj", "v_proj"]),
        ("full_names", 2, ["q_proj", "down_proj"]),
        ("excluded", 2, ["q_proj", "o_proj"]),
        ("excluded_regex", 2, ["q_proj", "v_proj", "o_proj"]),
        ("layers", 2, ["q_proj", "up_proj"]),
        ("one_layer", 2, ["v_proj"]),
    ],
)
def test_adapters_as_peft_writes_them(base, tmp_path, name, rank, targets):
    """PEFT's logits beside the base, merged into it, and after a way through every format."""
    golden = np.load(REAL / "expected.npz")
    adapter = Adapter.read(REAL / name, method=build("full"))
    assert (adapter.config.rank, [*adapter.config.targets]) == (rank, targets)
    beside = adapter.onto(base, method=build("full"))
    assert np.abs(golden[name] - golden["base"]).max() > 0.1
    np.testing.assert_allclose(logits(base, golden["ids"]), golden["base"], atol=2e-5)
    np.testing.assert_allclose(logits(beside, golden["ids"], gate=1.0), golden[name], atol=2e-5)
    np.testing.assert_allclose(logits(adapter.merged_into(base), golden["ids"]), golden[name], atol=2e-5)
    for format in ("own", "peft", "reference"):
        again = Adapter.read(adapter.write(tmp_path / format, format=format))
        assert (again.config, again.partial) == (adapter.config, adapter.partial)
        for path, x in adapter.arrays.items():
            np.testing.assert_array_equal(again.arrays[path], x, err_msg=path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("dora", "use_dora is True .DoRA, which also rescales the weights"),
        ("saved_modules", r"modules_to_save is \['norm'\] .whole modules that were trained besides the LoRA"),
        ("token_rows", r"trainable_token_indices is \[3, 5\] .trained rows of the vocabulary"),
        ("head", "target_modules names 'lm_head'; implemented is a LoRA on q_proj, .*down_proj"),
        ("bias", "bias is 'lora_only' .trained biases"),
    ],
)
def test_what_is_refused_is_refused_for_its_own_reason(name, message):
    """Not for a tensor that the reader does not know."""
    with pytest.raises(UserError, match=message):
        Adapter.read(REAL / name)


def test_a_lora_on_some_layers_fits_any_depth_that_has_them(base, tmp_path):
    """What names layers says nothing of those behind; what names none must have them all."""
    adapter = Adapter.read(REAL / "layers")
    assert adapter.partial and adapter.arrays["layers.mlp.up_proj.lora_a"].shape[0] == 2
    assert not adapter.onto(base, method=build("full")).layers.mlp.up_proj.lora_b[...][2].any()
    for name in ("mlp", "regex_all", "excluded"):
        shutil.copytree(REAL / name, tmp_path / name)
        edit_tensors(tmp_path / name, lambda t: [t.pop(key) for key in [*t] if "layers.2." in key])
        short = Adapter.read(tmp_path / name)
        assert not short.partial
        with pytest.raises(UserError, match="this model needs"):
            short.onto(base, method=build("full"))
    shutil.copytree(REAL / "layers", tmp_path / "layers")
    edit_tensors(tmp_path / "layers", lambda t: [t.pop(key) for key in [*t] if "layers.1.mlp" in key])
    with pytest.raises(UserError, match="lacks tensor '.*layers.1.mlp.up_proj.lora_A.weight'"):
        Adapter.read(tmp_path / "layers")
