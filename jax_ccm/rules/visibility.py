"""Who sees whom: one function of a rule and two sets of slots, for host, compiler and kernel."""

from __future__ import annotations

import dataclasses

from jax_ccm.rules.types import INF, RAW, Array, Kind, Method, Rule, Slots


def is_in(kind: Array, kinds: tuple[Kind, ...]) -> Array:
    """``bool``, shape of ``kind``: whether it is one of ``kinds``."""
    found = kind == int(kinds[0])
    for other in kinds[1:]:
        found = found | (kind == int(other))
    return found


def visible(rule: Rule, q: Slots, k: Slots) -> Array:
    """Which keys each query sees.

    Compare-and-or only, so that the same function serves numpy on the host, `jax.numpy`, and blocks inside a kernel.
    For CCM-concat with n = 1, chunks ``a``, ``b`` and tail ``c``, own tokens left, memory right::

              a C b C c | M M
        a     x . . . . | . .
        C     x x . . . | . .
        b     . . x . . | x .
        C     . . x x . | x .
        c     . . . . x | x x

    Args:
      rule: who sees whom.
      q: `Slots` of ``[..., T]``, those that look.
      k: `Slots` of ``[..., S]``, those that are seen.

    Returns:
      ``bool [..., T, S]``.
    """
    return sees(rule, q.map(lambda x: x[..., :, None]), k.map(lambda x: x[..., None, :]))


def sees(rule: Rule, q: Slots, k: Slots) -> Array:
    """Whether each query sees its key: ``bool``, for slots of any shapes that broadcast to each other."""
    back = q.segment - k.segment
    causal = q.index >= k.index
    seen = None
    # Clauses are static: what they do not limit is not compared, which counts inside a kernel.
    for clause in rule.sees:
        hit = is_in(q.kind, clause.query) & is_in(k.kind, clause.key)
        hit = hit & (back >= clause.nearest)
        if clause.farthest < INF:
            hit = hit & (back <= clause.farthest)
        if not set(clause.query + clause.key) <= set(rule.both_ways):
            hit = hit & causal
        if clause.window is not None:
            hit = hit & (q.position - k.position < clause.window)
        if clause.hidden is not None:
            hit = hit & (k.position >= first_seen(q.position, clause.hidden))
        if clause.behind:
            hit = hit & (k.position <= q.position)
        seen = hit if seen is None else seen | hit
    return seen


def first_seen(position: Array, hidden: tuple[int, int]) -> Array:
    """``floor(position * a / b)``, in steps that do not overflow int32 for b up to 1,000 or so."""
    a, b = hidden
    # ``p = (p // b) b + p % b``, and the first part times a / b is whole.
    return position // b * a + position % b * a // b


def reachable(rule: Rule, k: Slots, segment: Array, position: Array) -> Array:
    """``bool [B, S]``: keys that something in segment ``[B]`` at or after ``position [B]``, or later, can still see.

    What is not reachable may be removed from a cache without changing any result.
    """
    # `nearest` and the order do not count: segments and positions of those who will look only grow.
    back = segment[:, None] - k.segment
    found = None
    for clause in rule.sees:
        hit = is_in(k.kind, clause.key) & (back <= clause.farthest)
        if clause.window is not None:
            hit = hit & (position[:, None] - k.position < clause.window)
        if clause.hidden is not None:
            hit = hit & (k.position >= first_seen(position, clause.hidden)[:, None])
        found = hit if found is None else found | hit
    return found


def with_window(rule: Rule, window: int | None) -> Rule:
    """The rule with a base model's sliding window over raw text added; memory and sinks are exempt."""
    if window is None:
        return rule
    clauses = []
    # A window is one of a whole clause: kinds that it spares get a clause of their own.
    for clause in rule.sees:
        raw = tuple(kind for kind in clause.key if kind in RAW)
        exempt = tuple(kind for kind in clause.key if kind not in RAW)
        if raw:
            near = window if clause.window is None else min(window, clause.window)
            clauses.append(dataclasses.replace(clause, key=raw, window=near))
        if exempt:
            clauses.append(dataclasses.replace(clause, key=exempt))
    return dataclasses.replace(rule, sees=tuple(clauses))


def gate(method: Method, slots: Slots, kinds: tuple[Kind, ...] = tuple(Kind)) -> Array | None:
    """``float32 [..., S]``: 1 on the kinds where the method's LoRA acts; None if it acts on none of ``kinds``.

    Args:
      method: the compression method.
      slots: of any shape.
      kinds: which kinds the slots can be of.
    """
    # None, so that no LoRA is run at all where it would act on nothing.
    acts = tuple(kind for kind in method.gate if kind in kinds)
    return is_in(slots.kind, acts).astype("float32") if acts else None
