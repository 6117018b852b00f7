"""One layer of a forward pass: what its tokens see of each other and of the memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_ccm.attention.dispatch import memory_attention
from jax_ccm.distributed.sharding import constrain
from jax_ccm.nn import rope
from jax_ccm.nn.blocks import Block
from jax_ccm.nn.config import ModelConfig
from jax_ccm.numerics import Precision
from jax_ccm.rules.batch import Packed
from jax_ccm.rules.types import MemoryCache, Rule, Slots
from jax_ccm.rules.visibility import with_window


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What all layers of a forward pass are given alike.

    Layers are of one kind, or of two (with a sliding window and without): where something depends on it, there is one
    of each, and a layer picks its own.

    Attributes:
      windowed: ``bool [L]``, which kind each layer is.
      attends: attention with the rule of each kind.
      angles: cosines and sines of the tokens' positions, for each kind.
      past_angles: those of the entries of a cache, where they are rotated at each use; else None.
      gate: where the adapter's LoRA acts, as for `Transformer`.
      memory: what is seen besides the tokens.
      observe: how much each query counts in the attention that is measured, or None.
      attended_at: places in the row whose attention outputs are wanted, or None.
      operands: dtype of queries, keys and values in attention.
      by_index: whether positions are indices in the cache, so that keys are kept unrotated.
    """

    windowed: Any
    attends: tuple[Callable, ...]
    angles: tuple[Any, ...]
    past_angles: tuple[Any, ...] | None
    gate: Any
    memory: Packed | MemoryCache | None
    observe: Any
    attended_at: Any
    operands: Any
    by_index: bool

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        precision: Precision,
        slots: Slots,
        gate,
        rule: Rule,
        memory: Packed | MemoryCache | None,
        *,
        by_index,
        observe,
        attended_at,
        single: bool,
        implementation,
    ) -> LayerInputs:
        """From the arguments of `Transformer`.

        Args:
          config: of the model.
          precision: of the model.
          slots, gate, rule, memory, observe, attended_at: as for `Transformer`.
          by_index: the tokens' positions in the cache, ``int32 [B, T]``, or None for those of the slots.
          single: whether there is a single token a row.
          implementation: of `memory_attention`.
        """
        # An array, since a scan indexes it by the traced number of the layer.
        windowed = jnp.asarray(config.windowed)
        # Without the window first, since False sorts before True; `layer` picks by this order.
        kinds = [config.as_seen(kind) for kind in sorted(set(config.windowed))]
        rules = [with_window(rule, kind.sliding_window) for kind in kinds]

        def turns(positions):
            return tuple(rope.angles(kind, positions) for kind in kinds)

        angles = turns(slots.position if by_index is None else by_index)
        # Where positions are indices in the cache, entries are rotated at each use, by where they stand in its array.
        cached = by_index is not None and isinstance(memory, MemoryCache)
        past_angles = turns(jnp.arange(memory.k.shape[2])[None]) if cached else None
        memory_slots = memory.slots if memory is not None else None
        seen = dict(slots=slots, memory_slots=memory_slots, in_order=True, implementation=implementation)
        seen |= dict(scale=config.query_scalar and config.query_scalar**-0.5, cap=config.score_cap)
        attends = tuple(functools.partial(memory_attention, rule=rule, **seen) for rule in rules)
        # A single query waits for its keys to be read, not for arithmetic: they stay as they are.
        operands = precision.output if single else precision.compute
        wanted = (observe, attended_at)
        return cls(
            windowed, attends, angles, past_angles, gate, memory, *wanted, operands, by_index=by_index is not None
        )

    def layer(self, block: Block, x, past, number, key):
        """One layer.

        Args:
          block: its weights.
          x: ``[B, T, D]``.
          past: keys and values of a cache, ``[B, S, K, H]`` each, or None.
          number: of the layer, a scalar.
          key: PRNG key of its dropout, or None.

        Returns:
          ``[B, T, D]``; keys and values of the tokens, as a cache keeps them; and what was asked for, else None:
          attention received by the tokens and by the memory, or attention outputs ``[B, Q, N, H]``.
        """
        # One for each projection: q, k, v, o, gate, up, down.
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        which = None if len(self.attends) == 1 else self.windowed[number]

        def pick(options):
            # Both were computed once for all layers; there is no choice where all layers are of one kind.
            return options[0] if which is None else jax.tree.map(lambda no, yes: jnp.where(which, yes, no), *options)

        # A branch and not a choice between results: only one kind of attention is run.
        attend = self.attends[0] if which is None else functools.partial(jax.lax.cond, which, *reversed(self.attends))
        cos, sin = pick(self.angles)
        q, k, v = block.self_attn.project(block.input_layernorm(x), self.gate, keys)
        # Rotated once, for attention and cache alike; merged keys are means of rotated ones (CCM, as its code does).
        rotated = rope.rotate(k, cos, sin)
        # [B, M, K, H]: older chunks, out of this layer's own keys (`Packed`) or from the cache.
        mk, mv = self._remembered(rotated, v, past, pick)
        q, wanted = rope.rotate(q, cos, sin), None

        def operand(each):
            return None if each is None else each.astype(self.operands)

        attended = functools.partial(attend, operand(q), operand(rotated))
        if self.observe is None:
            y = attended(operand(v), operand(mk), operand(mv))
        else:
            # Keys are bound: the cotangent is pulled back to the values alone.
            y, wanted = accumulated_attention(
                lambda v, mv: attended(v, operand(mk), mv), operand(v), operand(mv), self.observe
            )
        if self.attended_at is not None:
            # Only these: those of whole rows, for all layers, would be as large as all that the backward pass keeps.
            at = jnp.take_along_axis(y, self.attended_at[:, :, None, None], axis=1)
            wanted = constrain(at, "rows", None, "heads")
        x = x + block.after_attention(block.self_attn.o_proj(y.reshape(*y.shape[:2], -1), self.gate, keys[3]))
        out = constrain(x + block.feed_forward(x, self.gate, keys[4:]), "rows", "tokens")
        # What a cache keeps: where positions are indices in the cache, they change later, so that keys stay unrotated.
        return out, (k if self.by_index else rotated, v), wanted

    def _remembered(self, k, v, past, pick):
        """Keys and values of the memory, given or packed out of the tokens' own; None where there is none."""
        if past is not None:
            mk, mv = past
            return (mk if self.past_angles is None else rope.rotate(mk, *pick(self.past_angles))), mv
        if self.memory is None:
            return None, None
        return pack(self.memory, k), pack(self.memory, v)


