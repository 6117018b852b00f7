"""The teacher reads what the base would read, whatever a method adds to its rows; objectives do as they say."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_ccm.errors import UserError
from jax_ccm.evals import recurrent
from jax_ccm.evals.scoring import base_only
from jax_ccm.memory import losses, teacher
from jax_ccm.memory.steps import parallel_forward, parallel_forward_with_attention
from jax_ccm.methods import build
from jax_ccm.rules import rows
from jax_ccm.rules.objective import Objective
from jax_ccm.rules.types import TEXT
from jax_ccm.rules.visibility import gate
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


@pytest.mark.parametrize("name", ["concat_n2_sink", "merge_n2_recent"])
def test_attention_outputs_are_what_layers_add(name):
    """Where MLPs add nothing, a text token's hidden state changes by its attention output through the projection."""
    method, model = cases.METHODS[name], cases.model(tokens=4)
    made, mlp = laid_out(method), model.layers.mlp.down_proj
    mlp.kernel[...] = jnp.zeros_like(mlp.kernel[...])
    forward = functools.partial(parallel_forward_with_attention, method=method)
    hidden, attended = jax.jit(forward)(model, made)
    states = model(
        made.tokens,
        made.slots,
        gate(method, made.slots),
        rule=method.rule,
        memory=made.memory,
        output_hidden_states=True,
    )[2]
    np.testing.assert_allclose(hidden, states[-1], atol=1e-5)
    # Before the last, which is taken behind the final norm; the LoRA acts on no text in these methods.
    states = jnp.take_along_axis(states[:-1], made.indices[None, :, :, None], axis=2)
    flat = attended.reshape(*attended.shape[:3], -1)[:-1]
    added = jnp.einsum("lbqi,lio->lbqo", flat, model.layers.self_attn.o_proj.kernel[...][:-1])
    is_text = np.isin(np.take_along_axis(made.slots.kind, made.indices, axis=1), TEXT) & (made.weights > 0)
    assert is_text.sum() > 5
    np.testing.assert_allclose((states[1:] - states[:-1])[:, is_text], added[:, is_text], atol=1e-5)


def test_alignment_is_the_distance_of_attention():
    method = cases.METHODS["concat_n2_sink"]
    made = laid_out(method)
    weights = np.asarray(made.weights)
    own = lambda model: parallel_forward_with_attention(model, made, method=method)
    _, taught = teacher.teach_attention(MODEL, made, teacher.FULL)

    def formula(model):
        hidden, attended = own(model)
        plain = losses.mean_loss(model, hidden, made, method)[0]
        each = weights[None, :, :, None, None] * jnp.stack([(attended - taught) ** 2, taught**2])
        apart, size = jnp.sum(each, axis=(2, 3, 5))
        return plain + 0.3 * jnp.mean(apart / size)

    found = value_and_gradient(lambda model: losses.training_loss(model, made, method, Objective(alignment=0.3))[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, value_and_gradient(formula))
    # Nothing is nearer than the teacher itself, and what attends to nothing is as far as the teacher is large.
    assert losses.misalignment(taught, taught, weights) == 0
    np.testing.assert_allclose(losses.misalignment(0 * taught, taught, weights), 1, rtol=1e-6)
    assert losses.misalignment(taught, taught, 0 * weights) == 0


def test_alignment_asks_what_text_reads_and_not_what_says_it_again():
    """In the first segment nothing is missed, so that the distance is 0; a repetition has no teacher."""
    examples = [dataclasses.replace(each, segments=each.segments[:1]) for each in EXAMPLES]
    for name in ("concat_n2_sink", "merge_n2_sink"):
        method = cases.METHODS[name]
        made = laid_out(method, examples)
        values = [losses.training_loss(MODEL, made, method, Objective(alignment=a))[0] for a in (0.0, 5.0)]
        np.testing.assert_allclose(*values, rtol=1e-6)
    method = cases.METHODS["concat_n2_repeat"]
    made = laid_out(method)
    again = made.weights * losses.repeated(made)
    assert np.sum(again) > 0
    distance = lambda made: jnp.diff(jnp.stack([
        losses.training_loss(MODEL, made, method, Objective(alignment=a))[0] for a in (0.0, 1.0)]))  # fmt: skip
    unsaid = dataclasses.replace(made, weights=made.weights - again)
    np.testing.assert_allclose(distance(made), distance(unsaid), rtol=1e-4)


def test_alignment_needs_attention_outputs():
    method = cases.METHODS["concat_n2_sink"]
    made = laid_out(method)
    hidden = parallel_forward(MODEL, made, method=method)
    with pytest.raises(UserError, match="parallel_forward_with_attention"):
        losses.mean_loss(MODEL, hidden, made, method, Objective(alignment=0.1))


def test_the_teacher_costs_nothing_where_it_is_not_asked():
    method = cases.METHODS["concat_n2_sink"]
    made = laid_out(method)
    heads = cases.CONFIG.num_heads, cases.CONFIG.head_dim
    attended = jnp.zeros((cases.CONFIG.num_layers, *made.indices.shape, *heads))
    program = lambda objective: str(
        jax.make_jaxpr(lambda model: losses.mean_loss(model, jnp.zeros((2, made.tokens.shape[1], 32)), made, method,
                                                      objective, attended))(MODEL)
    )  # fmt: skip
    runs = lambda objective: program(objective).count("scan[")
    assert runs(Objective()) == 0
    assert runs(Objective(distillation=0.5)) == 1
    assert runs(Objective(dependence=2.0)) == runs(Objective(distillation=0.5, dependence=2.0)) == 2
    assert runs(Objective(alignment=0.1)) == runs(Objective(alignment=0.1, distillation=0.5)) == 1


@pytest.mark.parametrize(
    "options, key",
    [
        (dict(distillation=1.5), "distillation"),
        (dict(dependence=-1.0), "dependence"),
        (dict(dependence_floor=0.1), "dependence_floor"),
        (dict(distillation=float("nan")), "distillation"),
        (dict(alignment=-0.1), "alignment"),
    ],
)
def test_bad_objectives(options, key):
    with pytest.raises(UserError, match=f"objective.{key} is"):
        Objective(**options)
