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
    made = _Steps(model, options)
    made.prefill()
    # With the capacity of the config, if its memory grows.
    slots = made.turn(baselines.of(ways, method), unstacked)
    made.measure()
    if options.train_rounds:
        made.train(training)
    return made.told(mesh.size, slots)


class _Steps:
    """What is called and timed, and what each call does.

    Attributes:
      calls: by name.
      work: FLOPs of each.
      tokens: of each step; the rates of the machine have none.
      seconds: of each first call, in which it is compiled.
      found: what was measured of each.
      beside: for each step, what was measured of the matrix product in the same rounds.
      sizes: of the training step.
    """

    def __init__(self, model: Transformer, options: Options):
        self.model, self.options = model, options
        product, product_flops = turns.matrix_product(model.precision)
        read, self.read_bytes = turns.reading()
        self.calls: dict[str, Callable[[], Any]] = {"matrix product": product, "reading": read}
        self.work = {"matrix product": product_flops}
        self.tokens: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.beside: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, int] = {}

    def prefill(self) -> None:
        """A text that is read at once, the logits of its last token alone."""
        shape, count = self.model.config, self.options.prefill
        row = random_text(shape.vocab_size, [count])
        text = batch(build("full"), [row], measure(build("full"), row), shape.vocab_size)
        full = dataclasses.replace(build("full"), gate=())
        forward = jax.jit(lambda model, made: model.logits(steps.parallel_forward(model, made, method=full)[:, -1]))
        self.calls["prefill"] = lambda: forward(self.model, text)
        self.work["prefill"] = shape.forward_flops(count, count * (count + 1) // 2, 1)
        self.tokens["prefill"] = count

    def turn(self, own: Baseline, unstacked: Callable[[], Transformer]) -> int:
        """A chunk that is read and closed, and an answer, behind as many turns as fill the memory; its slots then."""
        method, options, shape = own.method, self.options, self.model.config
        chunk = method.chunk or options.chunk
        # Without a memory, as many as are read at once.
        written = method.memory_slots(1, chunk)
        # Chunks that stay as text before they become memory; behind any large number of turns.
        recent = baselines.kept_text(method, 99, chunk) // chunk if own.memory else 0
        past = (own.memory or written) // written + recent if written else max(options.prefill // chunk, 1)
        cache = turns.as_left(self.model, own.cache(self.model, 1, turns=past, turn=max(chunk, options.reply)))
        state = dict(turns=past, turn=chunk, capacity=cache.memory_capacity)

        def refill(held):
            return baselines.fill(held, method, turns=past, turn=chunk)

        if method.remembers:
            piece = Chunk(np.ones((1, chunk), np.int32), np.ones((1, chunk), bool))

            def compress(held):
                return turns.read_and_close(self.model, held, piece, method=method)

            self.calls["compress_step"] = _kept(cache, refill, compress)
            seen = turns.seen_pairs(method, **state, text=chunk, kind=Kind.TEXT, closing=True)
            self.work["compress_step"] = shape.forward_flops(chunk + len(method.closes), seen, 1)
            self.tokens["compress_step"] = chunk
        first = jnp.ones((1,), jnp.int32)
        # As `Conversations` would choose.
        decoder = unstacked() if pays_unstacked(self.model, cache) else self.model

        def answer(held):
            return turns.answer(decoder, held, first, length=options.reply, method=method)[0]

        self.calls["decode"] = _kept(cache, refill, answer)
        seen = turns.seen_pairs(method, **state, text=options.reply, kind=Kind.QUERY, closing=False)
        self.work["decode"] = shape.forward_flops(options.reply, seen, options.reply)
        self.tokens["decode"] = options.reply
        live = baselines.slots_after(method, past, chunk, cache.memory_capacity).kind
        return int((live == Kind.MEMORY).sum()) if method.remembers else len(live)

    def measure(self) -> None:
        """Times all calls, round after round."""
        for name, call in self.calls.items():
            self._first(name, call)
        samples = turns.interleaved(self.calls, 3 * self.options.rounds)
        self.found = {name: turns.summary(those, self.options.clock) for name, those in samples.items()}
        self.beside = dict.fromkeys(self.tokens, self.found["matrix product"])

    def train(self, training: Callable[[int], tuple[Callable[[], Any], dict[str, int], float]]) -> None:
        """Times a training step, in rounds of its own."""
        start = time.perf_counter()
        step, self.sizes, self.work["train"] = training(self.options.chunk)
        step()
        self.seconds["train"] = round(time.perf_counter() - start, 2)
        # The product once more beside it: a busy machine slows both.
        both = {"matrix product": self.calls["matrix product"], "train": step}
        samples = turns.interleaved(both, self.options.train_rounds)
        self.found["train"] = turns.summary(samples["train"], self.options.clock)
        self.beside["train"] = turns.summary(samples["matrix product"], self.options.clock)
        self.tokens["train"] = self.sizes["tokens"]

    def told(self, devices: int, slots: int) -> dict[str, Any]:
        """The rates of all devices, and each step beside them."""
        product_flops, rows = self.work["matrix product"], {}
        machine = {
            "flops_per_second": devices * product_flops / self.found["matrix product"]["seconds"],
            "read_bytes_per_second": devices * self.read_bytes / self.found["reading"]["seconds"],
        }
        for name, count in self.tokens.items():
            taken = self.found[name]["seconds"]
            # Of the rate that the matrix product reached in the same rounds, on one device, times their number.
            share = self.work[name] / (devices * product_flops) * self.beside[name]["seconds"] / taken
            rows[name] = self.found[name] | {
                "tokens": count, "tokens_per_second": count / taken, "flops": self.work[name], "of_matrix_rate": share,
                "compile_seconds": self.seconds[name],
            }  # fmt: skip
        reading = _read_bytes(self.model) / machine["read_bytes_per_second"]
        rows["decode"]["times_reading_weights"] = rows["decode"]["seconds"] / self.options.reply / reading
        for name in {"compress_step", "decode"} & set(rows):
            rows[name]["memory_slots"] = slots
        if self.sizes:
            rows["train"] |= self.sizes
        return {"machine": machine, "steps": rows}

    def _first(self, name: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        jax.block_until_ready(call())
        self.seconds[name] = round(time.perf_counter() - start, 2)


def _kept(
    cache: MemoryCache, refill: Callable[[MemoryCache], MemoryCache], call: Callable[[MemoryCache], MemoryCache]
) -> Callable[[], MemoryCache]:
    """A call that is given the state which it left, set back to so many turns, for good, as in a server."""
    # A copy: the call donates what it is given, and this cache is needed by other steps.
    states = [jax.tree.map(jnp.copy, cache)]

    def run() -> MemoryCache:
        states[0] = call(refill(states[0]))
        return states[0]

    return run


def _read_bytes(model: Transformer) -> int:
    """Bytes of the weights that one decoded token must read: all of the layers, and the head."""
    shape = model.config
    head = shape.vocab_size * shape.hidden_size
    itemsize = jnp.dtype(model.precision.params).itemsize
    # Of the table of embeddings one row is read; the head is read as a whole, tied or not.
    return (shape.layer_weights + head) * itemsize


def random_text(vocab: int, lengths: list[int]) -> Example:
    """A session of random text."""
    rng = np.random.default_rng(0)
    nothing = np.zeros(0, np.int32)

    def text(size):
        return Segment(rng.integers(0, vocab, size).astype(np.int32), np.ones(size, bool))

    return Example(nothing, nothing, tuple(text(size) for size in lengths))


def training_flops(config: Config, shape: ModelConfig, method: Method, made: Batch) -> float:
    """FLOPs that a training step on a batch of like rows needs: forward, backward, and the teacher of the objective."""
    rows, tokens = made.tokens.shape
    linear = shape.forward_flops(rows * tokens, 0, rows * made.targets.shape[1])

    def attention(method, made):
        return shape.forward_flops(0, rows * row_pairs(method, made), 0)

    # Backward through a frozen base: one product for each one forward, two in attention; another where it is trained.
    backward = linear * (2 if config.train.trainable == "all" else 1) + 2 * attention(method, made)
    # A teacher reads text alone, without a memory.
    alone = dataclasses.replace(made, memory=None)
    asked = [teacher.FULL] * config.objective.asks_teacher + [teacher.ALONE] * bool(config.objective.dependence)
    return linear + attention(method, made) + backward + sum(linear + attention(each, alone) for each in asked)


def row_pairs(method: Method, made: Batch) -> int:
    """Pairs of query and key that one row's attention needs."""
    from jax_ccm.rules.visibility import visible

    def first(slots):
        return slots.map(lambda x: np.asarray(x)[:1])

    own = visible(method.rule, first(made.slots), first(made.slots)).sum()
    if made.memory is None:
        return int(own)
    return int(own + visible(method.rule, first(made.slots), first(made.memory.slots)).sum())