def accumulated_attention(attend, v, memory_v, weights):
    """Runs attention and measures what each key receives, whatever computes the attention.

    The output is linear in the values, ``o_q = sum_s p_qs v_s``: pulled back through it, a cotangent of w_q for each
    query is ``sum_q w_q p_qs``, the weighted attention that key s receives.

    Args:
      attend: ``(v, memory_v) -> [B, T, N, H]``.
      v: ``[B, T, K, H]``.
      memory_v: ``[B, M, K, H]``.
      weights: ``float32 [B, T]`` of the queries.

    Returns:
      The output, and ``float32 [B, T, K]`` and ``[B, M, K]``.
    """
    # One cotangent w_q for every number of every head, so that the H numbers of a key's result are all the same.
    y, pull = jax.vjp(attend, v, memory_v)
    own, past = pull(jnp.broadcast_to(weights[:, :, None, None], y.shape).astype(y.dtype))
    return y, (own[..., 0].astype(jnp.float32), past[..., 0].astype(jnp.float32))


def pack(memory: Packed, x):
    """Memory entries ``[B, M, K, H]`` out of the tokens' keys or values ``[B, T, K, H]``."""
    source = jnp.take_along_axis(x, memory.source[:, :, None, None], axis=1)  # [B, P, K, H]
    if memory.share is not None:
        parts = source.astype(jnp.float32) * memory.share[:, :, None, None]
        # [B, M, c, K, H]: the c sources of a slot are neighbours.
        return jnp.sum(parts.reshape(*memory.slots.kind.shape, -1, *x.shape[2:]), axis=2).astype(x.dtype)
    if memory.mix is None:
        return source
    # In full: a TPU would round weights such as 1/3 to bfloat16, which the recurrence does not.
    full = jax.lax.Precision.HIGHEST
    mixed = jnp.einsum("bmp,bpkh->bmkh", memory.mix, source.astype(jnp.float32), precision=full)
    return mixed.astype(x.dtype)
