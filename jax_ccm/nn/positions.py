"""Sessions that go further than the base model was trained for."""

from __future__ import annotations

import warnings

from jax_ccm.nn.config import ModelConfig
from jax_ccm.rules.types import Method

_told: set[ModelConfig] = set()


def warn_beyond(config: ModelConfig, method: Method, *, tokens: int, slots: int = 0, forgets: bool = False) -> None:
    """Warns, once for a model, of positions that it was not trained for (`ModelConfig.positions`).

    Args:
      config: the base model.
      method: says what a position is: how many text tokens were read before, or the index in the cache.
      tokens: text tokens of the longest session.
      slots: of a session in the cache, memory and raw text together.
      forgets: whether sessions forget their oldest, and are moved back before positions run out (`memory.rebasing`).
    """
    most = config.positions
    in_cache = method.rope == "cache" or forgets
    reach = slots if in_cache else tokens
    if reach <= most or config in _told:
        return
    _told.add(config)
    if in_cache:
        what = f"a cache of {slots:,} slots"
        advice = "make cache.memory_capacity + cache.raw_capacity smaller, or take a base of longer context"
    else:
        what = f"a session of {tokens:,} tokens"
        advice = (
            "let memory forget its oldest (cache.memory_capacity with cache.overflow: evict), set method.streaming: "
            "true (where the method has it), which counts indices in the cache and not the tokens read, or take a "
            "base of longer context"
        )
    warnings.warn(
        f"{what} goes beyond the {most:,} positions that the base model was trained for; what it says there may be "
        f"poor. To avoid that {advice}",
        stacklevel=3,
    )
