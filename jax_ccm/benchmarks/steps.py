"""Single steps, measured against the rates of the machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.benchmarks import baselines, turns
from jax_ccm.benchmarks.baselines import Baseline
from jax_ccm.benchmarks.settings import Options
from jax_ccm.config.schema import Config
from jax_ccm.memory import steps, teacher
from jax_ccm.memory.generation import pays_unstacked
from jax_ccm.methods import build
from jax_ccm.nn import ModelConfig, Transformer
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.rows import batch, measure
from jax_ccm.rules.types import Chunk, Kind, MemoryCache, Method


def single_steps(
    model: Transformer,
    method: Method,
    mesh: jax.sharding.Mesh,
    unstacked: Callable[[], Transformer],
    ways: list[Baseline],
    options: Options,
    training: Callable[[int], tuple[Callable[[], Any], dict[str, int], float]],
) -> dict[str, Any]:
    """The machine's rates, and single steps of the config's method measured against them."""
    shape, devices = model.config, mesh.size
    product, product_flops = turns.matrix_product(model.precision)
    read, read_bytes = turns.reading()
    # With the capacity of the config, if its memory grows.
    own = baselines.of(ways, method)
    method = own.method
    chunk, count = method.chunk or options.chunk, options.prefill
    calls: dict[str, Callable[[], Any]] = {"matrix product": product, "reading": read}
    work = {"matrix product": product_flops}
    tokens = {"prefill": count}

    row = random_text(shape.vocab_size, [count])
    text = batch(build("full"), [row], measure(build("full"), row), shape.vocab_size)
    full = dataclasses.replace(build("full"), gate=())
    forward = jax.jit(lambda model, made: model.logits(steps.parallel_forward(model, made, method=full)[:, -1]))
    calls["prefill"] = lambda: forward(model, text)
    work["prefill"] = shape.forward_flops(count, count * (count + 1) // 2, 1)

    # As many turns as fill the memory; without one, as many as are read at once.
    written, recent = (
        method.memory_slots(1, chunk),
        baselines.kept_text(method, 99, chunk) // chunk if own.memory else 0,
    )
    past = (own.memory or written) // written + recent if written else max(count // chunk, 1)
    cache = own.cache(model, 1, turns=past, turn=max(chunk, options.reply))
    state = dict(turns=past, turn=chunk, capacity=cache.memory_capacity)
    live = baselines.slots_after(method, past, chunk, cache.memory_capacity).kind
    slots = int((live == Kind.MEMORY).sum()) if method.remembers else len(live)
    states = {}

    def kept(name: str, call: Callable[[MemoryCache], MemoryCache]) -> None:
        """A call that is given the state which it left, set back to so many turns, for good, as in a server."""
        states[name] = jax.tree.map(jnp.copy, cache)

        def run() -> MemoryCache:
            states[name] = call(baselines.fill(states[name], method, turns=past, turn=chunk))
            return states[name]

        calls[name] = run

    if method.remembers:
        piece = Chunk(np.ones((1, chunk), np.int32), np.ones((1, chunk), bool))
        compress = turns.read_and_close
        kept("compress_step", lambda cache: compress(model, cache, piece, method=method))
        seen = turns.seen_pairs(method, **state, text=chunk, kind=Kind.TEXT, closing=True)
        work["compress_step"] = shape.forward_flops(chunk + len(method.closes), seen, 1)
        tokens["compress_step"] = chunk

    first = jnp.ones((1,), jnp.int32)
    decoder = unstacked() if pays_unstacked(model, cache) else model
    answer = lambda cache: turns.answer(decoder, cache, first, length=options.reply, method=method)[0]
    kept("decode", answer)
    seen = turns.seen_pairs(method, **state, text=options.reply, kind=Kind.QUERY, closing=False)
    work["decode"] = shape.forward_flops(options.reply, seen, options.reply)
    tokens["decode"] = options.reply

    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds[name] = round(time.perf_counter() - start, 2)
    samples = turns.interleaved(calls, 3 * options.rounds)
    found = {name: turns.summary(those, options.clock) for name, those in samples.items()}
    beside = dict.fromkeys(tokens, found["matrix product"])
    if options.train_rounds:
        start = time.perf_counter()
        step, sizes, work["train"] = training(options.chunk)
        step()
        seconds["train"] = round(time.perf_counter() - start, 2)
        samples = turns.interleaved({"matrix product": product, "train": step}, options.train_rounds)
        found["train"] = turns.summary(samples["train"], options.clock)
        beside["train"] = turns.summary(samples["matrix product"], options.clock)
        tokens["train"] = sizes["tokens"]
    machine = {
        "flops_per_second": devices * product_flops / found["matrix product"]["seconds"],
        "read_bytes_per_second": devices * read_bytes / found["reading"]["seconds"],
    }
    rows: dict[str, Any] = {}
    for name, count in tokens.items():
        taken = found[name]["seconds"]
        # Of the rate that the matrix product reached in the same rounds, on one device, times their number.
        share = work[name] / (devices * product_flops) * beside[name]["seconds"] / taken
        rows[name] = found[name] | {
            "tokens": count, "tokens_per_second": count / taken, "flops": work[name], "of_matrix_rate": share,
            "compile_seconds": seconds[name],
        }  # fmt: skip
    reading = _read_bytes(model) / machine["read_bytes_per_second"]
    rows["decode"]["times_reading_weights"] = rows["decode"]["seconds"] / options.reply / reading
    for name in {"compress_step", "decode"} & set(rows):
        rows[name]["memory_slots"] = slots
    if options.train_rounds:
        rows["train"] |= sizes
    return {"machine": machine, "steps": rows}


def _read_bytes(model: Transformer) -> int:
    """Bytes of the weights that one decoded token must read: all of the layers, and the head."""
    shape = model.config
    head = shape.vocab_size * shape.hidden_size
    itemsize = jnp.dtype(model.precision.params).itemsize
    return (shape.layer_weights + head) * itemsize


def random_text(vocab: int, lengths: list[int]) -> Example:
    """A session of random text."""
    rng = np.random.default_rng(0)
    nothing = np.zeros(0, np.int32)
    text = lambda size: Segment(rng.integers(0, vocab, size).astype(np.int32), np.ones(size, bool))
    return Example(nothing, nothing, tuple(text(size) for size in lengths))


def training_flops(config: Config, shape: ModelConfig, method: Method, made: Batch) -> float:
    """FLOPs that a training step on a batch of like rows needs: forward, backward, and the teacher of the objective."""
    rows, tokens = made.tokens.shape
    linear = shape.forward_flops(rows * tokens, 0, rows * made.targets.shape[1])
    attention = lambda method, made: shape.forward_flops(0, rows * row_pairs(method, made), 0)
    # Backward through a frozen base: one product for each one forward, two in attention; another where it is trained.
    backward = linear * (2 if config.train.trainable == "all" else 1) + 2 * attention(method, made)
    alone = dataclasses.replace(made, memory=None)
    asked = [teacher.FULL] * config.objective.asks_teacher + [teacher.ALONE] * bool(config.objective.dependence)
    return linear + attention(method, made) + backward + sum(linear + attention(each, alone) for each in asked)


def row_pairs(method: Method, made: Batch) -> int:
    """Pairs of query and key that one row's attention needs."""
    from jax_ccm.rules.visibility import visible

    first = lambda slots: slots.map(lambda x: np.asarray(x)[:1])
    own = visible(method.rule, first(made.slots), first(made.slots)).sum()
    if made.memory is None:
        return int(own)
    return int(own + visible(method.rule, first(made.slots), first(made.memory.slots)).sum())
