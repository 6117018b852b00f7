"""What a memory does, compiled whole: called as it is, each of its operations is a compilation, a hundred in a test."""

from __future__ import annotations

import functools

import jax

from jax_ccm.memory import losses, repetition, steps

read = jax.jit(steps.read, static_argnames=("method", "query"))
compress = jax.jit(steps.compress, static_argnames="method")
compress_step = jax.jit(steps.compress_step, static_argnames="method")
compress_scan = jax.jit(steps.compress_scan, static_argnames="method")
repeat = jax.jit(repetition.repeat, static_argnames=("method", "length", "back"))


@functools.partial(jax.jit, static_argnames="method")
def scored_logits(model, made, *, method):
    """``float32 [B, Q, V]``, the logits of the scored tokens by the parallel forward."""
    return losses.scored_logits(model, steps.parallel_forward(model, made, method=method), made)


@functools.partial(jax.jit, static_argnames="method")
def mean_loss(model, made, *, method):
    """The loss of a batch, as in training."""
    return losses.mean_loss(model, steps.parallel_forward(model, made, method=method), made, method)[0]
