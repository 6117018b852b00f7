"""Tiny models, sessions and the table of methods that the common tests run."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer
from jax_ccm.nn.config import PROJECTIONS
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Method

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

# What an adapter may change: the usual projections, and all of them.
ATTENTION, ALL = AdapterConfig().targets, tuple(PROJECTIONS)

# Each mixture with one slot, several, a sink (EMA: n2_repeat), and chunks that are and are not independent of
# each other; each setting with one mixture or more. All three get rule and gate from one function.
CCM = {
    "n1": dict(comp_tokens=1),
    "n2_sink": dict(comp_tokens=2, sink=True),
    "n3_independent": dict(comp_tokens=3, independent=True),
    "n2_independent_sink": dict(comp_tokens=2, independent=True, sink=True),
    "n2_all": dict(comp_tokens=2, conditional=False),
    "n2_repeat": dict(comp_tokens=2, sink=True, repeat=True),
    "n2_say": dict(comp_tokens=2, sink=True, repeat=True, repeat_by="text", repeat_gated=False),
    "n2_recent": dict(comp_tokens=2, sink=True, recent=1),
    "n1_recent2": dict(comp_tokens=1, recent=2),
    # Fewer mixtures than chunks.
    "n2_groups_sink": dict(comp_tokens=2, sink=True, groups=2),
    "n1_groups_recent": dict(comp_tokens=1, recent=1, groups=2),
    # Chunks of 1 to 7 tokens have one, two and three slots.
    "n3_ratio": dict(comp_tokens=3, sink=True, ratio=2),
    # The same, each where its share of the text ends, and blind to what follows.
    "n3_stride": dict(comp_tokens=3, ratio=2, positions="stride", sight="share"),
    # The same, each begun as the mean of its share; and of a whole chunk, whose text stays for a while.
    "n3_start": dict(comp_tokens=3, ratio=2, positions="stride", sight="share", start="mean", sink=True),
    "n2_start": dict(comp_tokens=2, start="mean"),
    "n2_start_recent": dict(comp_tokens=2, start="mean", recent=1),
}

# Every method of the library that has a parallel form, with the options that change its computation.
METHODS: dict[str, Method] = {
    "full": build("full"),
    "none": build("none"),
    "window": build("window", size=9),
    "window_sink": build("window", size=9, sink=True),
    "window_sinks": build("window", size=6, sink=True, sinks=4),
    "gist_n2": build("gist", comp_tokens=2),
    "gist_n1_sink": build("gist", comp_tokens=1, sink=True),
    "gist_online": build("gist", comp_tokens=2, online=True),
    "compressive": build("compressive", ratio=2),
    "compressive_now_sink": build("compressive", ratio=3, recent=0, sink=True),
    "compressive_segments": build("compressive", ratio=2, recent=2, segment=2),
    **{
        f"{name}_{label}": build(f"ccm_{name}", **CCM[label])
        for name, labels in {
            "concat": (
                "n1",
                "n2_sink",
                "n3_independent",
                "n2_all",
                "n2_repeat",
                "n2_say",
                "n2_recent",
                "n1_recent2",
                "n3_ratio",
                "n3_stride",
                "n3_start",
                "n2_start_recent",
            ),
            "merge": ("n1", "n2_sink", "n2_independent_sink", "n2_repeat", "n2_recent", "n2_groups_sink", "n2_start"),
            "ema": ("n1", "n3_independent", "n2_all", "n2_repeat", "n1_recent2", "n1_groups_recent"),
        }.items()
        for label in labels
    },
    "loma": build("loma", ratio=2, memory_tokens=2),
    "loma_causal_sink": build("loma", ratio=3, memory_tokens=1, bidirectional=False, sink=True, scope="last"),
    "loma_plain": build("loma", ratio=2, memory_tokens=2, history=False, positions="sequential", conditional=True),
    "loma_say": build("loma", ratio=2, memory_tokens=2, repeat_by="text", conditional=True),
    "loma_mean": build("loma", ratio=2, memory_tokens=2, memory="mean"),
    "loma_start": build("loma", ratio=2, memory_tokens=2, start="mean"),
    "loma_ema_sink": build("loma", ratio=2, memory_tokens=2, memory="ema", decay=0.3, sink=True, conditional=True),
    "sentinel": build("sentinel"),
    "sentinel_history": build("sentinel", history=True, opener=False, conditional=True),
    "sentinel_start": build("sentinel", start="mean"),
    "local": build("local", hidden=0.3),
    "scattered": build("scattered"),
}

# Those that have none: indices in the cache as positions, and selections.
RECURRENT: dict[str, Method] = {
    "streaming_llm": build("streaming_llm", sinks=2),
    "window_streaming": build("window", size=6, sink=True, sinks=2, streaming=True),
    "concat_streaming": build("ccm_concat", comp_tokens=2, sink=True, streaming=True),
    "evict": build("evict", slots=4),
    "evict_streaming": build("evict", slots=4, constant=True, streaming=True),
    "evict_norm_constant": build("evict", score="norm", slots=3, constant=True, sink=False),
}

# One of each name in `jax_ccm.methods.METHODS`, for what every method must hold.
EACH = (
    "full", "none", "window_sinks", "gist_n2", "concat_n2_sink", "merge_n2_sink", "ema_n2_all", "compressive", "loma",
    "sentinel", "local", "scattered",
)  # fmt: skip


def model(
    tokens: int = 0,
    seed: int = 0,
    config: ModelConfig = CONFIG,
    rank: int = 4,
    targets=ATTENTION,
    precision: str = "float32",
    **changes,
) -> Transformer:
    """A random model whose LoRA B is not zero: a zero B hides every mistake of the gate."""
    config = dataclasses.replace(config, **changes)
    adapter = AdapterConfig(rank=rank, tokens=tokens, targets=targets)
    made = Transformer(jax.random.key(seed), config, adapter, precision)
    graphdef, adapter, base = nnx.split(made, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [0.15 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), base)


def sessions_for(method: Method, **options) -> list[Example]:
    """`sessions`, some of whose context is kept, for methods that keep text: the first tokens of each second chunk,
    so that a span closes every chunk; at random where nothing is closed."""
    rng = np.random.default_rng(1)

    def marked(number: int, segment: Segment) -> Segment:
        count = len(segment.tokens)
        kept = rng.random(count) < 0.5 if not method.closes else np.arange(count) < (number + 1) % 2 * (count - 1)
        return dataclasses.replace(segment, kept=kept)

    if not method.keeps_text:
        return sessions(**options)
    mark = lambda segments: (*(marked(i, s) for i, s in enumerate(segments[:-1])), segments[-1])
    return [dataclasses.replace(e, segments=mark(e.segments)) for e in sessions(**options)]


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
