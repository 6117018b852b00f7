"""Compressive Transformer (Rae et al., ICLR 2020, arXiv 1911.05507) by mean pooling, on a pretrained decoder.

Text sees its own segment and ``recent`` earlier ones as they are; older ones through their mean keys and values, one
slot for every c tokens. Nothing is run to write them. With c = 2, ``recent`` = 1, chunks ``a b c``, ``d``, and the tail
``e`` (own tokens left, memory right; both slots are of the first chunk, the second of its rest)::

          a b c d e | M1 M1     position
    a     x . . . . | .  .      0
    b     x x . . . | .  .      1
    c     x x x . . | .  .      2
    d     x x x x . | .  .      3
    e     . . . x x | x  x      4
"""

from __future__ import annotations

from jax_ccm.errors import UserError
from jax_ccm.rules.clauses import see
from jax_ccm.rules.types import INF, Kind, Method, Rule

TEXT, QUERY, SINK, MEMORY = Kind.TEXT, Kind.QUERY, Kind.SINK, Kind.MEMORY
EVERY = (TEXT, QUERY, SINK)


def compressive(ratio: int = 4, recent: int = 1, segment: int | None = None, sink: bool = False) -> Method:
    """Compressive Transformer with mean pooling; its LoRA acts on every token.

    Args:
      ratio: c, text tokens for each memory token.
      recent: closed chunks that stay as they are, next to the open one; 0 pools a chunk as soon as it is closed, as
        CCM's comparison does.
      segment: cut text into segments of just this many tokens, as the paper does; None takes the chunks of the data.
      sink: keep the first token of the session visible to all.
    """
    if ratio < 1:
        raise UserError(f"ratio is {ratio}; it must be at least 1")
    if recent < 0:
        raise UserError(f"recent is {recent}; it must be at least 0, the number of closed chunks that stay as they are")
    if segment is not None and (segment < 1 or segment % ratio):
        raise UserError(
            f"segment is {segment}; it must be a multiple of ratio={ratio}, so that it pools without a rest"
        )
    # Text is seen as it is up to `recent` segments back, and from there on through its means.
    clauses = [see((TEXT, QUERY), (TEXT, QUERY), 0, recent), see((TEXT, QUERY), MEMORY, recent + 1, INF)]
    if sink:
        clauses.append(see(EVERY, SINK, 0, INF))
    return Method(
        name="compressive",
        rule=Rule(tuple(clauses)),
        pool=ratio,
        gate=EVERY,
        sink=sink,
        chunk=segment,
    )
