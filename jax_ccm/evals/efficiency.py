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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm import memory, steps
from jax_ccm.generate import pays_apart
from jax_ccm.layout import reachable
from jax_ccm.methods import build
from jax_ccm.nn.config import ModelConfig
from jax_ccm.nn.transformer import Transformer
from jax_ccm.types import Chunk, Kind, MemoryCache, Method, Slots

Clock = Literal["wall", "cpu"]


@dataclasses.dataclass(frozen=True)
class Rival:
    """A way to keep a conversation.

    Attributes:
      name: what tables and plots call it.
      method: what is run.
      note: what is kept, for people.
      memory: memory slots that there is room for; None for those of all turns.
      text: text tokens that are kept of closed turns; None for all, and then nothing is run to close a turn.
    """

    name: str
    method: Method
    note: str
    memory: int | None = 0
    text: int | None = 0

    def cache(self, model: Transformer, batch: int, *, turns: int, turn: int) -> MemoryCache:
        """An empty cache with room for ``turns`` closed turns of ``turn`` tokens and an open one."""
        kept = turns * turn if self.text is None else self.text
        return memory.init_cache(
            model,
            self.method,
            batch,
            memory_capacity=self.method.memory_slots(turns + 1) if self.memory is None else self.memory,
            raw_capacity=kept + turn,
            overflow="evict",
        )


def rivals(*, comp_tokens: int, sink: bool, capacity: int, window: int) -> list[Rival]:
    """Full context and what bounds it.

    Args:
      comp_tokens: of a chunk.
      sink: whether the memories and the window keep the session's first token.
      capacity: memory slots of the concatenated memory that forgets its oldest.
      window: newest text tokens that the window keeps.
    """
    capacity = max(capacity, comp_tokens)
    concat = build("ccm_concat", comp_tokens=comp_tokens, sink=sink)
    slots = f"{comp_tokens} slot{'s' * (comp_tokens != 1)}"
    return [
        Rival("full", build("full"), "all text", text=None),
        Rival("window", build("window", size=window, sink=sink), f"the newest {window} tokens of text", text=window),
        Rival("concat", concat, f"{slots} a turn, all kept", memory=None),
        Rival("concat, evicting", concat, f"{slots} a turn, the newest {capacity} slots", memory=capacity),
        Rival("merge", build("ccm_merge", comp_tokens=comp_tokens, sink=sink), f"{slots} in all", memory=comp_tokens),
    ]


