"""What a conversation costs: seconds and bytes of a turn after many turns, and the rates of the machine beside them.

A conversation of 1,000 turns is not talked through: the cache is put into the state in which that many turns leave it
(its slots are exactly those; its keys and values are arbitrary numbers, which cost the same), and one turn is run.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.benchmarks.baselines import Baseline, closes_turns, fill, slots_after
from jax_ccm.benchmarks.settings import Clock, Options
from jax_ccm.distributed import sharding
from jax_ccm.memory import steps
from jax_ccm.memory.closing import close_due, policy, prefill
from jax_ccm.memory.generation import pays_unstacked
from jax_ccm.nn.transformer import Transformer
from jax_ccm.numerics import Precision, einsum
from jax_ccm.rules.positions import closing_positions
from jax_ccm.rules.types import Chunk, Kind, MemoryCache, Method, Slots
from jax_ccm.rules.visibility import visible

# What a turn consists of. The cache is donated, as in a server that owns it.


@functools.partial(jax.jit, static_argnames="method", donate_argnames="cache")
def ask(model: Transformer, cache: MemoryCache, prompt: Chunk, *, method: Method):
    """Reads the question; returns the cache and the first token of the answer, ``int32 [B]``."""
    cache = prefill(model, cache, prompt, method=method, query=True)
    return cache, jnp.argmax(cache.logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("method", "length"), donate_argnames="cache")
def answer(model: Transformer, cache: MemoryCache, token, *, length: int, method: Method):
    """Reads ``length`` tokens one by one, each the most likely one after those before."""
    closing, query = policy(method, None, query=True)

    def step(carry, _):
        cache, token = carry
        every = jnp.ones((token.shape[0],), bool)
        cache, _ = steps.read(model, cache, Chunk(token[:, None], every[:, None]), method=method, query=query)
        cache = close_due(model, cache, token, every, method=method, closing=closing)
        return (cache, jnp.argmax(cache.logits, axis=-1).astype(jnp.int32)), None

    return jax.lax.scan(step, (cache, token), length=length)[0]


close = jax.jit(steps.compress, static_argnames="method", donate_argnames="cache")
read_and_close = jax.jit(steps.compress_step, static_argnames="method", donate_argnames="cache")


def reads_again(method: Method) -> bool:
    """Whether a turn is read once more, as context, to be closed: its chunks see less than its answers do."""
    if method.chunk or not method.remembers:
        return False
    return method.tells_queries_apart


def as_left(model: Transformer, cache: MemoryCache) -> MemoryCache:
    """A fresh cache as a program of the model leaves one behind: on the mesh, also where that is a single device.

    Otherwise the second call of each program, which is given the cache of the first, would compile it anew.
    """
    where = jax.tree.leaves(model)[0].sharding
    if not isinstance(where, jax.sharding.NamedSharding) or where.mesh.size > 1:
        return cache
    return jax.device_put(cache, jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec()))


class Conversation:
    """One session of a baseline, set back to the same number of turns before each turn that is run."""

    def __init__(
        self,
        model: Transformer,
        unstacked: Callable[[], Transformer],
        baseline: Baseline,
        *,
        turns: int,
        prompt: int,
        reply: int,
    ):
        """Makes the session and warms it up.

        Args:
          model: the decoder.
          unstacked: gives it with its layers unstacked, which make tokens where that pays.
          baseline: how the conversation is kept.
          turns: closed turns before the one that is run.
          prompt: tokens of a question.
          reply: tokens of an answer.
        """
        self.model, self.baseline, self.turns, self.reply = model, baseline, turns, reply
        self.turn = prompt + reply
        cache = as_left(model, baseline.cache(model, 1, turns=turns, turn=self.turn))
        self.cache = cache
        self.decoder = unstacked() if pays_unstacked(model, cache) else model

        def piece(size):
            return Chunk(np.ones((1, size), np.int32), np.ones((1, size), bool))

        self.prompt, self.whole = piece(prompt), piece(self.turn)
        self.bytes = cache.nbytes
        self.slots = len(slots_after(baseline.method, turns, self.turn, cache.memory_capacity).kind)
        start = time.perf_counter()
        self.run()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> dict[str, Sample]:
        """Runs a turn.

        Returns:
          What "first token", "token" (each further one) and "close" took.
        """
        method = self.baseline.method

        def before(cache):
            return jax.block_until_ready(fill(cache, method, turns=self.turns, turn=self.turn))

        # Set back before each run: the turn of the run before is gone.
        cache = before(self.cache)
        first, (cache, token) = timed(lambda: ask(self.model, cache, self.prompt, method=method))
        rest, (cache, _) = timed(lambda: answer(self.decoder, cache, token, length=self.reply, method=method))
        closing = Sample(0.0, 0.0)
        if reads_again(method):
            # Reading has only added behind what was there.
            cache = before(cache)
            closing, cache = timed(lambda: read_and_close(self.model, cache, self.whole, method=method))
        elif closes_turns(method) and not method.chunk:
            closing, cache = timed(lambda: close(self.model, cache, method=method))
        self.cache = cache
        return {"first token": first, "token": rest / self.reply, "close": closing}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a call took.

    Attributes:
      wall: seconds of the clock.
      cpu: seconds of processor time of this process, all threads together: what a busy machine does not change.
    """

    wall: float
    cpu: float

    def __truediv__(self, count: int) -> Sample:
        return Sample(self.wall / count, self.cpu / count)


