"""Times of attention: our kernel, plain products, and cuDNN's, which is causal and knows no rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.benchmarks import turns
from jax_ccm.benchmarks.pytorch_ours import rows as rows_of
from jax_ccm.devices.record import Rows, Unavailable, is_out_of_memory
from jax_ccm.devices.settings import Size
from jax_ccm.methods import build
from jax_ccm.planning import ahead
from jax_ccm.planning.kernel_costs import Heads
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.types import Method
from jax_ccm.rules.visibility import visible

IMPLEMENTATIONS = ("pallas", "xla", "cudnn")
# FLOPs of a visible pair, a head and a number of it: two products forward; for gradients the scores are made once more,
# and four products follow.
PASSES = {"forward": 4, "forward and backward": 14}
METHOD, CHUNK = build("ccm_concat", comp_tokens=8), 50
# Queries that are counted at once.
COUNTED = 1024


def rows(size: Size) -> Rows:
    """For each length, each implementation, forward and with the gradients of queries, keys and values."""
    for length in size.lengths:
        made = functools.cache(functools.partial(_made, length))
        for implementation in IMPLEMENTATIONS:
            for what in PASSES:
                labels = {"length": length, "implementation": implementation, "pass": what}
                yield labels, functools.partial(_timed, made, implementation, what, size)


def _made(length: int) -> tuple[Batch, int]:
    """A row of CCM-concat, and its visible pairs."""
    made = rows_of(METHOD, 100, count=1, tokens=length, chunk=CHUNK)
    return made, visible_pairs(METHOD, made)


def visible_pairs(method: Method, made: Batch) -> int:
    """Pairs of a query and a key that it sees, of all rows, counted on the device."""
    keys = [made.slots] + ([] if made.memory is None else [made.memory.slots])
    # [B, T, S] of booleans at once would be too large: `COUNTED` queries at a time.
    count = jax.jit(lambda q, keys: sum(jnp.sum(visible(method.rule, q, slots), dtype=jnp.int32) for slots in keys))
    blocks = range(0, made.tokens.shape[1], COUNTED)
    return sum(int(count(made.slots.map(lambda x, at=at: x[:, at : at + COUNTED]), keys)) for at in blocks)


def causal(length: int, heads: Heads) -> tuple[Callable, Callable, tuple]:
    """Causal attention by cuDNN, in the form of `ahead.call`, whose slots it does not heed."""

    def forward(arrays, slots):
        q, k, v = (x.reshape(*x.shape[:2], -1, heads.size) for x in arrays[:3])
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return out.reshape(*out.shape[:2], -1)

    def gradients(arrays, d_out, slots):
        return jax.vjp(lambda arrays: forward(arrays, slots), arrays)[1](d_out)

    def wide(count):
        return jax.ShapeDtypeStruct((1, length, count * heads.size), jnp.bfloat16)

    arrays = [wide(heads.heads), wide(heads.kv_heads), wide(heads.kv_heads)]
    return forward, gradients, (arrays, wide(heads.heads), None)


def program(implementation: str, length: int, memory: int, heads: Heads) -> tuple[Callable, Callable, tuple]:
    """``forward``, ``gradients`` and abstract arguments of one of `IMPLEMENTATIONS`, as `ahead.call` gives them."""
    if implementation == "cudnn":
        return causal(length, heads)
    return ahead.call(METHOD.rule, 1, length, memory, heads, implementation=implementation)


def _timed(made: Callable[[], tuple[Batch, int]], implementation: str, what: str, size: Size) -> dict[str, Any]:
    row, pairs = made()
    assert row.memory is not None, "CCM-concat has one"
    length, heads = row.tokens.shape[1], size.heads
    if implementation == "cudnn":
        if jax.default_backend() != "gpu":
            raise Unavailable(f"cuDNN runs on NVIDIA GPUs; this is {jax.default_backend()}")
        # Causal: it does more than the rule asks for, and is told of by its own pairs.
        pairs = length * (length + 1) // 2
    forward, gradients, abstract = program(implementation, length, row.memory.source.shape[1], heads)
    arrays, d_out, slots = _drawn(abstract, row)
    call, arguments = (forward, (arrays, slots)) if what == "forward" else (gradients, (arrays, d_out, slots))
    try:
        compiled, said = ahead.compiled(jax.jit(call).lower(*arguments))
        seconds = seconds_of(lambda: compiled(*arguments), size)
    except Exception as e:
        if implementation != "cudnn" or is_out_of_memory(e):
            raise
        raise Unavailable(f"cuDNN, or JAX for it, refuses: {type(e).__name__}: {e}") from e
    if implementation == "pallas" and jax.default_backend() != "cpu" and not said.kernels:
        raise Unavailable("the kernel refused, and plain products ran in its place")
    flops = PASSES[what] * pairs * heads.heads * heads.size
    return {
        "pairs": pairs, "seconds": seconds, "flops": flops, "flops_per_second": flops / seconds,
        "temporaries": said.temporaries, "kernels": said.kernels, "compile_cpu_seconds": round(said.seconds, 2),
    }  # fmt: skip


def _drawn(abstract: tuple, row: Batch) -> tuple:
    """Random arrays for abstract ones, and the row's slots."""
    arrays, d_out, slots = abstract
    leaves = [*arrays, d_out]
    draw = jax.jit(lambda key: [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(key, leaves, strict=True)])
    *arrays, d_out = draw(jax.random.split(jax.random.key(0), len(leaves)))
    if slots is not None:
        assert row.memory is not None
        slots = jax.tree.map(jnp.asarray, (row.slots, row.memory.slots))
    return arrays, d_out, slots


def seconds_of(call: Callable[[], Any], size: Size) -> float:
    """The median seconds of a call after warm-up; calls that take less than `Size.least` follow each other unwaited."""
    jax.block_until_ready(call())
    once = turns.timed(call)[0].wall
    # Many calls to one wait, where waiting would take longer than the call.
    times = int(np.clip(size.least / max(once, 1e-6), 1, 100))

    def run() -> Any:
        out = None
        for _ in range(times):
            out = call()
        return out

    return turns.summary([turns.timed(run)[0] / times for _ in range(size.rounds)], "wall")["seconds"]
