"""What families of models add to the decoder holds in the recurrence as in the parallel forward."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jax_ccm.evals import parity, recurrent
from jax_ccm.memory import losses, steps
from jax_ccm.nn import RopeScaling
from jax_ccm.rules import rows
from tests import cases

# A window shorter than every chunk but one, in some layers only.
GEMMA = dict(
    sliding_window=4, full_layers=(1,), activation="gelu_tanh", post_norms=True, norm_offset=True, qk_norm=True,
    scale_embeddings=True, query_scalar=20, score_cap=2.0, logit_cap=3.0, tie_embeddings=True, window_theta=500.0,
)  # fmt: skip
PHI = dict(
    rotary_factor=0.5,
    sliding_window=5,
    rope_scaling=RopeScaling(
        "longrope", 4.0, original_max_position=8, attention_factor=1.3, short_factor=(1.0,) * 2, long_factor=(1.5, 3.0),
        length=32,
    ),
)  # fmt: skip


def model(**changes):
    """Random norms, too: as they start, norms before and behind could be exchanged."""
    made = cases.model(tokens=3, num_layers=2, **changes)
    graphdef, state = nnx.split(made)
    noisy = lambda keys, x: x + 0.2 * jax.random.normal(jax.random.key(len(str(keys))), x.shape)
    move = lambda keys, x: noisy(keys, x) if "norm" in str(keys) else x
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(move, state))


MODELS = {"gemma": model(**GEMMA), "phi": model(**PHI)}


@pytest.mark.parametrize(
    "family, name",
    [
        ("gemma", "full"), ("gemma", "concat_n2_sink"), ("gemma", "merge_n2_sink"), ("gemma", "loma"),
        ("gemma", "sentinel"), ("phi", "concat_n2_sink"),
    ],
)  # fmt: skip
def test_parallel_is_recurrent(family, name):
    """Memory is seen by every layer, whatever its window, and matters."""
    method = cases.METHODS[name]
    sessions = cases.sessions_for(method)
    gap = lambda a, b: max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))
    parallel = parity.parallel_logits(MODELS[family], method, sessions)
    assert gap(parallel, parity.recurrent_logits(MODELS[family], method, sessions)) < 1e-5
    if method.remembers:
        assert gap(parallel, parity.parallel_logits(MODELS[family], method, sessions, with_memory=False)) > 0.02


def test_gradients_are_equal():
    """Through layers that differ, norms behind, and both caps, whose slopes the losses know by formula."""
    method = cases.METHODS["concat_n2_sink"]
    sessions = cases.sessions(((5, 3, 4),))
    loss, ours = parity.parallel_gradients(MODELS["gemma"], method, sessions)
    other, theirs = parity.recurrent_gradients(MODELS["gemma"], method, sessions)
    assert loss == pytest.approx(other, abs=1e-5)
    assert parity.gradient_gap(ours, theirs) < 1e-5


def test_layers_apart():
    method = cases.METHODS["concat_n2_sink"]
    sessions = cases.sessions(((5, 3, 4),))
    made = rows.batch(method, sessions, recurrent.caps_for(method, sessions), cases.VOCAB)
    run = jax.jit(lambda model: losses.scored_logits(model, steps.parallel_forward(model, made, method=method), made))
    np.testing.assert_allclose(run(MODELS["gemma"].unstacked()), run(MODELS["gemma"]), atol=1e-5)
