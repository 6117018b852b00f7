"""Tiny models, sessions and the table of methods that the common tests run."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from jax_ccm import memory, steps
from jax_ccm.layout import Example, Segment, Sizes, arrange, batch, measure
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer
from jax_ccm.types import Chunk, Method

VOCAB = 97
CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)

# Every method of the library that has a parallel form, with the options that change its computation.
METHODS: dict[str, Method] = {
    "full": build("full"),
    "none": build("none"),
    "window": build("window", size=9),
    "window_sink": build("window", size=9, sink=True),
    "gist_n2": build("gist", comp_tokens=2),
    "gist_n1_sink": build("gist", comp_tokens=1, sink=True),
    **{
        f"{name}_{label}": build(f"ccm_{name}", **options)
        for name in ("concat", "merge", "ema")
        for label, options in {
            "n1": dict(comp_tokens=1),
            "n2_sink": dict(comp_tokens=2, sink=True),
            "n3_independent": dict(comp_tokens=3, independent=True),
            "n2_independent_sink": dict(comp_tokens=2, independent=True, sink=True),
            "n2_all": dict(comp_tokens=2, conditional=False),
        }.items()
    },
}


def model(tokens: int = 0, seed: int = 0, config: ModelConfig = CONFIG, rank: int = 4, **changes) -> Transformer:
    """A random model whose LoRA B is not zero: a zero B hides every mistake of the gate."""
    config = dataclasses.replace(config, **changes)
    made = Transformer(jax.random.key(seed), config, AdapterConfig(rank=rank, tokens=tokens))
    graphdef, adapter, base = nnx.split(made, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [0.15 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), base)


def sessions(lengths=((5, 3, 7, 4), (2, 6), (4, 1, 3, 3, 2)), seed: int = 0, start: int = 1, separator: int = 2):
    """Ragged sessions: one row of chunk lengths each, the last being the tail; everything scored."""
    rng = np.random.default_rng(seed)
    text = lambda size: rng.integers(10, VOCAB, size).astype(np.int32)
    return [
        Example(
            np.arange(1, 1 + start, dtype=np.int32),
            np.arange(3, 3 + separator, dtype=np.int32),
            tuple(Segment(text(size), np.ones(size, bool)) for size in row),
            f"row {i}",
        )
        for i, row in enumerate(lengths)
    ]


def caps(method: Method, examples, slack: int = 3) -> Sizes:
    """Sizes that hold all examples, with some padding."""
    needs = [measure(method, example) for example in examples]
    return Sizes(
        *(max(getattr(n, f.name) for n in needs) + slack * (f.name != "memory") for f in dataclasses.fields(Sizes))
    )


def parallel(made: Transformer, method: Method, examples, pad: str = "right"):
    """Logits of the parallel forward for each row: a list of ``[text tokens, V]``."""
    made_batch = batch(method, examples, caps(method, examples), VOCAB, pad)
    hidden = jax.jit(steps.parallel_forward, static_argnames="method")(made, made_batch, method=method)
    logits = np.asarray(made.logits(hidden))
    rows = []
    for row, tokens, kind in zip(logits, made_batch.tokens, made_batch.slots.kind, strict=True):
        rows.append(row[(kind != 0) & (tokens < VOCAB)])
    return rows


def chunks_of(method: Method, examples, side: str = "right"):
    """What a recurrence is fed: the context chunks, a list over time of `Chunk`, and the tails, one `Chunk`."""
    rows = [arrange(method, example) for example in examples]
    length = max(len(segment.tokens) for row in rows for segment in row)

    def stack(segments):
        tokens = np.zeros((len(segments), length), np.int32)
        valid = np.zeros((len(segments), length), bool)
        for i, segment in enumerate(segments):
            count = 0 if segment is None else len(segment.tokens)
            place = slice(0, count) if side == "right" else slice(length - count, length)
            if count:
                tokens[i, place], valid[i, place] = segment.tokens, True
        return Chunk(tokens, valid)

    time = max(len(row) for row in rows) - 1
    context = [stack([row[t] if t < len(row) - 1 else None for row in rows]) for t in range(time)]
    return context, stack([row[-1] for row in rows])


def cache_for(method: Method, examples, config: ModelConfig = CONFIG, **options):
    """A cache with just enough room."""
    rows = [arrange(method, example) for example in examples]
    longest = max(len(row) for row in rows) - 1
    text = max(sum(len(s.tokens) for s in row) for row in rows)
    return memory.init_cache(
        config,
        method,
        len(examples),
        memory_capacity=options.pop("memory_capacity", max(method.memory_slots(longest), 1)),
        raw_capacity=options.pop("raw_capacity", text),
        **options,
    )


def recurrent(made: Transformer, method: Method, examples, side: str = "right", cache=None):
    """Logits of the recurrence for each row, as `parallel` gives them; and the final cache."""
    context, tail = chunks_of(method, examples, side)
    cache = cache_for(method, examples, made.config) if cache is None else cache
    read = jax.jit(steps.read, static_argnames=("method", "query"))
    compress = jax.jit(steps.compress, static_argnames="method")
    rows: list[list[np.ndarray]] = [[] for _ in examples]

    def collect(chunk, logits):
        for row, valid, values in zip(rows, chunk.valid, np.asarray(logits), strict=True):
            row.append(values[valid])

    for chunk in context:
        cache, logits = read(made, cache, chunk, method=method, query=False)
        collect(chunk, logits)
        cache = compress(made, cache, chunk.valid.any(1), method=method)
    cache, logits = read(made, cache, tail, method=method, query=True)
    collect(tail, logits)
    memory.check(cache)
    return [np.concatenate(row) for row in rows], cache
