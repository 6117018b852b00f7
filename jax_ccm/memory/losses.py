"""Losses over scored tokens only: the vocabulary projection is computed nowhere else."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jax_ccm.distributed.sharding import constrain
from jax_ccm.errors import UserError
from jax_ccm.memory import teacher
from jax_ccm.memory.steps import parallel_forward, parallel_forward_with_attention
from jax_ccm.nn.transformer import Remat, Transformer, capped
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.objective import Objective
from jax_ccm.rules.types import Kind, Method

# Logits that exist at once, forward and backward: 64 MiB of float32, unless a few columns of the batch are more.
BLOCK = 2**24
COLUMNS = 16


def scored_logits(model: Transformer, hidden, batch: Batch):
    """Logits that predict the scored tokens, ``float32 [B, Q, V]``, from hidden states ``[B, T, D]``."""
    return constrain(model.logits(_scored(hidden, batch)), "rows", None, "vocab")


def scored_losses(model: Transformer, hidden, batch: Batch, taught=None, share: float = 0.0):
    """Negative log-likelihood in nats of each scored token, ``float32 [B, Q]``, 0 on padding.

    Args:
      model: the decoder, for its projection to the vocabulary.
      hidden: ``[B, T, D]``.
      batch: the rows.
      taught: ``[B, T, D]`` of a teacher, or None; then the distance from it has its share, as in `token_losses`.
      share: of that distance.
    """
    head, axes = model.head
    taught = None if taught is None else _scored(taught, batch)
    head = head.astype(model.precision.compute)
    losses = token_losses(axes, _scored(hidden, batch), head, batch.targets, model.config.logit_cap, taught, share)
    return losses * batch.weights


def _scored(hidden, batch: Batch):
    """The hidden states that predict the scored tokens, ``[B, Q, D]``."""
    return constrain(jnp.take_along_axis(hidden, batch.indices[:, :, None], axis=1), "rows")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 6))
def token_losses(axes: str, hidden, head, targets, cap: float | None = None, taught=None, share: float = 0.0):
    """Negative log-likelihood in nats of each target, without ever holding all logits.

    With a teacher, ``(1 - share)`` times that, and ``share`` times the divergence ``KL(teacher || model)`` of the
    predicted tokens (knowledge distillation, Hinton et al. 2015, at temperature 1).

    Logits are made in blocks of columns. Where the head is frozen, as in training an adapter, the gradient of each
    block is made at once, in the forward pass, and its logits are never needed again; where it is trained they are made
    a second time in the backward pass.

    Args:
      axes: of the head, "vd" or "dv".
      hidden: ``[B, Q, D]``.
      head: ``[V, D]`` or ``[D, V]``.
      targets: ``int32 [B, Q]``.
      cap: static; if set, logits are ``cap * tanh(logit / cap)`` (Gemma 2).
      taught: ``[B, Q, D]`` of a teacher with the same head, which gets no gradient; None for none.
      share: static, of the divergence from it.

    Returns:
      ``float32 [B, Q]``.
    """

    def step(block):
        return _loss(_logits(axes, block[0], head, cap), *_wanted(axes, block[1:], head, cap, share))[0]

    return _by_blocks(step, head, axes, hidden, targets, taught)


def _forward(axes, hidden, head, targets, cap, taught, share):
    trained = head.perturbed
    # With `symbolic_zeros` arguments come with the news whether a gradient is wanted.
    hidden, head, targets, taught = jax.tree.map(
        lambda x: x.value, (hidden, head, targets, taught), is_leaf=lambda x: hasattr(x, "perturbed")
    )

    def step(block):
        hidden, *rest = block
        logits = _logits(axes, hidden, head, cap)
        wanted = _wanted(axes, rest, head, cap, share)
        losses, total = _loss(logits, *wanted)
        if trained:
            return losses, total
        # What is kept is [B, Q, D]; the head is not needed in the backward pass.
        return losses, _to_hidden(axes, _slope(logits, total, wanted, cap), head).astype(hidden.dtype)

    losses, kept = _by_blocks(step, head, axes, hidden, targets, taught)
    return losses, ((hidden, head, targets, kept, taught) if trained else (kept,))


def _backward(axes, cap, share, residuals, g):
    if len(residuals) == 1:
        (slope,) = residuals
        # No gradient for the head, which is frozen, nor for targets and teacher.
        return g[:, :, None].astype(slope.dtype) * slope, None, None, None
    hidden, head, targets, totals, taught = residuals

    def step(gradient, block):
        hidden, total, g, *rest = block
        wanted = _wanted(axes, rest, head, cap, share)
        # Columns of padding have g = 0 and add nothing.
        slope = _slope(_logits(axes, hidden, head, cap), total, wanted, cap) * g[:, :, None]
        # The gradient of the head, in the order of its axes.
        order = {"v": slope, "d": hidden}
        terms = [f"bq{axis}" for axis in axes]
        found = jnp.einsum(
            f"{','.join(terms)}->{axes}", *(order[axis] for axis in axes), preferred_element_type=jnp.float32
        )
        return gradient + found, _to_hidden(axes, slope, head).astype(hidden.dtype)

    blocks, size = _blocks(head, axes, targets)
    zero = jnp.zeros(head.shape, jnp.float32)
    split = functools.partial(_split, blocks=blocks, size=size)
    given = [hidden, totals, g, targets, *([] if taught is None else [taught])]
    gradient, slopes = jax.lax.scan(step, zero, tuple(map(split, given)))
    return _joined(slopes, targets.shape[1]), gradient.astype(head.dtype), None, None


token_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(axes: str, hidden, head, cap: float | None):
    logits = jnp.einsum(f"bqd,{axes}->bqv", hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)
    return constrain(capped(logits, cap), "rows", None, "vocab")


def _wanted(axes: str, block, head, cap: float | None, share: float):
    """What a block of columns is to predict: targets, the teacher's log-probabilities or None, and their share."""
    targets, *taught = block
    teacher = jax.nn.log_softmax(_logits(axes, taught[0], head, cap)) if taught else None
    return targets, teacher, share


