"""Sentinel tokens (Ren, Jia and Zhu, EMNLP 2023): spans of text give way to the state of one token behind them.

A span stands between ``<CL>`` (``[``) and ``<CR>`` (``]``); text outside spans is kept for good. Both tokens are run
when the span closes: nothing but its own ``<CR>`` ever sees ``<CL>``. For ``a``, the span ``b c`` and the tail ``d``
(own tokens left, memory right)::

          a b c [ ] d | M     position
    a     x . . . . . | .     0
    b     x x . . . . | .     1
    c     x x x . . . | .     2
    [     . . . x . . | .     0
    ]     . x x x x . | .     2
    d     x . . . . x | x     3
"""

from __future__ import annotations

from typing import Literal

from jax_ccm.methods.ccm import text_to_start_from
from jax_ccm.rules.clauses import see
from jax_ccm.rules.types import INF, Kind, Method, Rule, Token

TEXT, QUERY, COMP, OPEN, MEMORY = Kind.TEXT, Kind.QUERY, Kind.COMP, Kind.OPEN, Kind.MEMORY


def sentinel(
    history: bool = False,
    opener: bool = True,
    conditional: bool = False,
    start: Literal["learned", "mean"] = "learned",
) -> Method:
    """Sentinel compression. Text of kind QUERY is outside spans, text of kind TEXT inside.

    Args:
      history: ``<CR>`` also sees what its span sees, kept text and earlier memory; the paper's does not.
      opener: run ``<CL>``.
      conditional: the LoRA acts on the sentinels only, as in CCM; in no paper.
      start: ``<CR>`` starts from its "learned" embedding alone, or from that and the "mean" embedding of its span; the
        latter in no paper.
    """
    clauses = [
        # Kept text is seen for good, by all text.
        see((TEXT, QUERY), QUERY, 0, INF),
        # The pairs of closed spans; of the own one, still open, there is none.
        see((TEXT, QUERY), MEMORY, 1, INF),
        # A span's text is seen within the span alone: by its own later text, and by its <CR>.
        see((TEXT, COMP), TEXT, 0, 0),
        see(COMP, (OPEN, COMP), 0, 0),
        # <CL> sees only itself: its values, and its keys before rotation, are a constant of each layer for <CR>.
        see(OPEN, OPEN, 0, 0),
    ]
    if history:
        clauses += [see(COMP, QUERY, 0, INF), see(COMP, MEMORY, 1, INF)]
    # Sentinels are not counted: <CR> shares the position of the last token of the span, <CL> of the one before it.
    closes = ((Token(OPEN, embedding_index=1, offset=-1, from_begin=True),) if opener else ()) + (
        Token(COMP, embedding_index=0, offset=-1),
    )
    # The released code's LoRA acts on every token.
    gate = (OPEN, COMP) if conditional else (TEXT, QUERY, OPEN, COMP)
    return Method(
        name="sentinel",
        rule=Rule(tuple(clauses)),
        closes=closes,
        starts_from=text_to_start_from(start, text=(TEXT,)),
        gate=gate,
    )
