"""Contexts far longer than memory: a fixed footprint in prefill, linear growth in training."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.memory.cache import check, init_cache
from jax_ccm.memory.losses import mean_loss
from jax_ccm.memory.steps import compress_scan, parallel_forward
from jax_ccm.methods import build
from jax_ccm.rules import rows
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Chunk
from tests import cases

METHOD = build("ccm_merge", comp_tokens=2, sink=True)
SMALL = dict(num_layers=1, hidden_size=16, intermediate_size=16, num_heads=2, num_kv_heads=1, max_position=2**21)


def prefill(chunk: int):
    """A jitted scan over chunks ``[time, 1, chunk]``, a model, and an empty cache."""
    model = cases.model(tokens=METHOD.num_embeddings, **SMALL)
    cache = init_cache(model, METHOD, 1, memory_capacity=2, raw_capacity=chunk)
    return jax.jit(functools.partial(compress_scan, method=METHOD), donate_argnums=1), model, cache


def test_the_footprint_of_prefill_is_fixed():
    run, model, cache = prefill(8)

    def temporaries(time):
        shape = (time, 1, 8)
        chunks = Chunk(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool))
        return run.lower(model, cache, chunks).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) == temporaries(131072)  # a million tokens


@pytest.mark.slow
def test_a_million_tokens():
    """Read chunk by chunk; the memory is finite and remembers more than the last chunks."""
    size, count = 256, 4096
    run, model, cache = prefill(size)
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, cases.VOCAB, (count, 1, size)).astype(np.int32)
    other = tokens.copy()
    other[: count // 2] = rng.integers(10, cases.VOCAB, (count // 2, 1, size))
    valid = np.ones(tokens.shape, bool)
    one, two = (run(model, jax.tree.map(jnp.copy, cache), Chunk(text, valid)) for text in (tokens, other))
    check(one)
    assert int(one.tokens[0]) == size * count == 2**20 and int(one.chunks[0]) == count
    assert np.isfinite(one.k).all() and np.isfinite(one.logits).all()
    assert np.abs(np.asarray(one.v) - np.asarray(two.v)).max() > 1e-4


def test_activations_grow_linearly():
    """Temporaries of a training step with recomputed layers, for rows of 1,024, 2,048 and 4,096 tokens."""
    model = cases.model(tokens=METHOD.num_embeddings, **SMALL)
    token = Segment(np.zeros(1, np.int32), np.ones(1, bool))
    example = Example(np.zeros(1, np.int32), np.zeros(0, np.int32), (token,))

    def loss(model, made):
        hidden = parallel_forward(model, made, method=METHOD, remat="all")
        return mean_loss(model, hidden, made, METHOD)[0]

    def temporaries(length):
        made = rows.batch(METHOD, [example], rows.Sizes(length, 16, 8), cases.VOCAB)
        compiled = jax.jit(jax.grad(loss)).lower(model, made).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, middle, long = map(temporaries, (1024, 2048, 4096))
    # What a row of twice the length adds at most doubles.
    assert long - middle <= 2.2 * (middle - short)
