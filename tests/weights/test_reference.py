"""The format of the paper's code: its recorded adapters, exports of ours, and the number of rows."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer
from jax_ccm.weights.adapters import Adapter, load_adapter
from jax_ccm.weights.hf import parameters
from jax_ccm.weights.peft import COMP_KEY
from tests import cases

GOLDEN = Path(__file__).parents[1] / "golden" / "ccm"
TINY = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
)
METHODS = {
    "concat_n2": build("ccm_concat", comp_tokens=2),
    "merge_n2": build("ccm_merge", comp_tokens=2),
    "mistral_concat_n2": build("ccm_concat", comp_tokens=2),
    "full_lora": build("full"),
}


@pytest.fixture(scope="module")
def tiny():
    return Transformer(jax.random.key(0), TINY)


@pytest.mark.parametrize("kind", ["adapters", "adapters_safetensors"])
@pytest.mark.parametrize("name", METHODS)
def test_recorded_adapters(kind, name):
    adapter = Adapter.read(GOLDEN / kind / name, method=METHODS[name])
    assert adapter.config == AdapterConfig(rank=8, alpha=16.0, dropout=0.05, tokens=0 if name == "full_lora" else 2)
    assert adapter.config.scale == 2.0
    tensors = load_file(GOLDEN / "adapters_safetensors" / name / "model.safetensors")
    for target in "qkvo":
        for side in "AB":
            key = f"base_model.model.model.layers.%d.self_attn.{target}_proj.lora_{side}.weight"
            expected = np.stack([tensors[key % layer].T for layer in range(4)])
            np.testing.assert_array_equal(
                adapter.arrays[f"layers.self_attn.{target}_proj.lora_{side.lower()}"], expected
            )
    if name == "full_lora":
        assert "embed_tokens.comp" not in adapter.arrays
    else:
        np.testing.assert_array_equal(adapter.arrays["embed_tokens.comp"], tensors[COMP_KEY][:2])


@pytest.mark.parametrize("name", ["concat_n2", "merge_n2", "full_lora"])
def test_export_has_the_references_keys_and_shapes(tmp_path, tiny, name):
    method = METHODS[name]
    model = load_adapter(GOLDEN / "adapters" / name, tiny, method=method)
    path = Adapter.of(model, method=method, base="tiny-llama").write(tmp_path / name, format="reference")
    ours, theirs = (load_file(p / name / "model.safetensors") for p in (tmp_path, GOLDEN / "adapters_safetensors"))
    assert {k: (x.shape, x.dtype) for k, x in ours.items()} == {k: (x.shape, x.dtype) for k, x in theirs.items()}
    for key, x in theirs.items():
        np.testing.assert_array_equal(ours[key][:2] if key == COMP_KEY else ours[key], x[:2] if key == COMP_KEY else x)
    if name == "merge_n2":
        assert not ours[COMP_KEY][2:].any()
    config, golden = (json.loads((p / "adapter_config.json").read_text()) for p in (path, GOLDEN / "adapters" / name))
    same = set(golden) - {"base_model_name_or_path", "inference_mode"}
    assert set(config) == set(golden) and all(config[key] == golden[key] for key in same)
    again = load_adapter(path, tiny, method=method, base="tiny-llama")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def copy(name, path):
    shutil.copytree(GOLDEN / "adapters_safetensors" / name, path)
    return path


def test_old_spelling_of_the_table(tmp_path):
    path = copy("concat_n2", tmp_path / "old")
    tensors = load_file(path / "model.safetensors")
    tensors[COMP_KEY.replace("comp_", "gist_")] = table = tensors.pop(COMP_KEY)
    save_file(tensors, path / "model.safetensors")
    np.testing.assert_array_equal(Adapter.read(path, method=METHODS["concat_n2"]).arrays["embed_tokens.comp"], table)
    save_file(tensors | {COMP_KEY: table}, path / "model.safetensors")
    with pytest.raises(UserError, match="_embeddings.weight' .* is not known"):
        Adapter.read(path, method=METHODS["concat_n2"])


@pytest.mark.parametrize(
    "name, method, message",
    [
        ("concat_n2", build("ccm_concat", comp_tokens=1), r"2 rows, but method ccm_concat \(1 token\) needs 1 "),
        ("concat_n2", build("ccm_concat", comp_tokens=3), "has 2 rows.*needs 3"),
        ("concat_n2", build("ccm_merge", comp_tokens=2), r"has 2 rows.*needs 4 \(2 COMP and 2 SUM\)"),
        ("merge_n2", build("ccm_merge", comp_tokens=1), "has 4 rows.*needs 2"),
        ("merge_n2", build("ccm_merge", comp_tokens=4), "has 4 rows.*needs 8"),
        ("merge_n2", build("ccm_concat", comp_tokens=2), r"has 4 rows.*needs 2 \(2 COMP\)"),
        ("merge_n2", build("full"), "has 4 rows.*needs 0"),
        ("full_lora", build("ccm_concat", comp_tokens=2), "plain LoRA without compression tokens"),
        ("concat_n2", None, "does not say the method"),
    ],
)  # fmt: skip
def test_another_number_of_rows_is_refused(name, method, message):
    with pytest.raises(UserError, match=message):
        Adapter.read(GOLDEN / "adapters" / name, method=method)


@pytest.mark.parametrize("options", [{}, {"independent": True}, {"sink": True}, {"streaming": True}])
def test_names_that_say_no_method_serve_any_of_that_size(options):
    Adapter.read(GOLDEN / "adapters" / "concat_n2", method=build("ccm_concat", comp_tokens=2, **options))
    Adapter.read(GOLDEN / "adapters" / "merge_n2", method=build("ccm_merge", comp_tokens=2, **options))


@pytest.mark.parametrize(
    "run, name, right, wrong",
    [
        ("llama-7b-no-online-concat_recur-ntok2", "concat_n2", {}, {"sink": True}),
        ("llama-7b-no-online-concat_recur-ntok2-sink", "concat_n2", {"sink": True}, {}),
        ("llama-2-7b-chat-online-concat_recur-ntok2-sink_pajama", "concat_n2", {"sink": True}, {"independent": True}),
        ("r8-llama-7b-no-online-merge-ntok2", "merge_n2", {"independent": True}, {}),
        ("mistral-7b-inst-online-merge_recur-ntok2", "merge_n2", {}, {"independent": True}),
    ],
)
def test_the_published_names_of_runs_say_the_method(tmp_path, run, name, right, wrong):
    path, kind = copy(name, tmp_path / run), f"ccm_{name.removesuffix('_n2')}"
    Adapter.read(path, method=build(kind, comp_tokens=2, **right))
    Adapter.read(path, method=build(kind, comp_tokens=2, streaming=True, **right))
    assert Adapter.read(path).config.tokens == 2
    with pytest.raises(UserError, match=rf"trained for the method {kind}.* but the method here is {kind}"):
        Adapter.read(path, method=build(kind, comp_tokens=2, **wrong))


def test_scale_is_read_per_stage(tmp_path, tiny):
    """Stage 1 and stage 2 have each their own rank, hence their own scale; merging takes stage 1's."""
    path = copy("full_lora", tmp_path / "stage1")
    tensors = {
        key: np.concatenate([x, x], axis=0 if "lora_A" in key else 1)
        for key, x in load_file(path / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    assert Adapter.read(path).config.scale == 1.0
    merged = Adapter.read(path).merged_into(tiny)
    # Both halves of rank 16 are the rank 8 adapter: 1.0 * (BA + BA) == 2.0 * BA.
    same = Adapter.read(GOLDEN / "adapters" / "full_lora").merged_into(tiny)
    for name, x in parameters(merged).items():
        np.testing.assert_allclose(x, parameters(same)[name], atol=1e-6, err_msg=name)
    key = "base_model.model.model.layers.1.self_attn.o_proj.lora_"
    a, b = (tensors[f"{key}{side}.weight"].astype(np.float64) for side in "AB")
    dense = np.asarray(tiny.layers.self_attn.o_proj.kernel[...][1], np.float64) + (b @ a).T
    np.testing.assert_allclose(merged.layers.self_attn.o_proj.kernel[...][1], dense, atol=1e-6)
    stage2 = load_adapter(GOLDEN / "adapters" / "concat_n2", merged, method=METHODS["concat_n2"])
    assert stage2.layers.self_attn.q_proj.scale == 2.0
    assert nnx.state(stage2, nnx.LoRAParam)


def test_an_adapter_for_other_sizes(tiny):
    with pytest.raises(
        UserError, match=r"another base model: tensor 'layers.self_attn.k_proj.lora_b' is \[4, 8, 32\].*\[4, 8, 64\]"
    ):
        load_adapter(GOLDEN / "adapters" / "mistral_concat_n2", tiny, method=METHODS["concat_n2"])


def test_damaged_bin(tmp_path):
    shutil.copytree(GOLDEN / "adapters" / "concat_n2", tmp_path / "a")
    path = tmp_path / "a" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:40000])
    with pytest.raises(UserError, match="pytorch_model.bin is damaged or cut short after 40000 bytes"):
        Adapter.read(tmp_path / "a", method=METHODS["concat_n2"])
    shutil.copy(GOLDEN / "adapters_safetensors" / "concat_n2" / "model.safetensors", tmp_path / "a")
    with pytest.raises(UserError, match="holds both"):
        Adapter.read(tmp_path / "a", method=METHODS["concat_n2"])


@pytest.mark.parametrize("name, options", [("loma", {}), ("sentinel", {}), ("ccm_merge", {"repeat": True})])
def test_methods_that_the_reference_does_not_have(tmp_path, name, options):
    method = build(name, **options)
    model = cases.model(tokens=method.num_embeddings)
    with pytest.raises(UserError, match="not that of the reference's methods"):
        Adapter.of(model, method=method, base="tiny").write(tmp_path / "a", format="reference")
    saved = Adapter.of(model, method=method, base="tiny").write(tmp_path / "b")
    assert Adapter.read(saved, method=method).config.tokens == method.num_embeddings
    with pytest.raises(UserError, match="was trained for the method"):
        Adapter.read(saved, method=build("ccm_concat", comp_tokens=method.num_embeddings))
