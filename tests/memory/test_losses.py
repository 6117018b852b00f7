"""The loss head in blocks: the numbers of the plain formula, and never all logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.memory import losses


def plain(axes, hidden, head, targets, cap=None):
    logits = jnp.einsum(f"bqd,{axes}->bqv", hidden, head)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)[:, :, 0]


def problem(axes, vocab=50, columns=37, width=8):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, columns, width))
    head = jax.random.normal(keys[1], (vocab, width) if axes == "vd" else (width, vocab))
    weights = jax.random.normal(keys[2], (2, columns))
    return hidden, head, jax.random.randint(keys[3], (2, columns), 0, vocab), weights


@pytest.mark.parametrize("axes", ["vd", "dv"])
@pytest.mark.parametrize("block, cap", [(2**24, None), (1, None), (1, 2.0)])
def test_losses_and_gradients(monkeypatch, axes, block, cap):
    """In one block or several, the last of them not full; with the head frozen or trained; with capped logits."""
    monkeypatch.setattr(losses, "BLOCK", block)
    hidden, head, targets, weights = problem(axes)
    total = lambda f: lambda hidden, head: jnp.sum(f(axes, hidden, head, targets, cap) * weights)
    given = axes, hidden, head, targets, cap
    np.testing.assert_allclose(losses.token_losses(*given), plain(*given), atol=1e-5)
    for wanted in (0, (0, 1)):
        ours, theirs = (jax.jit(jax.grad(total(f), wanted))(hidden, head) for f in (losses.token_losses, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("wanted", [0, (0, 1)], ids=["head frozen", "head trained"])
def test_all_logits_never_exist(monkeypatch, wanted):
    """The temporaries of forward and backward hold a few blocks, not [B, Q, V]."""
    monkeypatch.setattr(losses, "BLOCK", 1)
    hidden, head, targets, _ = problem("vd", vocab=4096, columns=512)

    def temporaries(f):
        total = lambda hidden, head: jnp.sum(f("vd", hidden, head, targets))
        compiled = jax.jit(jax.value_and_grad(total, wanted)).lower(hidden, head).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    everything = 4 * 2 * 512 * 4096
    assert temporaries(losses.token_losses) < everything / 4
    assert temporaries(plain) > everything


@pytest.mark.parametrize("axes", ["vd", "dv"])
@pytest.mark.parametrize("block, cap", [(2**24, None), (1, None), (1, 2.0)])
def test_distillation(monkeypatch, axes, block, cap):
    """Its share of the divergence from a teacher, with gradients for hidden states and head, none for the teacher."""
    monkeypatch.setattr(losses, "BLOCK", block)
    hidden, head, targets, weights = problem(axes)
    taught = jax.random.normal(jax.random.key(1), hidden.shape)

    def formula(axes, hidden, head, targets, cap, taught, share):
        def logs(hidden, head):
            logits = jnp.einsum(f"bqd,{axes}->bqv", hidden, head)
            return jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))

        teacher = logs(taught, jax.lax.stop_gradient(head))
        apart = jnp.sum(jnp.exp(teacher) * (teacher - logs(hidden, head)), axis=-1)
        return (1 - share) * plain(axes, hidden, head, targets, cap) + share * apart

    total = lambda f: lambda hidden, head: jnp.sum(f(axes, hidden, head, targets, cap, taught, 0.3) * weights)
    given = axes, hidden, head, targets, cap, taught, 0.3
    np.testing.assert_allclose(losses.token_losses(*given), formula(*given), atol=1e-5)
    for wanted in (0, (0, 1)):
        ours, theirs = (jax.jit(jax.grad(total(f), wanted))(hidden, head) for f in (losses.token_losses, formula))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    same = losses.token_losses(axes, hidden, head, targets, cap, hidden, 1.0)
    np.testing.assert_allclose(same, 0, atol=1e-5)
