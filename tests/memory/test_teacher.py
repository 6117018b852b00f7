"""The teacher reads what the base would read, whatever a method adds to its rows; objectives do as they say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_ccm.errors import UserError
from jax_ccm.evals import recurrent
from jax_ccm.evals.scoring import base_only
from jax_ccm.memory import losses, teacher
from jax_ccm.memory.steps import parallel_forward
from jax_ccm.methods import build
from jax_ccm.rules import rows
from jax_ccm.rules.objective import Objective
from tests import cases

NAMES = [name for name in cases.METHODS if cases.METHODS[name].context != "dropped"]
EXAMPLES = cases.sessions(lengths=((5, 3, 7, 4), (4, 1, 3, 3, 2)))
MODEL = cases.model(tokens=4)


def laid_out(method, examples=EXAMPLES):
    return rows.batch(method, examples, recurrent.caps_for(method, examples), cases.VOCAB)


def text_losses(hidden, made):
    """Of the scored text, row by row in order of the text."""
    found, text = losses.scored_losses(MODEL, hidden, made), np.asarray(made.weights * ~losses.repeated(made)) > 0
    return [np.asarray(row)[keep] for row, keep in zip(found, text, strict=True)]


@jax.jit
def base_losses(made):
    return parallel_forward(MODEL, made, method=base_only(build("full")))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_base_with_full_context(name):
    """To 1e-5 the losses of the base over the same text laid out for full context, whose adapter acts nowhere."""
    method = cases.METHODS[name]
    made, plain = laid_out(method), laid_out(build("full"))
    taught = jax.jit(lambda made: teacher.teach(MODEL, made, teacher.FULL))(made)
    for ours, theirs in zip(text_losses(taught, made), text_losses(base_losses(plain), plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["concat_n2_sink", "merge_n2_recent", "loma", "sentinel"])
def test_alone_it_sees_its_own_segment_only(name):
    method = cases.METHODS[name]
    first, last = EXAMPLES[0].segments[0], EXAMPLES[0].segments[-1]
    swapped = lambda old: dataclasses.replace(old, tokens=(old.tokens + 7) % cases.VOCAB)
    other = dataclasses.replace(EXAMPLES[0], segments=(swapped(first), *EXAMPLES[0].segments[1:]))
    alone = jax.jit(lambda made: teacher.teach(MODEL, made, teacher.ALONE))
    found = [text_losses(alone(made), made)[0] for made in (laid_out(method, [e]) for e in (EXAMPLES[0], other))]
    size, begin = len(last.tokens), len(first.tokens)
    np.testing.assert_allclose(found[0][-size:], found[1][-size:], atol=1e-6)
    assert np.abs(found[0][:begin] - found[1][:begin]).max() > 1e-3
    # The first segment has no context that it could miss.
    made = laid_out(method, [EXAMPLES[0]])
    gained = np.asarray(losses.dependence(MODEL, made))[0][np.asarray(made.steps)[0] == 0]
    np.testing.assert_allclose(gained, 0, atol=1e-5)


def value_and_gradient(loss):
    """Of ``loss(model)``, for the adapter alone."""
    graphdef, adapter, base = nnx.split(MODEL, nnx.LoRAParam, ...)
    return jax.jit(jax.value_and_grad(lambda adapter: loss(nnx.merge(graphdef, adapter, base))))(adapter)


def loss_of(objective, method, made):
    """``loss(model)`` as training computes it."""
    return lambda model: losses.mean_loss(model, parallel_forward(model, made, method=method), made, method, objective)[
        0
    ]


def test_dependence_weighs_tokens():
    """As the formula says, cut from both sides, with the floor; and the weights get no gradient."""
    method = cases.METHODS["concat_n2_sink"]
    made = laid_out(method)
    worth = losses.dependence(MODEL, made)
    assert (np.asarray(worth) < 0).any() and (np.asarray(worth) > 0.05).any()
    weights = made.weights * (0.01 + np.clip(worth, 0, 0.05))

    def formula(model):
        each = losses.scored_losses(model, parallel_forward(model, made, method=method), made)
        return jnp.sum(each * weights) / max(weights.sum(), 1)

    found = value_and_gradient(loss_of(Objective(dependence=0.05, dependence_floor=0.01), method, made))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, value_and_gradient(formula))


@pytest.mark.parametrize("name", ["concat_n2_repeat", "loma", "merge_n2_sink"])
def test_distillation_takes_its_share(name):
    """Linear in its share for text; repeated tokens, for which there is no teacher, keep their cross-entropy."""
    method = cases.METHODS[name]
    made = laid_out(method)
    value = lambda share: np.asarray(jax.jit(loss_of(Objective(distillation=share), method, made))(MODEL))
    none, half, whole = value(0.0), value(0.5), value(1.0)
    np.testing.assert_allclose(half, (none + whole) / 2, rtol=1e-5)
    hidden = parallel_forward(MODEL, made, method=method)
    taught = teacher.teach(MODEL, made, teacher.FULL)
    logs = lambda hidden: jax.nn.log_softmax(losses.scored_logits(MODEL, hidden, made))
    apart = jnp.sum(jnp.exp(logs(taught)) * (logs(taught) - logs(hidden)), axis=-1)
    text = made.weights * ~losses.repeated(made)
    again = made.weights - text
    expected = np.sum(apart * text) / np.sum(text)
    if method.repeat is not None:
        each = losses.scored_losses(MODEL, hidden, made)
        expected += method.repeat_weight * np.sum(each * again) / np.sum(again)
    np.testing.assert_allclose(whole, expected, rtol=1e-4)


def test_the_teacher_costs_nothing_where_it_is_not_asked():
    method = cases.METHODS["concat_n2_sink"]
    made = laid_out(method)
    program = lambda objective: str(
        jax.make_jaxpr(lambda model: losses.mean_loss(model, jnp.zeros((2, made.tokens.shape[1], 32)), made, method,
                                                      objective))(MODEL)
    )  # fmt: skip
    runs = lambda objective: program(objective).count("scan[")
    assert runs(Objective()) == 0
    assert runs(Objective(distillation=0.5)) == 1
    assert runs(Objective(dependence=2.0)) == runs(Objective(distillation=0.5, dependence=2.0)) == 2


@pytest.mark.parametrize(
    "options, key",
    [
        (dict(distillation=1.5), "distillation"),
        (dict(dependence=-1.0), "dependence"),
        (dict(dependence_floor=0.1), "dependence_floor"),
        (dict(distillation=float("nan")), "distillation"),
    ],
)
def test_bad_objectives(options, key):
    with pytest.raises(UserError, match=f"objective.{key} is"):
        Objective(**options)
