"""Attention on the device against its definition in float64: forward and gradients, every method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.attention.definition import exact
from jax_ccm.attention.dispatch import memory_attention
from jax_ccm.attention.shared import Refused
from jax_ccm.benchmarks import report
from jax_ccm.benchmarks.steps import random_text
from jax_ccm.devices.record import Rows, Unavailable
from jax_ccm.devices.settings import Size
from jax_ccm.evals import recurrent
from jax_ccm.methods import build
from jax_ccm.rules import rows as layout
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example
from jax_ccm.rules.types import Method

# Every method that has a parallel form, with the least options.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "none": {},
    "window": dict(size=9, sink=True),
    "gist": dict(comp_tokens=2),
    "ccm_concat": dict(comp_tokens=2, sink=True),
    "ccm_merge": dict(comp_tokens=2, sink=True),
    "ccm_ema": dict(comp_tokens=2),
    "compressive": dict(ratio=2),
    "loma": dict(ratio=2, memory_tokens=2),
    "sentinel": {},
    "local": dict(hidden=0.3),
    "scattered": {},
}
# What a number may be off, in parts of the largest of its array (at least 1): sums in another order, exponentials and
# logarithms in float32; rounding of weights and results to 8 bits in bfloat16.
ALLOWED = {"float32": 1e-5, "bfloat16": 2e-2}
HEADS, KV_HEADS, HEAD, VOCAB = 4, 2, 64, 97


def rows(size: Size) -> Rows:
    """For each method and type, first the device's kernel and then plain products, compiled side by side."""
    # Made once for all that are compared with it.
    cases = {
        (name, dtype): functools.cache(functools.partial(_case, name, dtype, size))
        for name in size.methods or METHODS
        for dtype in ALLOWED
    }
    pool = ThreadPoolExecutor(report.core_count())
    try:
        begun = [
            ({"method": name, "dtype": dtype, "kernel": kernel}, case, pool.submit(_program, case, call))
            for kernel, call in implementations()
            for (name, dtype), case in cases.items()
        ]
        for labels, case, program in begun:
            yield labels, functools.partial(_compared, case, program, ALLOWED[labels["dtype"]])
    finally:
        pool.shutdown(cancel_futures=True)


def implementations() -> Iterator[tuple[str, Callable]]:
    """Name and ``attend(q, q_slots, sources, rule=rule)`` of all that can be compared on this device."""
    platform = jax.default_backend()
    for name, where in (("triton", "gpu"), ("mosaic", "tpu")):
        if platform in (where, "cpu"):
            yield (name if platform != "cpu" else f"{name}, interpreted"), functools.partial(_kernel, where)
    yield "xla", _products


def _kernel(where: str, q, q_slots, sources, *, rule):
    if where == "gpu":
        from jax_ccm.attention import gpu as kernels
    else:
        from jax_ccm.attention import tpu as kernels
    try:
        return kernels.attend(q, q_slots, sources, rule=rule, interpret=jax.default_backend() == "cpu")
    except Refused as e:
        raise Unavailable(f"the kernel refuses, {e}") from e


def _products(q, q_slots, sources, *, rule):
    (k, v, slots), *memory = sources
    more = dict(zip(("memory_k", "memory_v", "memory_slots"), memory[0], strict=True)) if memory else {}
    return memory_attention(q, k, v, **more, rule=rule, slots=slots, in_order=True, implementation="xla")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed, and what it must give.

    Attributes:
      method: the method.
      made: its rows.
      arrays: queries, ``(k, v)`` of each source, and the gradient of the output.
      expected: output, and gradients of queries, keys and values, float64.
    """

    method: Method
    made: Batch
    arrays: tuple[Any, list[tuple[Any, Any]], Any]
    expected: list[np.ndarray]

    @property
    def keys(self) -> list:
        """The slots of each source of keys."""
        return [self.made.slots] + ([] if self.made.memory is None else [self.made.memory.slots])


def _case(name: str, dtype: str, size: Size) -> Case:
    method = build(name, **METHODS[name])
    examples = [_kept(random_text(VOCAB, list(lengths)), method) for lengths in size.chunks]
    sizes = recurrent.caps_for(method, examples)
    # Places behind the end of every row, so that blocks hold dead ones.
    sizes = layout.Sizes(sizes.tokens + 9, sizes.memory + 5 if sizes.memory else 0, sizes.scored)
    made = layout.batch(method, examples, sizes, VOCAB)
    rng = np.random.default_rng(0)

    def draw(length, heads):
        # [B, T or S, N or K, H]
        return jnp.asarray(rng.normal(size=(len(examples), length, heads, HEAD)), dtype)

    keys = [made.slots] + ([] if made.memory is None else [made.memory.slots])
    length = made.tokens.shape[1]
    sources = [(draw(slots.kind.shape[1], KV_HEADS), draw(slots.kind.shape[1], KV_HEADS)) for slots in keys]
    q, d_out = draw(length, HEADS), draw(length, HEADS)
    joined = [(*source, slots) for source, slots in zip(sources, keys, strict=True)]
    expected = exact(method.rule, made.slots, q, joined, d_out)
    return Case(method, made, (q, sources, d_out), jax.tree.leaves(expected))


def _kept(example: Example, method: Method) -> Example:
    """The example, with half of each second chunk marked to be kept, for a method that keeps text."""
    if not method.keeps_text:
        return example
    *chunks, tail = example.segments

    def half(number, count):
        return np.arange(count) < (number % 2) * (count // 2)

    marked = [dataclasses.replace(c, kept=half(number, len(c.tokens))) for number, c in enumerate(chunks)]
    return dataclasses.replace(example, segments=(*marked, tail))


def _program(case: Callable[[], Case], call: Callable) -> Any:
    """``(q, sources, d_out, q_slots, keys) -> (output, gradients)``, compiled."""
    made = case()

    def run(q, sources, d_out, q_slots, keys):
        def joined(sources):
            return tuple((*s, slots) for s, slots in zip(sources, keys, strict=True))

        out, pull = jax.vjp(lambda q, sources: call(q, q_slots, joined(sources), rule=made.method.rule), q, sources)
        return out, *pull(d_out)

    # A TPU rounds float32 operands to bfloat16 unless it is told not to.
    with jax.default_matmul_precision("highest" if made.arrays[0].dtype == jnp.float32 else "default"):
        return jax.jit(run).lower(*made.arrays, made.made.slots, made.keys).compile()


def _compared(case: Callable[[], Case], program: Future, allowed: float) -> dict[str, Any]:
    """How far an implementation is off, array by array."""
    run, made = program.result(), case()
    found = jax.tree.leaves(run(*made.arrays, made.made.slots, made.keys))
    gaps = [
        float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / max(1.0, np.max(np.abs(theirs))))
        for ours, theirs in zip(found, made.expected, strict=True)
    ]
    # Comparing this way round, a NaN does not pass.
    passed, worst = all(gap <= allowed for gap in gaps), lambda gaps: max(gaps, key=lambda x: (x != x, x))
    row = {"forward": gaps[0], "gradients": worst(gaps[1:]), "allowed": allowed, "length": made.made.tokens.shape[1]}
    if not passed:
        row |= {"outcome": "failed", "why": f"off by {worst(gaps):.2g}, allowed {allowed:g}"}
    return row | {"passed": passed}
