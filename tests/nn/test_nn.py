"""The gated LoRA, RoPE, the table of compression tokens, and the decoder's options."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_ccm.evals import parity, recurrent
from jax_ccm.memory import losses, steps
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.generation import pays_unstacked
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, ModelConfig, RopeScaling, Transformer, abstract_transformer, rope
from jax_ccm.nn.linear import Linear
from jax_ccm.nn.transformer import initial_comp_embeddings
from jax_ccm.rules import rows
from jax_ccm.rules.visibility import gate
from jax_ccm.weights.hf import is_adapter, parameters
from tests import cases


def linear(**changes) -> Linear:
    adapter = AdapterConfig(rank=3, alpha=6.0, **changes)
    made = Linear(jax.random.key(0), 8, 5, bias=True, adapter=adapter)
    made.lora_b = nnx.LoRAParam(jax.random.normal(jax.random.key(1), (3, 5)))
    return made


def test_gate_and_scale():
    """``y = x W + b + gate (alpha / r) x A B``; bit-equal to ``x W + b`` where the gate is 0 (traps 3 and 5)."""
    layer, x = linear(), jax.random.normal(jax.random.key(2), (2, 4, 8))
    gate = jnp.array([[1.0, 0, 1, 0], [0, 0, 0, 1]])
    plain, gated = np.asarray(layer(x)), np.asarray(layer(x, gate))
    off = np.asarray(gate) == 0
    assert np.array_equal(plain[off], gated[off])
    delta = 2.0 * np.asarray(x @ layer.lora_a[...] @ layer.lora_b[...])
    np.testing.assert_allclose(gated[~off] - plain[~off], delta[~off], atol=1e-5)


def test_dropout():
    """Before A, on average nothing, only with a key, and in effect only on gated tokens (trap 6)."""
    layer, x = linear(dropout=0.5), jax.random.normal(jax.random.key(2), (2, 4, 8))
    gate = jnp.array([[1.0, 0, 1, 0], [0, 0, 0, 1]])
    still = np.asarray(layer(x, gate))
    assert np.array_equal(still, layer(x, gate))
    many = np.stack([layer(x, gate, key) for key in jax.random.split(jax.random.key(3), 400)])
    assert np.array_equal(
        many[:, np.asarray(gate) == 0],
        np.broadcast_to(still[np.asarray(gate) == 0], many[:, np.asarray(gate) == 0].shape),
    )
    assert many.std(0)[np.asarray(gate) == 1].min() > 0.1
    assert np.abs(many.mean(0) - still).max() < 0.5


@pytest.mark.parametrize(
    "options", [{"qkv_bias": True, "mlp_bias": True, "o_bias": True}, {"qk_norm": True, "tie_embeddings": True}]
)
def test_layers_apart(options):
    """Joined and turned kernels compute what the stack computes, with biases, norms, branch and head."""
    model = cases.model(tokens=2, targets=cases.ALL, **options)
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    model = jax.tree.unflatten(tree, noisy)
    method = build("ccm_concat", comp_tokens=2)
    examples = cases.sessions()
    made = rows.batch(method, examples, recurrent.caps_for(method, examples), cases.VOCAB)
    run = jax.jit(lambda model: model.logits(steps.parallel_forward(model, made, method=method)))
    np.testing.assert_allclose(run(model.unstacked()), run(model), atol=1e-5)


def test_rope_half_split():
    """Against the definition, pair by pair; positions matter only relatively."""
    config = dataclasses.replace(cases.CONFIG, head_dim=8, rope_theta=100.0)
    freqs = rope.frequencies(config)
    np.testing.assert_allclose(freqs, [100 ** -(i / 4) for i in range(4)], rtol=1e-6)
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    position = jnp.array([[0, 5, 9]])
    out = np.asarray(rope.rotate(x, *rope.angles(config, position)))
    for t, p in enumerate([0, 5, 9]):
        for i in range(4):
            pair = np.asarray(x)[0, t, :, i] + 1j * np.asarray(x)[0, t, :, i + 4]
            turned = pair * np.exp(1j * p * freqs[i])
            np.testing.assert_allclose(out[0, t, :, i], turned.real, atol=1e-5)
            np.testing.assert_allclose(out[0, t, :, i + 4], turned.imag, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_gradient_of_a_rotation_is_one_rotation_back(factor):
    """It is the transposed map; and nothing is padded and added up on the way, as for taking apart and joining."""
    config = dataclasses.replace(cases.CONFIG, rotary_factor=factor)
    cos, sin = rope.angles(config, jnp.array([[0, 3, 7], [2, 5, 11]]))
    x, g = (jax.random.normal(jax.random.key(k), (2, 3, 4, config.head_dim)) for k in (0, 1))
    back = lambda g: jax.vjp(lambda x: rope.rotate(x, cos, sin), x)[1](g)[0]
    np.testing.assert_allclose(jnp.sum(rope.rotate(x, cos, sin) * g), jnp.sum(x * back(g)), rtol=1e-5)
    np.testing.assert_allclose(back(rope.rotate(x, cos, sin)), x, atol=1e-5)
    assert " pad[" not in str(jax.make_jaxpr(back)(g))


def test_of_the_inner_activations_two_are_kept_for_the_backward_pass():
    """The inputs of the gated product, the largest arrays of a layer: not each number that lies between."""
    model, method = cases.model(), build("full")
    (example,) = cases.sessions(lengths=((11,),))
    made = rows.batch(method, [example], rows.measure(method, example), cases.VOCAB)
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapter):
        model = nnx.merge(graphdef, adapter, base)
        return losses.mean_loss(model, steps.parallel_forward(model, made, method=method), made, method)[0]

    first, *_ = (eqn for eqn in jax.make_jaxpr(jax.grad(loss))(adapter).eqns if eqn.primitive.name == "scan")
    inner = (model.config.num_layers, *made.tokens.shape, model.config.intermediate_size)
    assert [out.aval.shape for out in first.outvars].count(inner) == 2


def test_rope_scaling():
    plain = rope.frequencies(cases.CONFIG)
    scaled = lambda **s: rope.frequencies(dataclasses.replace(cases.CONFIG, rope_scaling=RopeScaling(**s)))
    np.testing.assert_allclose(scaled(kind="linear", factor=4.0), plain / 4, rtol=1e-6)
    llama = scaled(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    # Short waves are kept, waves longer than the old context are slowed by the factor.
    assert llama[0] == plain[0] and llama[-1] == pytest.approx(plain[-1] / 8)
    with pytest.raises(ValueError, match="'ntk' is not supported; supported: linear, llama3, yarn, dynamic, longrope"):
        scaled(kind="ntk", factor=2.0)
    with pytest.raises(ValueError, match="longrope has 2 factors for 4 pairs"):
        scaled(kind="longrope", short_factor=(1.0, 2.0))


def test_comp_embeddings():
    """Row ``n - 1 - k`` is the mean of the rows k, k + n, ... (trap 17)."""
    table = jnp.repeat(jnp.arange(10.0)[:, None], 2, axis=1)
    assert np.asarray(initial_comp_embeddings(table, 3))[:, 0].tolist() == [5.0, 4.0, 4.5]


def test_compression_tokens_have_no_column():
    """The head is as wide as the vocabulary, and ids beyond it come from the adapter's own table (trap 18)."""
    model = cases.model(tokens=2)
    x = model.embed_tokens(jnp.array([[cases.VOCAB - 1, cases.VOCAB, cases.VOCAB + 1]]))
    assert np.array_equal(x[0, 0], model.embed_tokens.embedding[...][-1])
    assert np.array_equal(x[0, 1:], model.embed_tokens.comp[...])
    assert model.logits(x).shape == (1, 3, cases.VOCAB)


