"""The mathematics of a training run: optimizer, one jitted step with accumulation, validation loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_ccm.config.sections import OptimizerConfig, TrainConfig
from jax_ccm.data.config import DataConfig
from jax_ccm.distributed import sharding
from jax_ccm.memory.losses import repeated, scored_losses, training_loss
from jax_ccm.memory.steps import parallel_forward
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.objective import Objective
from jax_ccm.rules.types import Kind, Method

Tree = Any


def split(model: Transformer, trainable: str) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A model as its structure, what is trained, and the frozen rest, both as nested dicts of arrays."""
    # LoRAParam is a Param, too: the narrower type first.
    kind = nnx.LoRAParam if trainable == "adapter" else nnx.Param
    graphdef, trained, frozen = nnx.split(model, kind, ...)
    return graphdef, nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from zero, then a half cosine to zero, or constant."""
    # Rounded up, as by the trainer of transformers, which the reference's recipes were run with.
    warmup = math.ceil(config.warmup_ratio * steps)
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    if config.schedule == "cosine":
        # optax refuses a decay over 0 steps, which a run of one step with a warm-up would have.
        rest = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        rest = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([rise, rest], [warmup]) if warmup else rest


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm."""
    adamw = optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def _decayed(params: Tree) -> Tree:
    """Whether weight decay applies to each leaf: not to norm scales and biases."""

    def plain(path, _):
        return path[-1].key not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(plain, params)


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> dict[str, Tree]:
    """What a step changes: ``{"params", "optimizer", "step"}``."""
    return {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def check_spread(data: DataConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuses rows and tokens of a micro-batch that do not spread evenly over a mesh.

    Raises:
      UserError: naming the config key.
    """
    sharding.check_rows(mesh, "data.batch_size", data.batch_size)
    for tokens in (data.tokens, *data.buckets):
        sharding.check_tokens(mesh, "data.buckets" if tokens in data.buckets else "data.tokens", tokens)


def make_step(
    graphdef: nnx.GraphDef,
    method: Method,
    optimizer: optax.GradientTransformation,
    train: TrainConfig,
    *,
    objective: Objective,
    dropout: bool,
    shardings: tuple[Tree, Any] | None = None,
) -> Callable:
    """The jitted training step ``(state, frozen, batches, key) -> (state, metrics)``; ``state`` is donated.

    ``batches`` is a `Batch` of numpy arrays with a leading axis of micro-batches ``[A, B, ...]``. The loss is the
    average of the micro-batches' mean losses, as in the reference. ``frozen`` is an argument and no part of the
    program. Metrics are scalars: loss, grad_norm (before clipping), scored (tokens), tokens (padding not counted).

    Args:
      graphdef: structure of the model, of `split`.
      method: what the batches are laid out for.
      optimizer: of `make_optimizer`.
      train: says what the backward pass recomputes, and the attention.
      objective: what is minimised.
      dropout: whether the adapter has any; it draws from ``key`` folded with the step and the number of the
        micro-batch.
      shardings: of the state and of the metrics; None leaves them to the compiler.
    """

    def loss_of(params, frozen, batch, key):
        model = nnx.merge(graphdef, params, frozen).with_attention(train.attention)
        key = key if dropout else None
        return training_loss(model, batch, method, objective, dropout_key=key, remat=train.remat)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def step(state, frozen, batches, key):
        params = state["params"]
        # By number and not by a chain of splits: a resumed run draws what it would have drawn.
        key = jax.random.fold_in(key, state["step"])

        def add_micro_batch(total, scanned):
            number, batch = scanned
            grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, scored), grads = grad(params, frozen, batch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, (grads, loss, scored)), None

        # One micro-batch at a time: the activations of one are in memory, and the gradients' sum.
        count = batches.tokens.shape[0]
        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.float32(0))
        (grads, loss, scored), _ = jax.lax.scan(add_micro_batch, zero, (jnp.arange(count), batches))
        grads = jax.tree.map(lambda x: x / count, grads)
        updates, opt_state = optimizer.update(grads, state["optimizer"], params)
        # `scored` and `tokens` are counts over all micro-batches, the losses and gradients means over them.
        metrics = {"loss": loss / count, "grad_norm": optax.global_norm(grads), "scored": scored}
        metrics["tokens"] = jnp.sum(batches.slots.kind != Kind.PAD)
        new = {"params": optax.apply_updates(params, updates), "optimizer": opt_state, "step": state["step"] + 1}
        return new, metrics

    return step


def make_validation(
    graphdef: nnx.GraphDef, method: Method, train: TrainConfig
) -> Callable[[Tree, Tree, Iterable[Batch], Callable[[], bool]], float | None]:
    """The validation loss ``(params, frozen, batches, stop) -> nats per scored text token``, averaged over all.

    ``stop`` is asked before each batch; once it says yes, the loss is None.
    """

    @jax.jit
    def sums(params, frozen, batch):
        model = nnx.merge(graphdef, params, frozen).with_attention(train.attention)
        hidden = parallel_forward(model, batch, method=method)
        # What a method repeats (LoMA) is part of its training loss; held-out loss is that of the text alone.
        text = batch.weights * ~repeated(batch)
        return jnp.sum(scored_losses(model, hidden, batch) * text), jnp.sum(text)

    def validation_loss(params, frozen, batches, stop):
        found = []
        for batch in batches:
            if stop():
                return None
            found.append(sums(params, frozen, batch))
            # The devices are one batch ahead, not all of them: a stop waits for no more than two.
            jax.block_until_ready(found[-2:-1])
        return sum(float(loss) for loss, _ in found) / max(sum(float(count) for _, count in found), 1.0)

    return validation_loss