def _loss(logits, targets, teacher, share: float):
    """Losses and the logarithms of the normalisers, ``[B, q]`` each."""
    total = jax.nn.logsumexp(logits, axis=-1)
    # The target's logit alone, not a column of log-probabilities.
    losses = total - jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
    if teacher is not None:
        # ``KL(p || q) = sum p (log p - logits) + total``, since the p add up to 1.
        apart = jnp.sum(jnp.exp(teacher) * (teacher - logits), axis=-1) + total
        losses = (1 - share) * losses + share * apart
    return losses, total


def _slope(logits, total, wanted, cap: float | None):
    """The gradient of the losses for logits before the cap: probabilities less those wanted, times its slope."""
    targets, teacher, share = wanted
    hit = jnp.arange(logits.shape[-1]) == targets[:, :, None]
    if teacher is not None:
        hit = (1 - share) * hit + share * jnp.exp(teacher)
    slope = jnp.exp(logits - total[:, :, None]) - hit
    # The slope of the cap, from the capped logits.
    return slope if cap is None else slope * (1 - (logits / cap) ** 2)


def _to_hidden(axes: str, slope, head):
    return jnp.einsum(f"bqv,{axes}->bqd", slope.astype(head.dtype), head, preferred_element_type=jnp.float32)


def _blocks(head, axes: str, targets) -> tuple[int, int]:
    """How many blocks of how many columns."""
    batch, columns = targets.shape
    most = max(BLOCK // (batch * head.shape[axes.index("v")]), COLUMNS)
    blocks = math.ceil(columns / most)
    return blocks, math.ceil(columns / max(blocks, 1))


def _split(x, *, blocks: int, size: int):
    """``[B, Q, ...]`` as ``[blocks, B, size, ...]``, zeros behind."""
    # Padding gets target 0 and zeros; `_joined` cuts it off.
    x = jnp.pad(x, [(0, 0), (0, blocks * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _joined(x, columns: int):
    """``[blocks, B, size, ...]`` as ``[B, columns, ...]``."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :columns]


def _by_blocks(step, head, axes: str, hidden, targets, taught=None):
    """``step`` of hidden states, targets and the teacher's hidden states, if there is one, block by block."""
    blocks, size = _blocks(head, axes, targets)
    given = (hidden, targets) if taught is None else (hidden, targets, taught)
    if blocks <= 1:
        return step(given)
    found = jax.lax.map(step, tuple(_split(x, blocks=blocks, size=size) for x in given))
    return jax.tree.map(lambda x: _joined(x, targets.shape[1]), found)


def repeated(batch: Batch):
    """``bool [B, Q]``: the scored tokens that repeat a closed chunk, as opposed to text."""
    return jnp.take_along_axis(batch.slots.kind, batch.indices, axis=1) == Kind.REPEAT


def dependence(model: Transformer, batch: Batch, full=None):
    """What context is worth to the base for each scored token, in nats: ``float32 [B, Q]``, 0 on padding.

    The log-likelihood with all earlier text in sight less that with the text of the token's own segment alone.

    Args:
      model: the decoder; its adapter acts nowhere.
      batch: the rows.
      full: hidden states of the base with full context, ``[B, T, D]``, where they are there already.
    """
    full = teacher.teach(model, batch, teacher.FULL) if full is None else full
    alone = teacher.teach(model, batch, teacher.ALONE)
    return jax.lax.stop_gradient(scored_losses(model, alone, batch) - scored_losses(model, full, batch))


def misalignment(attended, taught, weights):
    """How far what attention gives is from what it gives the teacher: 0 is equal, 1 as far as nothing at all.

    Each head's squared distance over the square of the teacher's, both summed over tokens; the mean of all heads and
    layers. After ReLMem (arXiv 2609.37587), which takes it behind one boundary of each example, where this takes it
    behind all.

    Args:
      attended, taught: ``[L, B, Q, N, H]``.
      weights: ``float32 [B, Q]`` of the tokens.

    Returns:
      A scalar, float32.
    """
    attended, taught = attended.astype(jnp.float32), taught.astype(jnp.float32)

    def size(x):
        return jnp.einsum("lbqnh,bq->ln", jnp.square(x), weights)

    # Without any token both are 0.
    return jnp.mean(size(attended - taught) / jnp.maximum(size(taught), 1e-6))


def training_loss(
    model: Transformer,
    batch: Batch,
    method: Method,
    objective: Objective = Objective(),
    *,
    dropout_key=None,
    remat: Remat = "none",
):
    """The forward pass of a training step and its `mean_loss`.

    Args:
      model: the decoder with its adapter.
      batch: the rows.
      method: static.
      objective: static.
      dropout_key, remat: as for `parallel_forward`.

    Returns:
      As `mean_loss`.
    """
    if not objective.alignment:
        hidden = parallel_forward(model, batch, method=method, dropout_key=dropout_key, remat=remat)
        return mean_loss(model, hidden, batch, method, objective)
    hidden, attended = parallel_forward_with_attention(
        model, batch, method=method, dropout_key=dropout_key, remat=remat
    )
    return mean_loss(model, hidden, batch, method, objective, attended)


def mean_loss(
    model: Transformer, hidden, batch: Batch, method: Method, objective: Objective = Objective(), attended=None
):
    """The objective averaged over the scored text tokens of the batch, and their number.

    By default that is their cross-entropy (CCM, equation 4). With `Method.repeat` the mean cross-entropy of the
    repeated tokens is added, times `Method.repeat_weight` (LoMA, ``L_read + L_rep``). Each mean has its own
    denominator, so that neither changes the weight of the other.

    Args:
      model: the decoder, for its projection to the vocabulary, and as the teacher.
      hidden: ``[B, T, D]``, what `parallel_forward` returned for the batch.
      batch: the rows.
      method: static.
      objective: static.
      attended: ``[L, B, Q, N, H]`` of `parallel_forward_with_attention`, which `Objective.alignment` compares.

    Returns:
      Two scalars, float32: the loss in nats, and how many text tokens it is of.

    Raises:
      UserError: for an alignment without ``attended``.
    """
    text, total, full, taught = batch.weights, 0.0, None, None
    if objective.alignment and attended is None:
        raise UserError(
            "objective.alignment compares attention outputs: give mean_loss those of parallel_forward_with_attention"
        )
    if objective.alignment:
        full, taught = teacher.teach_attention(model, batch, teacher.FULL)
    elif objective.asks_teacher:
        full = teacher.teach(model, batch, teacher.FULL)
    losses = scored_losses(model, hidden, batch, full if objective.distillation else None, objective.distillation)
    if method.repeat is not None:
        again = batch.weights * repeated(batch)
        text = text - again
        # Where a token is repeated the teacher sees nothing: there the plain cross-entropy is taken.
        plain = scored_losses(model, hidden, batch) if objective.distillation else losses
        total = method.repeat_weight * jnp.sum(plain * again) / jnp.maximum(jnp.sum(again), 1.0)
    if objective.alignment:
        total = total + objective.alignment * misalignment(attended, taught, text)
    count = weight = jnp.sum(text)
    if objective.dependence:
        gain = dependence(model, batch, full)
        text = text * (objective.dependence_floor + jnp.clip(gain, 0.0, objective.dependence))
        weight = jnp.sum(text)
    # Not less than 1: rows for which context is worth hardly anything do not become large by it.
    return jnp.sum(losses * text) / jnp.maximum(weight, 1.0) + total, count