def test_remat_and_tied_heads():
    """Recomputing layers changes no gradient; a tied head is the transposed table."""
    model = cases.model(tokens=2, tie_embeddings=True)
    assert not hasattr(model, "lm_head")
    method, sessions = build("ccm_concat", comp_tokens=2), cases.sessions(((3, 2),))
    made = rows.batch(method, sessions, recurrent.caps_for(method, sessions), cases.VOCAB)
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)

    def total(adapter, remat):
        hidden = steps.parallel_forward(nnx.merge(graphdef, adapter, base), made, method=method, remat=remat)
        return jnp.sum(model.logits(hidden) ** 2)

    grads = [jax.jit(jax.grad(total), static_argnums=1)(adapter, remat) for remat in ("none", "dots", "all")]
    assert max(parity.gradient_gap(grads[0], other) for other in grads[1:]) < 1e-6
    hidden = jax.random.normal(jax.random.key(0), (1, 2, 32))
    np.testing.assert_allclose(model.logits(hidden), hidden @ model.embed_tokens.embedding[...].T, atol=1e-5)


def test_sliding_window_hides_old_text_but_not_memory():
    """A base model's window holds for raw text; what was compressed stays in view."""
    model = cases.model(tokens=2)
    narrow = cases.model(tokens=2, sliding_window=4)
    sessions = cases.sessions(((6, 6, 6),))
    full, concat = build("full"), build("ccm_concat", comp_tokens=2)
    gap = lambda method: np.abs(
        parity.parallel_logits(model, method, sessions)[0] - parity.parallel_logits(narrow, method, sessions)[0]
    ).max()
    assert gap(full) > 1e-2
    window = parity.parallel_logits(model, dataclasses.replace(build("window", size=4), gate=full.gate), sessions)
    np.testing.assert_allclose(parity.parallel_logits(narrow, full, sessions)[0], window[0], atol=1e-5)
    without = parity.parallel_logits(narrow, concat, sessions, with_memory=False)[0]
    assert np.abs(parity.parallel_logits(narrow, concat, sessions)[0] - without)[-1].max() > 1e-3


