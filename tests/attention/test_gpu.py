"""The GPU kernel, interpreted, against the definition in float64: forward and all gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.attention import gpu
from jax_ccm.attention.shared import Refused, Score
from jax_ccm.rules.types import Kind, Slots
from tests import cases
from tests.attention import support
from tests.attention.support import draw, made_for

check = functools.partial(support.check, kernel=gpu.attend)


@pytest.mark.parametrize("name", ["concat_n2_sink", "merge_n2_repeat", "loma", "window_sink", "local"])
def test_rules(name):
    """Every kind of clause, on ragged rows with padding; text and memory in blocks that divide neither."""
    method = cases.METHODS[name]
    made = made_for(method)
    keys = [made.slots] + ([made.memory.slots] if made.memory is not None else [])
    arrays = draw(0, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], 2, 1, 8)
    out, d_q, d_sources = check(method.rule, made.slots, keys, arrays, sizes=(32, (16, 16)[: len(keys)]))
    for slots, x in ((made.slots, out), (made.slots, d_q), (made.slots, d_sources[0][0]), (keys[-1], d_sources[-1][1])):
        assert np.abs(np.asarray(x)[np.asarray(slots.kind) == Kind.PAD]).max() == 0


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(2, 2, 64), (6, 2, 128), pytest.param(8, 1, 256, marks=pytest.mark.slow)]
)
def test_heads(heads, kv_heads, size):
    """Groups of 1, 3 and 8, and blocks as they are chosen."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    keys = [made.slots, made.memory.slots]
    arrays = draw(1, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], heads, kv_heads, size)
    check(method.rule, made.slots, keys, arrays)


def test_scaled_and_capped_scores():
    """Another scale than that of the head, and a cap that bends most scores (Gemma 2)."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    keys = [made.slots, made.memory.slots]
    arrays = draw(3, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], 2, 1, 8)
    check(method.rule, made.slots, keys, arrays, sizes=(32, (16, 16)), score=Score(0.5, 1.5))


def test_few_queries():
    """Decoding: one query a row against a long cache; the heads of a group are rows of one block."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    own = made.slots.map(lambda x: x[:, 30:31])
    keys = [own, made.slots.map(lambda x: x[:, :30])]
    check(method.rule, own, keys, draw(2, 3, 1, [1, 30], 6, 2, 64))


def test_dead_places_hold_anything():
    support.check_dead_places(gpu.attend)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 64, 2, 96), jnp.bfloat16, "heads of 96"),
        ((1, 2**22, 8, 64), jnp.bfloat16, "32-bit offsets"),
        ((1, 2**19, 2, 64), jnp.bfloat16, "lists of visible blocks"),
    ],
)
def test_refuses(shape, dtype, reason):
    x = jax.ShapeDtypeStruct(shape, dtype)
    slots = Slots(*[jax.ShapeDtypeStruct(shape[:2], jnp.int32)] * 4)
    call = functools.partial(gpu.attend, rule=cases.METHODS["concat_n1"].rule)
    with pytest.raises(Refused, match=reason):
        jax.eval_shape(lambda x, slots: call(x, slots, ((x, x, slots),)), x, slots)


def test_blocks_fit_shared_memory():
    """Larger numbers take smaller blocks; what does not fit is refused."""
    assert gpu.choose(4096, (4096, 20), 128, 2) == (64, (64, 32))
    assert gpu.choose(4096, (4096,), 256, 4) == (16, (16,))
    with pytest.raises(Refused, match="shared memory"):
        gpu.choose(64, (64,), 512, 4)
