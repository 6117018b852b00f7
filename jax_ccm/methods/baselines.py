"""What compression is compared with: all of the context, none of it, or the newest of it."""

from __future__ import annotations

from jax_ccm.errors import UserError
from jax_ccm.types import INF, Kind, Method, Rule, see

RAW = (Kind.TEXT, Kind.QUERY)
EVERY = (Kind.TEXT, Kind.QUERY, Kind.SINK)


def full() -> Method:
    """Full context: all text sees all earlier text. Its LoRA acts on every token (the paper's stage 1)."""
    return Method(name="full", rule=Rule((see(RAW, RAW, 0, INF),)), gate=RAW)


def none() -> Method:
    """No context: the tail alone, after the start tokens."""
    return Method(name="none", rule=Rule((see(RAW, RAW, 0, 0),)), gate=RAW, context="dropped")


def window(size: int, sink: bool = False, streaming: bool = False) -> Method:
    """The newest ``size`` text tokens, and the first one if ``sink``.

    Args:
      size: tokens that a token sees, itself included.
      sink: keep the first token of the session visible to all (StreamingLLM, Xiao et al. 2023).
      streaming: positions are places in the cache, as in StreamingLLM; recurrent only.
    """
    if size < 1:
        raise UserError(f"window size is {size}; it must be at least 1 token")
    clauses = (see(RAW, RAW, 0, INF),) + ((see(EVERY, Kind.SINK, 0, INF),) if sink else ())
    rope = "cache" if streaming else "running"
    return Method(name="window", rule=Rule(clauses, window=size), gate=EVERY if sink else RAW, sink=sink, rope=rope)


def streaming_llm() -> Method:
    """The first token and the newest text, dropped in chunks as a compressing stream would close them.

    The baseline of CCM's streaming experiments, after StreamingLLM (Xiao et al. 2023): positions are places in the
    cache. `steps.stream_step` decides how much is dropped, so that sizes can equal those of a compressed stream.
    """
    clauses = (see(RAW, RAW, 0, 0), see(EVERY, Kind.SINK, 0, INF))
    return Method(name="streaming_llm", rule=Rule(clauses), gate=EVERY, sink=True, rope="cache")