def test_bfloat16_is_finite_with_padding():
    """Rows of padding see nothing and give neither NaN nor a gradient (trap 23)."""
    model = Transformer(jax.random.key(0), cases.CONFIG, AdapterConfig(rank=4, tokens=2), jnp.bfloat16)
    method, sessions = build("ccm_merge", comp_tokens=2), cases.sessions(((2, 2),))
    sizes = recurrent.caps_for(method, sessions)
    made = rows.batch(method, sessions, rows.Sizes(sizes.tokens + 5, sizes.memory + 2, sizes.scored), cases.VOCAB)
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)

    def total(adapter):
        hidden = steps.parallel_forward(nnx.merge(graphdef, adapter, base), made, method=method)
        return jnp.sum(model.logits(hidden))

    value, gradient = jax.jit(jax.value_and_grad(total))(adapter)
    assert np.isfinite(float(value))
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        # LLaMA-7B with rank 8: 8,388,608 LoRA numbers and 4096 for each row (CCM's own count).
        ((32000, 4096, 11008, 32, 32, 32, 128), 8_388_608 + 2 * 4096),
        # Mistral-7B with rank 8: 6,815,744.
        ((32000, 4096, 14336, 32, 32, 8, 128), 6_815_744 + 2 * 4096),
        # SmolLM2-135M.
        ((49152, 576, 1536, 30, 9, 3, 64), 922_752),
    ],
)
def test_sizes_of_adapters(sizes, count):
    """Parameter counts of real models, from shapes alone."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    config = ModelConfig(family="llama", **dict(zip(names, sizes, strict=True)))
    model = abstract_transformer(config, AdapterConfig(rank=8, tokens=2))
    adapter = nnx.state(model, nnx.LoRAParam)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == count


def test_bad_sizes():
    with pytest.raises(ValueError, match="9 query heads cannot share 2"):
        dataclasses.replace(cases.CONFIG, num_heads=9)
    with pytest.raises(ValueError, match="'lm_head' is not one of q_proj, .*, down_proj"):
        AdapterConfig(targets=("lm_head",))
    with pytest.raises(ValueError, match="dropout 1.0"):
        AdapterConfig(dropout=1.0)


def test_mixed_precision_is_float32_within_its_rounding():
    """Logits and gradients of products with bfloat16 operands; activations, sums and the cache are float32."""
    adapter = AdapterConfig(rank=4, tokens=2)
    exact = Transformer(jax.random.key(0), cases.CONFIG, adapter)
    mixed = Transformer(jax.random.key(0), cases.CONFIG, adapter, "mixed")
    assert mixed.layers.mlp.up_proj.kernel.dtype == jnp.bfloat16 and mixed.dtype == jnp.float32
    method = build("ccm_concat", comp_tokens=2)
    examples = cases.sessions()
    made = rows.batch(method, examples, rows.Sizes(64, 16, 64), cases.CONFIG.vocab_size)

    def loss(model):
        return losses.mean_loss(model, steps.parallel_forward(model, made, method=method), made, method)[0]

    (value, grads), (expected, exact_grads) = (jax.value_and_grad(loss, allow_int=True)(m) for m in (mixed, exact))
    # Each operand is rounded to 8 bits: a relative 2^-9 of each, in a sum of many.
    assert value != expected, "something is rounded"
    np.testing.assert_allclose(value, expected, rtol=2**-8)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) <= 2**-5 * np.linalg.norm(theirs) + 1e-6
    assert steps.parallel_forward(mixed, made, method=method).dtype == jnp.float32


@pytest.mark.parametrize("params, compute, output", itertools.product(("float32", "bfloat16"), repeat=3))
def test_every_policy_gives_the_types_that_it_names(params, compute, output):
    """Biases and norms are kept in the type of the weights, and do not lift what they are added to."""
    policy = f"params={params},compute={compute},output={output}"
    biased = dataclasses.replace(cases.CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    model, method = cases.model(tokens=2, config=biased, precision=policy), build("ccm_concat", comp_tokens=2)
    made = rows.batch(method, cases.sessions(), rows.Sizes(64, 16, 64), biased.vocab_size)
    for form in (model, model.unstacked()):
        acts = gate(method, made.slots)
        hidden, (k, v), _ = form(made.tokens, made.slots, acts, rule=method.rule, memory=made.memory)
        assert {str(x.dtype) for x in (hidden, k, v)} == {output}
        # The adapter is float32 in every policy, and in both forms.
        assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(form.layers, nnx.LoRAParam))} == {"float32"}


@pytest.mark.parametrize("tied", [True, False])
def test_one_token_is_made_by_weights_of_the_type_of_activations(tied):
    """A matrix of another type is turned into that of the vector each time; a decoder of one token turns it once."""
    config = dataclasses.replace(cases.CONFIG, tie_embeddings=tied)
    mixed = Transformer(jax.random.key(0), config, AdapterConfig(rank=4, tokens=2), "mixed")
    unstacked = mixed.unstacked()
    assert str(unstacked.precision) == "float32"
    assert {str(x.dtype) for x in jax.tree.leaves([unstacked.layers, unstacked.head[0]])} == {"float32"}
    cache = init_cache(mixed, build("full"), 1, memory_capacity=1, raw_capacity=4)
    assert pays_unstacked(mixed, cache)
    run = lambda model: steps.read(model, cache, rows.chunk([[3, 5, 4]], 3, config.vocab_size), method=build("full"))
    np.testing.assert_allclose(run(unstacked)[1], run(mixed)[1], atol=2**-5)


def test_another_adapter_beside_the_same_base():
    """Its arrays are taken as they are, those of the base are shared, and the decoder before stays as it is."""
    model = cases.model(tokens=2)
    wanted = AdapterConfig(rank=3, tokens=1, targets=("q_proj", "down_proj"))
    other = Transformer(jax.random.key(7), model.config, wanted)
    arrays = {path: x for path, x in parameters(other).items() if is_adapter(path)}
    made, bare = model.with_adapter(wanted, arrays), model.with_adapter(None)
    assert made.adapter == wanted and bare.adapter is None and model.adapter is not None
    assert {path for path in parameters(bare) if is_adapter(path)} == set()
    for path, x in parameters(made).items():
        assert x is (arrays[path] if path in arrays else parameters(model)[path]), path


def test_what_computes_attention_is_a_field_of_the_model():
    """It holds in every verb and beside any adapter; arrays are shared, and the model before stays as it is."""
    model, method = cases.model(tokens=2), build("ccm_concat", comp_tokens=2)
    pallas = model.with_attention("pallas")
    assert (model.attention, pallas.attention, pallas.with_adapter(None).attention) == ("auto", "pallas", "pallas")
    assert parameters(pallas).keys() == parameters(model).keys()
    assert all(x is parameters(model)[path] for path, x in parameters(pallas).items())
    cache = init_cache(model, method, 1, memory_capacity=2, raw_capacity=4)
    chunk = rows.chunk([[3, 5, 4]], 3, model.config.vocab_size)
    for verb in (steps.read, steps.compress_step):
        traced = {
            made.attention: str(jax.make_jaxpr(lambda made=made, verb=verb: verb(made, cache, chunk, method=method))())
            for made in (model.with_attention("xla"), pallas)
        }
        assert "pallas_call" in traced["pallas"] and "pallas_call" not in traced["xla"]
