"""The base without its adapter, over the text of rows that are laid out for a method: what objectives compare with.

For CCM-concat with n = 1, chunks ``a``, ``b`` and tail ``c``, what text sees with full context and alone (the
compression tokens ``C`` are run for nothing)::

              a C b C c              a C b C c
        a     x . . . .              x . . . .
        b     x . x . .              . . x . .
        c     x . x . x              . . . . x
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_ccm.memory.steps import parallel_forward, parallel_forward_with_attention
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.clauses import see
from jax_ccm.rules.types import INF, TEXT, Kind, Method, Rule
from jax_ccm.rules.visibility import is_in

EVERY = (*TEXT, Kind.SINK)
FULL = Method(name="teacher", rule=Rule((see(EVERY, EVERY, 0, INF),)))
# Start tokens that a method keeps in sight of all are no context.
ALONE = Method(name="teacher_alone", rule=Rule((see(EVERY, EVERY, 0, 0), see(EVERY, Kind.SINK, 0, INF))))


def teach(model: Transformer, batch: Batch, method: Method):
    """Hidden states of the base alone, to which no gradient goes.

    Args:
      model: the decoder; its adapter acts nowhere.
      batch: rows of any method whose layout holds the context.
      method: static, `FULL` or `ALONE`.

    Returns:
      ``[B, T, D]`` after the final norm; of use at text only.
    """
    return jax.lax.stop_gradient(parallel_forward(model, _plain(batch), method=method))


def teach_attention(model: Transformer, batch: Batch, method: Method):
    """`teach`, and what attention gives the base at each scored token, ``[L, B, Q, N, H]``."""
    return jax.lax.stop_gradient(parallel_forward_with_attention(model, _plain(batch), method=method))


def _plain(batch: Batch) -> Batch:
    """The rows without a memory."""
    # As the text would be read without a method's tokens, which may take positions of their own.
    position = jnp.cumsum(is_in(batch.slots.kind, EVERY), axis=1) - 1
    slots = dataclasses.replace(batch.slots, position=jnp.maximum(position, 0))
    # Without memory, and with text alone in the rule, what else is still run is seen by nobody.
    return dataclasses.replace(batch, slots=slots, memory=None)
