"""Which base an adapter belongs to: what a difference is, what is none, and other quantisations."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jax_ccm.errors import UserError
from jax_ccm.methods import build
from jax_ccm.weights import load_model
from jax_ccm.weights.adapters import Adapter, load_adapter
from jax_ccm.weights.hf import parameters
from jax_ccm.weights.identity import FARTHEST_QUANTISED
from tests import cases

GOLDEN = Path(__file__).parents[1] / "golden"
CONCAT = build("ccm_concat", comp_tokens=2)
MODEL = cases.model(tokens=2, qkv_bias=True, qk_norm=True)
BASE = [path for path in parameters(MODEL) if not path.endswith(("lora_a", "lora_b", "comp"))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Adapter.of(MODEL, method=CONCAT, base="tiny").write(tmp_path_factory.mktemp("identity") / "a")


def changed(change, *paths, model=MODEL):
    """The model with ``change`` of the arrays at these paths, all of the base if none is named."""
    graphdef, state = nnx.split(model)
    leaves = [
        jnp.asarray(change(np.asarray(x))) if path in (paths or BASE) else x for path, x in parameters(state).items()
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


def noise(amount, rows=slice(None), seed=0):
    def change(x):
        x = np.array(x)
        x[rows] += amount * np.random.default_rng(seed).standard_normal(x[rows].shape, np.float32) * max(x.std(), 0.1)
        return x

    return change


@pytest.mark.parametrize("path", BASE)
def test_a_change_of_any_array_is_another_base(saved, path):
    """A LoRA of stage 1 may have been merged into any projection."""
    with pytest.raises(UserError, match=f"of the sampled weights are equal .not those of {path}.*stage-1 LoRA"):
        load_adapter(saved, changed(noise(0.1), path), method=CONCAT)


def test_a_change_of_one_layer_is_another_base(tmp_path):
    """And into a single layer of many."""
    model = cases.model(num_layers=80, tokens=2, hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1)
    saved = Adapter.of(model, method=CONCAT, base="deep").write(tmp_path / "a")
    for layer, path in ((0, "self_attn.k_proj"), (41, "mlp.up_proj"), (79, "self_attn.o_proj")):
        with pytest.raises(UserError, match=f"not those of layers.{path}.kernel"):
            load_adapter(saved, changed(noise(0.1, layer), f"layers.{path}.kernel", model=model), method=CONCAT)


def test_merging_a_lora_of_any_projection_is_seen(saved, tmp_path):
    for target in ("k_proj", "o_proj"):
        plain = cases.model()
        arrays = {
            path: np.zeros_like(x) if f".{target}." not in path else x
            for path, x in parameters(nnx.state(plain, nnx.LoRAParam)).items()
        }
        graphdef, lora, base = nnx.split(plain, nnx.LoRAParam, ...)
        plain = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(lora), list(arrays.values())), base)
        stage1 = Adapter.of(plain, method=build("full"), base="tiny").write(tmp_path / target)
        model = cases.model(tokens=2)
        mine = Adapter.of(model, method=CONCAT, base="tiny").write(tmp_path / f"mine_{target}")
        with pytest.raises(UserError, match=f"not those of layers.self_attn.{target}.kernel"):
            load_adapter(mine, Adapter.read(stage1).merged_into(model), method=CONCAT)


def test_rounding_is_no_difference(saved):
    """Of a merge in another order of sums, and of weights that were kept in float16 in between."""
    load_adapter(saved, changed(lambda x: x * (1 + 1e-6)), method=CONCAT)
    load_adapter(saved, changed(lambda x: x.astype(np.float16).astype(np.float32)), method=CONCAT)
    load_adapter(saved, changed(lambda x: x.astype(ml_dtypes.bfloat16)), method=CONCAT)


def test_an_adapter_that_tells_of_four_arrays():
    """Written before all arrays were sampled, and before some fields of a config existed."""
    path, base = GOLDEN / "formats" / "adapter_four_samples", load_model(GOLDEN / "hf" / "llama_gqa")
    method = build("ccm_concat", comp_tokens=1)
    loaded = load_adapter(path, base, method=method, base="llama_gqa")
    assert loaded.adapter is not None and loaded.adapter.targets == ("q_proj", "v_proj")
    with pytest.raises(UserError, match="not those of layers.mlp.down_proj.kernel"):
        load_adapter(path, changed(noise(0.1), "layers.mlp.down_proj.kernel", model=base), method=method)


@pytest.mark.parametrize("field", ["sliding_window", "qk_norm", "tie_embeddings"])
def test_a_config_without_newer_fields(saved, tmp_path, field):
    """What an older file does not tell has its default; one that this library does not know is a difference."""
    shutil.copytree(saved, tmp_path / "a")
    about = json.loads((saved / "adapter.json").read_text())
    value = about["base"]["config"].pop(field)
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(about))
    if value:
        with pytest.raises(UserError, match=f"{field}: False there, True here"):
            load_adapter(tmp_path / "a", MODEL, method=CONCAT)
    else:
        load_adapter(tmp_path / "a", MODEL, method=CONCAT)
    about["base"]["config"] |= {field: value, "of_the_future": 2}
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="of_the_future: 2 there, None here"):
        load_adapter(tmp_path / "a", MODEL, method=CONCAT)


def test_another_quantisation_is_accepted_if_asked_for(saved, tmp_path):
    """Round trips through blocks of 8 and 4 bits; never another model, and never in silence."""
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize, quantize

    kernels = [path for path in BASE if path.endswith(("kernel", "embedding"))]
    for kind, least, most in ((Type.Q8_0, 0.002, 0.02), (Type.Q4_0, 0.05, 0.25)):
        rounded = changed(
            lambda x, kind=kind: dequantize(quantize(x.reshape(-1, 32), kind), kind).reshape(x.shape), *kernels
        )
        with pytest.raises(UserError, match=r"up to 0.\d+ apart.*set adapter.accept_quantised_base: true"):
            load_adapter(saved, rounded, method=CONCAT)
        with pytest.warns(UserWarning, match=r"trained on 'tiny'.* up to 0.\d+ apart") as said:
            load_adapter(saved, rounded, method=CONCAT, accept_quantised_base=True)
        distance = float(str(said[0].message).split("up to ")[1].split()[0])
        assert least < distance < most < FARTHEST_QUANTISED
    with pytest.raises(UserError, match=r"up to 1.\d apart.*stay within 0.5, so this is another model"):
        load_adapter(saved, changed(noise(0), model=cases.model(2, seed=5, qkv_bias=True, qk_norm=True)), method=CONCAT,
                     accept_quantised_base=True)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(saved, MODEL, method=CONCAT, accept_quantised_base=True)


def test_another_quantisation_of_the_base_of_stage_1(tmp_path):
    plain = cases.model()
    path = Adapter.of(plain, method=build("full"), base="tiny").write(tmp_path / "a")
    near = changed(noise(0.02), *(p for p in parameters(plain) if p.endswith("kernel")), model=plain)
    with pytest.raises(UserError, match="accept_quantised_base"):
        Adapter.read(path).merged_into(near)
    with pytest.warns(UserWarning, match="accepted as another quantisation"):
        Adapter.read(path).merged_into(near, accept_quantised_base=True)