def timed(call: Callable[[], Any]) -> tuple[Sample, Any]:
    """Runs a call to its end."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(call())
    return Sample(time.perf_counter() - wall, time.process_time() - cpu), out


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Sample]]:
    """Times calls that have been warmed up, one after the other in each round: what disturbs one disturbs all."""
    found: dict[str, list[Sample]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(timed(call)[0])
    return found


def summary(samples: Sequence[Sample], clock: Clock) -> dict[str, float]:
    """Medians: ``seconds`` by the clock that was asked for, and by each of the two."""
    wall, cpu = (statistics.median(getattr(s, name) for s in samples) for name in ("wall", "cpu"))
    return {"seconds": wall if clock == "wall" else cpu, "wall_seconds": wall, "cpu_seconds": cpu}


# The machine.


def matrix_product(precision: Precision) -> tuple[Callable[[], Any], float]:
    """Square matrix products, one after the other, and their FLOPs: long enough to last as long as what is compared."""
    size, times = (1024, 8) if jax.default_backend() == "cpu" else (8192, 8)
    a = jnp.full((size, size), 1 / size, precision.params)
    product = functools.partial(einsum, "ij,jk->ik", compute=precision.compute, output=precision.output)
    call = jax.jit(lambda a: functools.reduce(product, [a] * times, a.astype(precision.output)))
    # A product of the one before, again and again: none can be left out, and none runs beside another.
    return lambda: call(a), times * 2.0 * size**3


def reading() -> tuple[Callable[[], Any], float]:
    """Reading 256 MiB four times, and these bytes: a matrix by a vector, the fastest way to read that there is here.

    Next to nothing is written: memory that is new would cost more than to read.
    """
    size, times = 2**13, 4
    x, v = jnp.full((size, size), 1 / size, jnp.float32), jnp.ones((size,), jnp.float32)
    call = jax.jit(lambda x, v: functools.reduce(lambda v, _: x @ v, range(times), v))
    return lambda: call(x, v), float(times * x.nbytes)


def seen_pairs(method: Method, *, turns: int, turn: int, capacity: int, text: int, kind: Kind, closing: bool) -> int:
    """Pairs of a query and a key that it sees, where a session reads text.

    Args:
      method: the compression method.
      turns: closed turns before.
      turn: tokens of each.
      capacity: memory slots that there is room for.
      text: tokens that are read.
      kind: of the text.
      closing: whether they are closed, too.
    """
    before, total = slots_after(method, turns, turn, capacity), turns * turn
    place = np.arange(text) + total
    parts = [Slots(np.full(text, int(kind)), np.full(text, turns), place, place)]
    position = closing_positions(method, np.array(total), np.array(total + text))
    for number, token in enumerate(method.closes if closing else ()):

        def one(x):
            return np.array([x])

        parts.append(Slots(one(int(token.kind)), one(turns), one(total + text + number), one(position[number])))
    queries = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    keys = jax.tree.map(lambda *x: np.concatenate(x), before, queries)
    return int(visible(method.rule, queries, keys).sum())


# Memory.


def weights_bytes(model: Transformer) -> int:
    """Bytes of base and adapter."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))


def compiled_bytes(compiled: Any) -> int:
    """What a compiled program holds at its peak: arguments, results and temporaries, aliases counted once."""
    sizes = compiled.memory_analysis()
    whole = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return whole - sizes.alias_size_in_bytes


