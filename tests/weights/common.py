"""Helpers of the weight tests."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.rules.clauses import see
from jax_ccm.rules.types import INF, Kind, Rule, Slots

PLAIN = Rule((see(Kind.TEXT, Kind.TEXT, 0, INF),))


def logits(model, ids, gate: float = 0.0) -> np.ndarray:
    """Float32 ``[B, T, V]`` of ordinary causal text ``int [B, T]``; with gate 1 the LoRA acts on all of it."""
    ids = jnp.asarray(ids, jnp.int32)
    place = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    slots = Slots(jnp.full_like(ids, Kind.TEXT), jnp.zeros_like(ids), place, place)
    return np.asarray(_forward(model, ids, slots, jnp.full(ids.shape, gate, jnp.float32)))


@jax.jit
def _forward(model, ids, slots, gate):
    hidden, _, _ = model(ids, slots, gate, rule=PLAIN)
    return model.logits(hidden)
