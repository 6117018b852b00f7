"""Our own format, the door to all formats, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, RopeScaling, Transformer, abstract_transformer
from jax_ccm.weights import adapters
from jax_ccm.weights.adapters import Adapter, format_of, load_adapter
from jax_ccm.weights.hf import parameters
from tests import cases

CONCAT = build("ccm_concat", comp_tokens=2)
MERGE = build("ccm_merge", comp_tokens=2)
MODEL = cases.model(tokens=2)


def adapter_arrays(model):
    return {k: np.asarray(v) for k, v in parameters(nnx.state(model, nnx.LoRAParam)).items()}


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def base_only(model, dtype=None):
    """The same base without an adapter."""
    bare = Transformer(jax.random.key(9), model.config)
    graphdef, state = nnx.split(bare)
    source = parameters(model)
    leaves = [source[path] if dtype is None else source[path].astype(dtype) for path in parameters(state)]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


@pytest.fixture
def saved(tmp_path):
    return Adapter.of(MODEL, method=CONCAT, base="tiny", extra={"step": 7}).write(tmp_path / "saved")


@pytest.mark.parametrize("format", adapters.FORMATS)
@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge", "ccm_ema", "gist"])
def test_round_trip_is_bit_exact(tmp_path, format, name):
    method = build(name, comp_tokens=2)
    path = Adapter.of(MODEL, method=method, base="tiny", extra={"step": 7}).write(tmp_path / "a", format=format)
    assert format_of(path) == format
    read = Adapter.read(path, method=method)
    assert read.config == dataclasses.replace(MODEL.adapter, dropout=read.config.dropout)
    assert read.config.dropout == MODEL.adapter.dropout
    assert read.base["name"] == "tiny" and read.extra == {"step": 7} and read.method["name"] == name
    for target in (cases.model(tokens=2, seed=5), base_only(cases.model(tokens=2, seed=5))):
        # Another base is refused; the same base with another adapter, or none, takes this one.
        with pytest.raises(UserError, match="was trained on the base model 'tiny'"):
            load_adapter(path, target, method=method, base="other")
    for target in (merge_adapter_zero(MODEL), base_only(MODEL)):
        loaded = load_adapter(path, target, method=method, base="tiny")
        assert_same(adapter_arrays(loaded), adapter_arrays(MODEL))
        assert loaded.adapter == MODEL.adapter


def merge_adapter_zero(model):
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, lora), base)


def test_arrays_may_lie_in_memory_in_any_order(tmp_path):
    adapter = Adapter.read(Adapter.of(MODEL, method=CONCAT, base="tiny").write(tmp_path / "a"))
    turned = {name: np.asfortranarray(x) for name, x in adapter.arrays.items()}
    for format in adapters.FORMATS:
        path = dataclasses.replace(adapter, arrays=turned).write(tmp_path / format, format=format)
        assert_same(Adapter.read(path, method=CONCAT).arrays, adapter.arrays)


def test_loading_changes_no_argument_and_gives_the_same_function(saved):
    blank = merge_adapter_zero(MODEL)
    loaded = load_adapter(saved, blank, method=CONCAT, base="tiny")
    assert not any(x.any() for x in adapter_arrays(blank).values())
    examples = cases.sessions()
    for a, b in zip(
        parity.parallel_logits(loaded, CONCAT, examples), parity.parallel_logits(MODEL, CONCAT, examples), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_loaded_structure_equals_the_models(saved):
    """So that a loaded adapter triggers no second compilation and can be trained on."""
    loaded = load_adapter(saved, base_only(MODEL), method=CONCAT)
    assert jax.tree.structure(loaded) == jax.tree.structure(MODEL)


@pytest.mark.parametrize(
    "method, named",
    [
        (MERGE, r"ccm_concat \(2 tokens\).*ccm_merge \(2 tokens\)"),
        (build("ccm_concat", comp_tokens=3), r"\(2 tokens\).*\(3 tokens\)"),
        (build("ccm_concat", comp_tokens=2, sink=True), r"\(2 tokens\).*\(2 tokens, sink\)"),
        (build("ccm_concat", comp_tokens=2, independent=True), r"\(2 tokens\).*independent"),
        (build("ccm_concat", comp_tokens=2, conditional=False), r"\(2 tokens\).*LoRA on all tokens"),
        (build("gist", comp_tokens=2), r"ccm_concat.*gist"),
        (build("full"), r"ccm_concat.*full"),
    ],
)
def test_another_method_is_refused_with_both_names(saved, method, named):
    with pytest.raises(UserError, match=named):
        Adapter.read(saved, method=method)
    with pytest.raises(UserError, match=named):
        load_adapter(saved, MODEL, method=method)
    with pytest.raises(UserError, match=named):
        Adapter.read(saved).onto(MODEL, method=method)


def test_streaming_takes_the_adapter(saved):
    load_adapter(saved, MODEL, method=build("ccm_concat", comp_tokens=2, streaming=True))


def test_gisting_online_takes_the_adapter_of_gisting(tmp_path):
    Adapter.of(MODEL, method=build("gist", comp_tokens=2), base="tiny").write(tmp_path / "a")
    load_adapter(tmp_path / "a", MODEL, method=build("gist", comp_tokens=2, online=True))


@pytest.mark.parametrize(
    "trained, plain",
    [
        (build("loma", ratio=2, memory_tokens=2), build("loma", ratio=2, memory_tokens=2, repeat=False)),
        (build("ccm_merge", comp_tokens=1, repeat=True), build("ccm_merge", comp_tokens=1)),
        (
            build("ccm_concat", comp_tokens=1, repeat=True, repeat_by="text", repeat_share=0.5),
            build("ccm_concat", comp_tokens=1),
        ),
    ],
)
def test_repetition_is_a_matter_of_training(tmp_path, trained, plain):
    """An adapter that was trained with repetition tokens serves the method without them, too; not in reverse."""
    path = Adapter.of(MODEL, method=trained, base="tiny").write(tmp_path / "a")
    served = load_adapter(path, base_only(MODEL), method=plain, base="tiny")
    assert served.embed_tokens.comp[...].shape[0] == 1
    examples = cases.sessions()
    for a, b in zip(
        parity.parallel_logits(served, plain, examples), parity.parallel_logits(MODEL, trained, examples), strict=True
    ):
        # The LoRA's products take rows of another number, which rounds otherwise.
        np.testing.assert_allclose(a, b, atol=1e-5)
    path = Adapter.of(served, method=plain, base="tiny").write(tmp_path / "b")
    with pytest.raises(UserError, match="repeat: null there"):
        load_adapter(path, MODEL, method=trained, base="tiny")


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("ccm_concat", dict(comp_tokens=4, repeat=True), [0, 1, 1, 1, 2]),
        ("ccm_merge", dict(comp_tokens=1, repeat=True), [0, 2]),
        ("ccm_concat", dict(comp_tokens=4), [0, 1, 1, 1]),
        ("sentinel", {}, [0, 1]),  # <CR> is of that kind, <CL> of none
        ("loma", dict(ratio=2, memory_tokens=3), [0, 2]),
    ],
)
def test_a_start_takes_each_token_by_its_kind(name, options, rows):
    """Compression tokens begin as compression tokens, and what asks for a repetition as what asked for one."""
    model = cases.model(tokens=3)
    adapter = Adapter.of(model, method=build("ccm_concat", comp_tokens=2, repeat=True), base="tiny")
    method = build(name, **options)
    start = adapter.trained_on(method)
    assert start.config.tokens == method.num_embeddings
    start.check(method)
    for path, x in start.arrays.items():
        np.testing.assert_array_equal(x, adapter.arrays[path][rows] if path == adapters.COMP else adapter.arrays[path])


def test_pooling_is_part_of_the_method(tmp_path):
    """A plain LoRA serves text that is pooled, but one that was trained on pooled text serves no other."""
    plain = cases.model()
    path = Adapter.of(plain, method=build("full"), base="tiny").write(tmp_path / "a")
    load_adapter(path, plain, method=build("compressive"))
    path = Adapter.of(plain, method=build("compressive", ratio=4), base="tiny").write(tmp_path / "b")
    for method in (build("compressive", ratio=8), build("full")):
        with pytest.raises(UserError, match="pool: 4 there"):
            load_adapter(path, plain, method=method)


@pytest.mark.parametrize("name", ["ccm_concat", "ccm_merge"])
def test_an_adapter_serves_any_number_of_recent_chunks(tmp_path, name):
    """How a chunk is compressed does not depend on it; sink and the like still count."""
    plain, recent, more = (build(name, comp_tokens=2, sink=True, recent=number) for number in (0, 1, 3))
    for number, (trained, served) in enumerate(((plain, recent), (recent, plain), (more, recent))):
        path = Adapter.of(MODEL, method=trained, base="tiny").write(tmp_path / str(number))
        load_adapter(path, MODEL, method=served, base="tiny")
        with pytest.raises(UserError, match="sink: true there"):
            load_adapter(path, MODEL, method=build(name, comp_tokens=2, recent=1), base="tiny")


def test_decay_is_part_of_the_method(tmp_path):
    Adapter.of(MODEL, method=build("ccm_ema", comp_tokens=2, decay=0.5), base="tiny").write(tmp_path / "a")
    with pytest.raises(UserError, match=r'mix: .*"decay": 0.5.* there.*"decay": 0.25.* here'):
        Adapter.read(tmp_path / "a", method=build("ccm_ema", comp_tokens=2, decay=0.25))


def test_a_plain_lora_serves_every_method_that_compresses_nothing(tmp_path):
    plain = cases.model()
    path = Adapter.of(plain, method=build("full"), base="tiny").write(tmp_path / "a")
    for method in (build("full"), build("none"), build("window", size=9, sink=True)):
        load_adapter(path, plain, method=method)
    with pytest.raises(UserError, match=r"method full, but the method here is ccm_concat \(2 tokens\)"):
        Adapter.read(path, method=CONCAT)


def test_another_base_is_refused_with_both_names(saved):
    def of_config(**changes):
        bare = base_only(MODEL)
        bare.config = dataclasses.replace(MODEL.config, **changes)
        return bare

    for other, difference in (
        (cases.model(tokens=2, seed=5), "% of the sampled weights are equal"),
        (of_config(hidden_size=64), "hidden_size: 32 there, 64 here"),
        (of_config(family="mistral"), "family: llama there, mistral here"),
        (of_config(rope_theta=5e5), "rope_theta: 10000.0 there, 500000.0 here"),
        (of_config(rope_scaling=RopeScaling("linear", 2.0)), "rope_scaling: None there, {.*} here"),
    ):
        with pytest.raises(UserError, match=rf"base model 'tiny' \(.*'another' \(fingerprint \w+\).*{difference}"):
            load_adapter(saved, other, method=CONCAT, base="another")


def test_a_slightly_finetuned_base_is_another_base(saved):
    rng = np.random.default_rng(3)
    tuned = jax.tree.map(lambda x: x * (1 + 3e-3 * rng.standard_normal(x.shape, np.float32)), base_only(MODEL))
    with pytest.raises(UserError, match="of the sampled weights are equal"):
        load_adapter(saved, tuned, method=CONCAT)


def test_the_base_is_the_same_in_bfloat16(saved, tmp_path):
    half = base_only(MODEL, jnp.bfloat16)
    loaded = load_adapter(saved, half, method=CONCAT)
    assert_same(adapter_arrays(loaded), adapter_arrays(MODEL))
    Adapter.of(loaded, method=CONCAT, base="tiny").write(tmp_path / "half")
    assert Adapter.read(tmp_path / "half").base == Adapter.read(saved).base
    load_adapter(tmp_path / "half", MODEL, method=CONCAT)


def test_numbers_that_float32_rounds_are_the_same_base(saved):
    config = dataclasses.replace(MODEL.config, norm_eps=float(np.float32(1e-5)), max_position=99)
    bare = base_only(MODEL)
    bare.config = config
    load_adapter(saved, bare, method=CONCAT)


def test_a_base_described_before_a_field_existed_is_the_same_base(saved):
    """Old adapters have no word for what every model then was; such a field has its default in them."""
    scaled = dataclasses.replace(MODEL.config, rope_scaling=RopeScaling("linear", 2.0))
    bare = base_only(MODEL)
    bare.config = scaled
    path = saved / "adapter.json"
    identity = json.loads(path.read_text())
    first = dataclasses.fields(scaled)[:10]
    old = {f.name: getattr(scaled, f.name) for f in first} | {"rope_scaling": {"kind": "linear", "factor": 2.0}}
    identity["base"]["config"] = old
    path.write_text(json.dumps(identity))
    load_adapter(saved, bare, method=CONCAT)
    with pytest.raises(UserError, match="rope_scaling: {.*'factor': 2.0.*} there, None here"):
        load_adapter(saved, base_only(MODEL), method=CONCAT)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rank=8), "rank 4, but the model was built for rank 8"),
        (dict(alpha=8.0), "alpha 16.0, but the model was built for alpha 8.0"),
        (dict(tokens=3), "tokens 2, but the model was built for tokens 3"),
        (dict(targets=("q_proj",)), "targets .* but the model was built for"),
    ],
)
def test_a_model_built_for_another_adapter(saved, changes, message):
    bare = base_only(MODEL)
    bare.adapter = dataclasses.replace(MODEL.adapter, **changes)
    with pytest.raises(UserError, match=message):
        load_adapter(saved, bare, method=CONCAT)


def test_a_run_may_set_its_own_dropout(saved):
    config = dataclasses.replace(MODEL.adapter, dropout=0.2)
    graphdef, _ = nnx.split(abstract_transformer(cases.CONFIG, config))
    model = nnx.merge(graphdef, nnx.state(MODEL))
    loaded = load_adapter(saved, model, method=CONCAT)
    assert loaded.adapter.dropout == 0.2 and loaded.layers.self_attn.q_proj.dropout == 0.2


def test_save_checks_the_method_and_the_model(tmp_path):
    with pytest.raises(UserError, match="has 2 compression tokens, but method ccm_concat"):
        Adapter.of(MODEL, method=build("ccm_concat", comp_tokens=3), base="tiny").write(tmp_path / "a")
    with pytest.raises(UserError, match="no adapter"):
        Adapter.of(base_only(MODEL), method=CONCAT, base="tiny").write(tmp_path / "a")
    with pytest.raises(UserError, match="unknown adapter format 'pefd'; did you mean 'peft'"):
        Adapter.of(MODEL, method=CONCAT, base="tiny").write(tmp_path / "a", format="pefd")
    assert not (tmp_path / "a").exists()


def test_rank_zero_trains_embeddings_only(tmp_path):
    model = Transformer(jax.random.key(0), cases.CONFIG, AdapterConfig(rank=0, tokens=2))
    path = Adapter.of(model, method=CONCAT, base="tiny").write(tmp_path / "a")
    assert_same(adapter_arrays(load_adapter(path, base_only(model), method=CONCAT)), adapter_arrays(model))
    with pytest.raises(UserError, match="rank 0"):
        Adapter.of(model, method=CONCAT, base="tiny").write(tmp_path / "b", format="peft")


def test_truncated_files(saved):
    for name in ("adapter.safetensors", "adapter.json"):
        whole = (saved / name).read_bytes()
        for size in (0, 5, len(whole) // 2, len(whole) - 3):
            (saved / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match=name):
                Adapter.read(saved)
        (saved / name).unlink()
        with pytest.raises(UserError, match=f"there is no file .*{name}"):
            Adapter.read(saved)
        (saved / name).write_bytes(whole)
    flipped = bytearray((saved / "adapter.safetensors").read_bytes())
    flipped[-2] ^= 1
    (saved / "adapter.safetensors").write_bytes(flipped)
    with pytest.raises(UserError, match="not the file that .*adapter.json describes"):
        Adapter.read(saved)


def rewrite(folder, change):
    """Rewrites the arrays of our own format, with a digest that fits."""
    adapter = Adapter.read(folder)
    arrays = dict(adapter.arrays)
    change(arrays)
    broken = object.__new__(adapters.Adapter)
    for field in dataclasses.fields(adapter):
        object.__setattr__(broken, field.name, arrays if field.name == "arrays" else getattr(adapter, field.name))
    broken.write(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("layers.self_attn.k_proj.lora_b"), "lacks tensor 'layers.self_attn.k_proj.lora_b'"),
        (lambda a: a.update(x=np.ones(2, np.float32)), "holds tensor 'x'"),
        (lambda a: a.update({"embed_tokens.comp": np.ones((3, 32), np.float32)}), r"'embed_tokens.comp' is \[3, 32\]"),
        (
            lambda a: a.update({"layers.self_attn.q_proj.lora_a": np.ones((3, 32, 5), np.float32)}),
            r"lora_a' is \[3, 32, 5\]; expected are \[layers, in, 4\]",
        ),
        (lambda a: a["embed_tokens.comp"].__setitem__((0, 0), np.nan), "NaN"),
        (lambda a: a.update({"embed_tokens.comp": np.ones((2, 32))}), "'embed_tokens.comp' is of type float64"),
    ],
)
def test_tensors_that_do_not_fit_their_description(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(UserError, match=message):
        Adapter.read(saved)


def test_tensors_that_do_not_fit_the_model(saved):
    rewrite(saved, lambda a: a.update({"layers.self_attn.v_proj.lora_b": np.ones((3, 4, 32), np.float32)}))
    with pytest.raises(
        UserError, match=r"for tiny: tensor 'layers.self_attn.v_proj.lora_b' is \[3, 4, 32\].* \[3, 4, 16\]"
    ):
        load_adapter(saved, MODEL, method=CONCAT)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format="other"), "'other', not 'jax_ccm adapter'"),
        (lambda d: d.update(version=2), "version 2 .*reads version 1"),
        (lambda d: d.pop("method"), "damaged"),
        (lambda d: d["adapter"].update(rnk=3), "damaged.*rnk"),
        (lambda d: d["adapter"].update(targets=["lm_head"]), "lm_head"),
    ],
)
def test_damaged_description(saved, change, message):
    about = json.loads((saved / "adapter.json").read_text())
    change(about)
    (saved / "adapter.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message):
        Adapter.read(saved)


def test_an_older_description_lacks_newer_fields(saved):
    about = json.loads((saved / "adapter.json").read_text())
    del about["method"]["repeat"], about["method"]["mix"]
    (saved / "adapter.json").write_text(json.dumps(about))
    Adapter.read(saved, method=CONCAT)
    with pytest.raises(UserError, match="mix: null there"):
        Adapter.read(saved, method=MERGE)


def test_folders(tmp_path, saved):
    with pytest.raises(UserError, match="is not there"):
        Adapter.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a file, not a folder"):
        Adapter.read(saved / "adapter.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no adapter.*There: nothing"):
        Adapter.read(tmp_path / "empty")
    peft = Adapter.of(MODEL, method=CONCAT, base="tiny").write(tmp_path / "peft", format="peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(peft / name, saved / name)
    with pytest.raises(UserError, match=r"several formats \(own, peft\)"):
        Adapter.read(saved)
    assert_same(Adapter.read(saved, format="peft").arrays, Adapter.read(saved, format="own").arrays)


def test_writing_replaces_an_adapter_but_nothing_else(saved, monkeypatch):
    other = cases.model(tokens=2, seed=5)
    Adapter.of(other, method=CONCAT, base="tiny").write(saved)
    assert_same(Adapter.read(saved).arrays, adapter_arrays(other))
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"other files \(thesis.tex\)"):
        Adapter.of(MODEL, method=CONCAT, base="tiny").write(saved)
    (saved / "thesis.tex").unlink()
    with pytest.raises(UserError, match="is a file"):
        Adapter.of(MODEL, method=CONCAT, base="tiny").write(saved / "adapter.json")

    real = type(saved).rename
    with monkeypatch.context() as patch:
        patch.setattr(
            type(saved),
            "rename",
            lambda a, b: (_ for _ in ()).throw(OSError("disk")) if "new" in a.name else real(a, b),
        )
        with pytest.raises(OSError, match="disk"):
            Adapter.of(MODEL, method=CONCAT, base="tiny").write(saved)
    assert_same(Adapter.read(saved).arrays, adapter_arrays(other))
    assert [p.name for p in saved.parent.iterdir()] == ["saved"], "temporary folders are left behind"


def test_an_adapter_whose_writer_was_killed(saved):
    """Between the two renames it is under no name of its own: whoever reads or writes it next finds it."""
    before, aside = Adapter.read(saved).arrays, saved.with_name(".saved.old-4711")
    saved.rename(aside)
    assert_same(Adapter.read(saved).arrays, before)
    saved.rename(aside)
    (aside / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"other files \(thesis.tex\)"):
        Adapter.of(MODEL, method=CONCAT, base="tiny").write(saved)
    assert_same(Adapter.read(saved).arrays, before)


def test_merging_a_plain_lora_equals_applying_it(tmp_path):
    plain = cases.model()
    path = Adapter.of(plain, method=build("full"), base="tiny").write(tmp_path / "a")
    merged = Adapter.read(path).merged_into(base_only(plain), base="tiny")
    examples, method = cases.sessions(), build("full")
    for a, b in zip(
        parity.parallel_logits(merged, method, examples), parity.parallel_logits(plain, method, examples), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    q = plain.layers.self_attn.q_proj
    dense = np.asarray(q.kernel[...], np.float64) + q.scale * np.asarray(q.lora_a[...], np.float64) @ np.asarray(
        q.lora_b[...]
    )
    np.testing.assert_allclose(merged.layers.self_attn.q_proj.kernel[...], dense, atol=1e-5)


def test_merging_keeps_the_models_own_adapter_and_dtype(tmp_path):
    plain = Adapter.read(Adapter.of(cases.model(), method=build("full"), base="tiny").write(tmp_path / "a"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL)
    merged = plain.merged_into(half)
    assert_same(adapter_arrays(merged), adapter_arrays(half))
    assert merged.layers.self_attn.q_proj.kernel[...].dtype == jnp.bfloat16
    assert jax.tree.structure(merged) == jax.tree.structure(half)
    with pytest.raises(UserError, match=r"does not fit this model.*\[3, 64, 4\].*weight of \[3, 32, 32\]"):
        wide = {name: np.repeat(x, 2, axis=1 if name.endswith("a") else 2) for name, x in plain.arrays.items()}
        dataclasses.replace(plain, arrays=wide).merged_into(MODEL)


def test_a_compression_adapter_cannot_be_merged(saved):
    with pytest.raises(UserError, match="cannot be merged"):
        Adapter.read(saved).merged_into(MODEL, base="tiny")


def test_after_merging_it_is_another_base(tmp_path, saved):
    plain = Adapter.of(cases.model(), method=build("full"), base="tiny").write(tmp_path / "a")
    merged = Adapter.read(plain).merged_into(MODEL, base="tiny")
    with pytest.raises(UserError, match="stage-1 LoRA"):
        load_adapter(saved, merged, method=CONCAT)
