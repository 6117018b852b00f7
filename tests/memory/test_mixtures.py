"""Mixed memory in bfloat16: what is mixed stays in float32, and is rounded once, for the attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jax_ccm.distributed import sharding
from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.memory import steps, writing
from jax_ccm.memory.cache import check, init_cache
from jax_ccm.methods import build
from jax_ccm.nn.layer import pack
from jax_ccm.rules import rows
from jax_ccm.rules.types import Chunk
from tests import cases

COUNT = 2000
# What is kept, appended, mixed both ways, and pooled.
FEW = ("full", "concat_n2_sink", "merge_n2_sink", "ema_n2_all", "compressive")
SMALL = dict(num_layers=2, hidden_size=16, intermediate_size=16, num_heads=2, num_kv_heads=1)
OPTIONS = dict(comp_tokens=2, independent=True)
MIXING = {"mean": build("ccm_merge", **OPTIONS), "ema": build("ccm_ema", decay=0.02, **OPTIONS)}
# Numbers of bfloat16 next to x are up to 2^-7 |x| apart, so that the nearest is at most half of that away.
ROUNDING = 2.0**-8


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.fixture(scope="module")
def chunks():
    """Chunks of three tokens; the subject changes halfway."""
    rng = np.random.default_rng(0)
    halves = [rng.integers(low, high, (COUNT // 2, 1, 3)) for low, high in ((10, 50), (50, cases.VOCAB))]
    return Chunk(np.concatenate(halves).astype(np.int32), np.ones((COUNT, 1, 3), bool))


def test_two_thousand_chunks(chunks):
    """The memory is the mixture of what the chunks wrote, but for the rounding of one number.

    What each chunk writes is taken from a memory that is appended to: independent chunks do not see it. A step adds
    two roundings of float32 to the mixture, of numbers up to the largest that is written; after all steps that is less
    than twice as many.
    """
    # As many positions as there are tokens: what forgets is moved back before they run out, and a mixture is not.
    model = cases.model(tokens=2, **SMALL, precision="bfloat16", max_position=4 * COUNT)
    concat = build("ccm_concat", **OPTIONS)
    make = lambda method: init_cache(
        model, method, 1, memory_capacity=2, raw_capacity=3, overflow="evict" if method is concat else "error"
    )

    def step(cache, chunk):
        cache = steps.compress_step(model, cache, chunk, method=concat)
        return cache, (cache.k[:, :, :2], cache.v[:, :, :2])

    _, written = jax.jit(lambda cache, chunks: jax.lax.scan(step, cache, chunks))(make(concat), chunks)
    scan = jax.jit(steps.compress_scan, static_argnames="method")
    for method in MIXING.values():
        cache = scan(model, make(method), chunks, method=method)
        check(cache)
        for name, states in zip("kv", written, strict=True):
            states, exact = np.asarray(states, np.float64), 0.0
            for number, state in enumerate(states, 1):
                rate = method.mix.rate(np.float64(number))
                exact = (1 - rate) * exact + rate * state
            assert np.abs(states[: COUNT // 2].mean(0) - states[COUNT // 2 :].mean(0)).max() > 0.05
            drift = 2 * COUNT * 2**-24 * np.abs(states).max()
            mixed = np.asarray(getattr(cache, f"mixed_{name}"), np.float64)
            assert np.abs(mixed - exact).max() <= drift
            held = np.asarray(getattr(cache, name)[:, :, :2], np.float64)
            assert (np.abs(held - exact) <= ROUNDING * np.abs(exact) + 2 * drift).all()


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in cases.METHODS])
@pytest.mark.parametrize("precision", ["bfloat16", "mixed"])
def test_parallel_is_recurrent_in_bfloat16(name, precision):
    """Both roads round the same numbers at the same places.

    Only sums, which are float32, are added up in another order, which changes their last bits. That decides a few
    roundings otherwise, and what follows from them; rounding every number once would be more.
    """
    method = cases.METHODS[name]
    sessions = cases.sessions_for(method)
    model = cases.model(tokens=3, precision=precision)
    assert model.dtype == (jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    parallel, recurrent = (
        np.concatenate(road(model, method, sessions)) for road in (parity.parallel_logits, parity.recurrent_logits)
    )
    assert rms(parallel - recurrent) <= ROUNDING * rms(parallel)


def test_other_methods_keep_no_mixture():
    """It is counted in the bytes of a session, and nobody else pays for it."""
    model = cases.model(tokens=2, precision="bfloat16")
    for method in (cases.METHODS | cases.RECURRENT).values():
        cache = jax.eval_shape(lambda method=method: init_cache(model, method, 2, memory_capacity=8, raw_capacity=24))
        if method.mix is None:
            assert cache.mixed_k is None and cache.mixed_v is None and method.mixed_slots == 0
            continue
        without = dataclasses.replace(cache, mixed_k=None, mixed_v=None)
        assert cache.mixed_k.shape[2] == method.mixed_slots == method.memory_slots(method.groups + method.recent)
        assert cache.nbytes - without.nbytes == 2 * method.mixed_slots * cases.CONFIG.kv_bytes_per_slot(4)


def test_mixtures_are_spread_like_keys():
    mesh = AbstractMesh((2, 2, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    method = build("ccm_merge", comp_tokens=2)
    make = lambda: init_cache(cases.CONFIG, method, 8, memory_capacity=4, raw_capacity=4, dtype=jnp.bfloat16)
    spread = sharding.cache_shardings(mesh, jax.eval_shape(make))
    assert spread.mixed_k.spec == spread.mixed_v.spec == spread.k.spec == P(None, ("data", "fsdp"), None, "tensor")


def test_a_cache_of_another_method():
    """What one method mixes is not taken for another's."""
    model = cases.model(tokens=3)
    made = lambda name, tokens: build(name, comp_tokens=tokens)
    cache = init_cache(model, made("ccm_merge", 2), 1, memory_capacity=8, raw_capacity=8)
    for method in (made("ccm_merge", 3), made("ccm_concat", 2)):
        with pytest.raises(UserError, match="this cache has 2 that are mixed: it was made for another method"):
            jax.eval_shape(lambda method=method: steps.compress(model, cache, method=method))


def test_mixtures_are_products_in_full():
    """A TPU rounds the operands of float32 products to bfloat16 unless it is told otherwise: 1/3 is then no third."""
    merge = build("ccm_merge", comp_tokens=1)
    sizes = rows.Sizes(48, 4, 40)
    memory = rows.batch(merge, cases.sessions()[:1], sizes, cases.VOCAB).memory
    parallel = jax.make_jaxpr(lambda x: pack(memory, x))(jnp.zeros((1, sizes.tokens, 1, 4)))
    compressive = cases.METHODS["compressive"]
    cache = jax.eval_shape(lambda: init_cache(cases.model(), compressive, 1, memory_capacity=16, raw_capacity=16))
    pooling = jax.make_jaxpr(lambda cache: writing.pooled(cache, compressive, jnp.ones(1, bool)))(cache)
    for program in (parallel, pooling):
        found = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "dot_general"]
        assert found and all("HIGHEST" in str(eqn.params["precision"]) for eqn in found)
