"""What compression is compared with: all of the context, none of it, or the newest of it."""

from __future__ import annotations

from jax_ccm.errors import UserError
from jax_ccm.rules.clauses import see
from jax_ccm.rules.types import INF, Kind, Method, Rule

RAW = (Kind.TEXT, Kind.QUERY)
EVERY = (Kind.TEXT, Kind.QUERY, Kind.SINK)


def full() -> Method:
    """Full context: all text sees all earlier text. Its LoRA acts on every token (the paper's stage 1)."""
    return Method(name="full", rule=Rule((see(RAW, RAW, 0, INF),)), gate=RAW)


def none() -> Method:
    """No context: the tail alone, after the start tokens."""
    return Method(name="none", rule=Rule((see(RAW, RAW, 0, 0),)), gate=RAW, context="dropped")


def window(size: int, sink: bool = False, streaming: bool = False, sinks: int = 1) -> Method:
    """The newest ``size`` text tokens, and the first ones if ``sink``.

    Args:
      size: tokens that a token sees, itself included.
      sink: keep the first token of the session visible to all (StreamingLLM, Xiao et al. 2023).
      streaming: positions are indices in the cache, as in StreamingLLM; recurrent only.
      sinks: how many first tokens a sink keeps (StreamingLLM's own choice is 4).
    """
    if size < 1:
        raise UserError(f"window size is {size}; it must be at least 1 token")
    if not sink and sinks != 1:
        raise UserError(f"sinks is {sinks}, but sink is false and none is kept; set sink: true, or leave sinks out")
    sinks = _sinks(sinks) if sink else 0
    if size < sinks:
        raise UserError(f"window size is {size}, smaller than the sinks={sinks} beside it; raise size or lower sinks")
    # A clause of its own for the sinks: the window does not hold for them.
    clauses = (see(RAW, RAW, 0, INF, window=size),) + ((see(EVERY, Kind.SINK, 0, INF),) if sink else ())
    rope = "cache" if streaming else "running"
    return Method(name="window", rule=Rule(clauses), gate=EVERY if sink else RAW, sink=sinks, rope=rope)


def local(hidden: float) -> Method:
    """Local attention of the Sentinel paper: the oldest ``hidden`` of what stands before a token is hidden from it.

    The window is proportional, not of fixed width: token j sees k from ``floor(j * hidden)`` on.

    Args:
      hidden: share of earlier text, oldest first, that is not seen; in (0, 1), to three decimal places.
    """
    # As integers: float arithmetic puts the edge of the window one off at some places.
    thousandths = round(hidden * 1000)
    if not 0 < hidden < 1:
        raise UserError(f"hidden is {hidden}; it must lie in (0, 1): it is the share of earlier text that is not seen")
    if abs(hidden * 1000 - thousandths) > 1e-6 or not 0 < thousandths < 1000:
        raise UserError(f"hidden is {hidden}; its window is exact for at most three decimal places, such as 0.125")
    return Method(name="local", rule=Rule((see(RAW, RAW, 0, INF, hidden=(thousandths, 1000)),)), gate=RAW)


def scattered() -> Method:
    """Scattered attention of the Sentinel paper: a token sees itself and, of what stands before it, what the data keep.

    Which tokens are kept is drawn once for a text (``data.hide: tokens``), the same for all queries, layers and heads.
    """
    # QUERY is what the data keep; everything else sees itself alone, by a window of 1.
    clauses = (see(RAW, Kind.QUERY, 0, INF), see(Kind.TEXT, Kind.TEXT, 0, 0, window=1))
    return Method(name="scattered", rule=Rule(clauses), gate=RAW)


def streaming_llm(sinks: int = 1) -> Method:
    """The first tokens and the newest text, dropped in chunks as a compressing stream would close them.

    The baseline of CCM's streaming experiments, after StreamingLLM (Xiao et al. 2023): positions are places in the
    cache. `steps.stream_step` decides how much is dropped, so that sizes can equal those of a compressed stream.

    Args:
      sinks: how many first tokens stay; 0 for the newest text alone.
    """
    if sinks < 0:
        raise UserError(f"sinks is {sinks}; it must be at least 0 tokens")
    # Closed text is out of sight: `steps.stream_step` closes the oldest in place of writing a memory of it.
    clauses = (see(RAW, RAW, 0, 0),) + ((see(EVERY, Kind.SINK, 0, INF),) if sinks else ())
    gate = EVERY if sinks else RAW
    return Method(name="streaming_llm", rule=Rule(clauses), gate=gate, sink=sinks, rope="cache")


def _sinks(number: int) -> int:
    if number < 1:
        raise UserError(f"sinks is {number}; it must be at least 1 token")
    return number