def slots_after(method: Method, turns: int, turn: int, capacity: int) -> Slots:
    """The live slots of a session after closed turns of equal length, numpy ``int32 [S]`` each, in order.

    Args:
      method: the compression method.
      turns: closed turns.
      turn: tokens of each.
      capacity: memory slots that there is room for; the oldest are gone.
    """
    place = np.arange(turns * turn)
    kind = np.where(place < method.sink, int(Kind.SINK), int(Kind.TEXT))
    parts = [Slots(kind, place // turn, place, place)]
    begin = np.arange(turns) * turn
    for token in method.closes:
        if token.kind in method.writes:
            position = (begin if token.from_begin else begin + turn) + token.offset
            written = np.full(turns, int(Kind.MEMORY))
            parts.append(Slots(written, np.arange(turns), begin + turn - 1, np.maximum(position, 0)))
    join = lambda *arrays: np.concatenate(arrays).astype(np.int32)
    found = jax.tree.map(join, *parts)
    rows = found.map(lambda x: x[None])
    kept = reachable(method.rule, rows, np.array([turns]), np.array([turns * turn]))[0]
    order = np.argsort(found.index, kind="stable")
    found = found.map(lambda x: x[order][kept[order]])
    is_memory = found.kind == Kind.MEMORY
    old = is_memory & (np.cumsum(is_memory) <= is_memory.sum() - capacity)
    return found.map(lambda x: x[~old])


def fill(cache: MemoryCache, method: Method, *, turns: int, turn: int) -> MemoryCache:
    """The cache as ``turns`` closed turns leave it, except the numbers in its keys and values, which stay."""
    live = slots_after(method, turns, turn, cache.memory_capacity)
    batch, size = cache.slots.kind.shape
    whole = lambda x, *shape: jax.device_put(np.broadcast_to(np.asarray(x, np.int32), (batch, *shape)))
    return dataclasses.replace(
        cache,
        slots=live.map(lambda x: whole(np.pad(x, (0, size - len(x))), size)),
        tokens=whole(turns * turn),
        chunks=whole(turns),
        lost=whole(0),
    )


# What a turn consists of. The cache is donated, as in a server that owns it.


@functools.partial(jax.jit, static_argnames="method", donate_argnames="cache")
def ask(model: Transformer, cache: MemoryCache, prompt: Chunk, *, method: Method):
    """Reads the question; returns the cache and the first token of the answer, ``int32 [B]``."""
    cache, _ = steps.read(model, cache, prompt, method=method, query=True)
    return cache, jnp.argmax(cache.logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("method", "length"), donate_argnames="cache")
def answer(model: Transformer, cache: MemoryCache, token, *, length: int, method: Method):
    """Reads ``length`` tokens one by one, each the most likely one after those before."""

    def step(carry, _):
        cache, token = carry
        piece = Chunk(token[:, None], jnp.ones((token.shape[0], 1), bool))
        cache, _ = steps.read(model, cache, piece, method=method, query=True)
        return (cache, jnp.argmax(cache.logits, axis=-1).astype(jnp.int32)), None

    return jax.lax.scan(step, (cache, token), length=length)[0]


close = jax.jit(steps.compress, static_argnames="method", donate_argnames="cache")


class Conversation:
    """One session of a rival, set back to the same number of turns before each turn that is run."""

    def __init__(
        self,
        model: Transformer,
        apart: Callable[[], Transformer],
        rival: Rival,
        *,
        turns: int,
        prompt: int,
        reply: int,
    ):
        """Makes the session and warms it up.

        Args:
          model: the decoder.
          apart: gives it with its layers apart, which make tokens where that pays.
          rival: how the conversation is kept.
          turns: closed turns before the one that is run.
          prompt: tokens of a question.
          reply: tokens of an answer.
        """
        self.model, self.rival, self.turns, self.reply = model, rival, turns, reply
        self.turn = prompt + reply
        cache = rival.cache(model, 1, turns=turns, turn=self.turn)
        self.cache = cache
        self.decoder = apart() if pays_apart(model, cache) else model
        self.prompt = Chunk(np.ones((1, prompt), np.int32), np.ones((1, prompt), bool))
        self.bytes = cache.nbytes
        self.slots = len(slots_after(rival.method, turns, self.turn, cache.memory_capacity).kind)
        start = time.perf_counter()
        self.run()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> dict[str, Sample]:
        """Runs a turn.

        Returns:
          What "first token", "token" (each further one) and "close" took.
        """
        method = self.rival.method
        cache = fill(self.cache, method, turns=self.turns, turn=self.turn)
        jax.block_until_ready(cache)
        first, (cache, token) = timed(lambda: ask(self.model, cache, self.prompt, method=method))
        rest, (cache, _) = timed(lambda: answer(self.decoder, cache, token, length=self.reply, method=method))
        closing = Sample(0.0, 0.0)
        if self.rival.text is not None or method.closes:
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


def matrix_product(dtype: Any) -> tuple[Callable[[], Any], float]:
    """Square matrix products, one after the other, and their FLOPs: long enough to last as long as what is compared."""
    size, times = (1024, 8) if jax.default_backend() == "cpu" else (8192, 8)
    a = jnp.full((size, size), 1 / size, dtype)
    call = jax.jit(lambda a: functools.reduce(jnp.matmul, [a] * (times + 1)))
    return lambda: call(a), times * 2.0 * size**3


def reading() -> tuple[Callable[[], Any], float]:
    """Reading 256 MiB four times, and these bytes: a matrix by a vector, the fastest way to read that there is here.

    Next to nothing is written: memory that is new would cost more than to read.
    """
    size, times = 2**13, 4
    x, v = jnp.full((size, size), 1 / size, jnp.float32), jnp.ones((size,), jnp.float32)
    call = jax.jit(lambda x, v: functools.reduce(lambda v, _: x @ v, range(times), v))
    return lambda: call(x, v), float(times * x.nbytes)


def linear_parameters(config: ModelConfig) -> int:
    """Weights of all projections of the layers: each costs two FLOPs a token."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def forward_flops(config: ModelConfig, tokens: int, pairs: int, scored: int) -> float:
    """FLOPs that a forward pass needs; recomputation and hidden pairs are not counted.

    Args:
      config: the decoder.
      tokens: that pass through the layers.
      pairs: of a query and a key that it sees.
      scored: tokens whose logits are computed.
    """
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2.0 * linear_parameters(config) * tokens + attention + 2.0 * config.vocab_size * config.hidden_size * scored


# Memory.


def weights_bytes(model: Transformer) -> int:
    """Bytes of base and adapter."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))


def compiled_bytes(compiled: Any) -> int:
    """What a compiled program holds at its peak: arguments, results and temporaries, aliases counted once."""
    sizes = compiled.memory_analysis()
    whole = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return whole - sizes.alias_size_in_bytes


def most_sessions(model: Transformer, rival: Rival, budget: int, *, turns: int, turn: int, prompt: int) -> dict:
    """The largest batch of sessions whose question can be read within so many bytes, as compiled (nothing is run).

    Args:
      model: the decoder.
      rival: how the conversations are kept.
      budget: bytes for weights, sessions and temporaries together.
      turns: closed turns of each session.
      turn: tokens of each.
      prompt: tokens of the question.

    Returns:
      ``sessions``; the ``bytes`` that this many need; ``bytes_per_session`` at the margin.
    """

    def needed(batch: int) -> int:
        cache = jax.eval_shape(lambda: rival.cache(model, batch, turns=turns, turn=turn))
        shape = lambda dtype: jax.ShapeDtypeStruct((batch, prompt), dtype)
        lowered = ask.lower(model, cache, Chunk(shape(jnp.int32), shape(bool)), method=rival.method)
        return compiled_bytes(lowered.compile())

    # Bytes are nearly linear in the batch: a line through two sizes leads to a third, which is then looked at itself.
    sizes = {batch: needed(batch) for batch in (1, 5)}
    slope = (sizes[5] - sizes[1]) / 4
    for _ in range(4):
        fits, over = ([b for b, size in sizes.items() if (size <= budget) == side] for side in (True, False))
        if not fits:
            break
        low = max(fits)
        if over:
            slope = (sizes[min(over)] - sizes[low]) / (min(over) - low)
        guess = int(low + (budget - sizes[low]) / slope)
        if guess in sizes:
            break
        sizes[guess] = needed(guess)
    best = max((batch for batch, size in sizes.items() if size <= budget), default=0)
    return {"sessions": best, "bytes": sizes.get(best, sizes[1]), "bytes_per_session": round(slope)}