def most_sessions(
    model: Transformer,
    baseline: Baseline,
    budget: int,
    *,
    turns: int,
    turn: int,
    prompt: int,
    mesh: jax.sharding.Mesh | None = None,
) -> dict:
    """The largest batch of sessions whose question can be read within so many bytes, as compiled (nothing is run).

    Args:
      model: the decoder.
      baseline: how the conversations are kept.
      budget: bytes of each device for weights, sessions and temporaries together.
      turns: closed turns of each session.
      turn: tokens of each.
      prompt: tokens of the question.
      mesh: the devices that sessions and weights are spread over, in use; None for one.

    Returns:
      ``sessions``; the ``bytes`` that this many need; ``bytes_per_session`` at the margin. Bytes are those of a
      device.
    """
    step = 1 if mesh is None else sharding.row_shares(mesh)

    def needed(count: int) -> int:
        batch = count * step
        cache = jax.eval_shape(lambda: baseline.cache(model, batch, turns=turns, turn=turn))
        if mesh is not None and mesh.size > 1:

            def on(x, place):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

            cache = jax.tree.map(on, cache, sharding.cache_shardings(mesh, cache))

        def shape(dtype):
            return jax.ShapeDtypeStruct((batch, prompt), dtype)

        # Nothing of this size is made: shapes are enough to compile.
        lowered = ask.lower(model, cache, Chunk(shape(jnp.int32), shape(bool)), method=baseline.method)
        return compiled_bytes(lowered.compile())

    # Bytes are nearly linear in the batch: a line through two sizes leads to a third, which is then looked at itself.
    sizes = {count: needed(count) for count in (1, 5)}
    slope = (sizes[5] - sizes[1]) / 4
    # Bytes are not quite linear: a few looks suffice, and each compiles a program.
    for _ in range(4):
        fits, over = ([n for n, size in sizes.items() if (size <= budget) == side] for side in (True, False))
        if not fits:
            break
        low = max(fits)
        if over:
            slope = (sizes[min(over)] - sizes[low]) / (min(over) - low)
        # Between what fits and what does not, once both are known; before that, beyond.
        guess = int(low + (budget - sizes[low]) / slope)
        if guess in sizes:
            break
        sizes[guess] = needed(guess)
    best = max((count for count, size in sizes.items() if size <= budget), default=0)
    return {"sessions": best * step, "bytes": sizes.get(best, sizes[1]), "bytes_per_session": round(slope)}


def after_turns(
    model: Transformer,
    unstacked: Callable[[], Transformer],
    ways: list[Baseline],
    options: Options,
    turns: int,
) -> dict[str, Any]:
    """A turn after so many, for each baseline."""
    found: dict[str, dict[str, list[Sample]]] = {baseline.name: {} for baseline in ways}
    conversations = [
        Conversation(model, unstacked, baseline, turns=turns, prompt=options.prompt, reply=options.reply)
        for baseline in ways
    ]
    for _ in range(options.rounds):
        for conversation in conversations:
            for part, sample in conversation.run().items():
                found[conversation.baseline.name].setdefault(part, []).append(sample)
    row: dict[str, Any] = {"turns": turns, "tokens": turns * (options.prompt + options.reply), "systems": {}}
    for conversation in conversations:
        name = conversation.baseline.name
        parts = {part: summary(samples, options.clock) for part, samples in found[name].items()}
        whole = parts["first token"]["seconds"] + options.reply * parts["token"]["seconds"] + parts["close"]["seconds"]
        row["systems"][name] = parts | {
            "turn": whole, "state_bytes": conversation.bytes, "live_slots": conversation.slots,
            "compile_seconds": round(conversation.compile_seconds, 2),
        }  # fmt: skip
    for cell in row["systems"].values():
        cell["to_full"] = cell["turn"] / row["systems"]["full"]["turn"]
    told = ", ".join(f"{name} {cell['turn']:.2f} s" for name, cell in row["systems"].items())
    print(f"a turn after {turns:,}: {told}", flush=True)
    return row


def sessions_that_fit(
    model: Transformer, mesh: jax.sharding.Mesh, ways: list[Baseline], options: Options
) -> dict[str, Any]:
    """How many sessions fit, for each baseline."""
    budget = int(options.memory_gib * 2**30)
    turns, turn = options.turns[-1], options.prompt + options.reply
    found = {
        baseline.name: most_sessions(model, baseline, budget, turns=turns, turn=turn, prompt=options.prompt, mesh=mesh)
        for baseline in ways
    }
    return {"budget_bytes": budget, "turns": turns, "systems": found}
