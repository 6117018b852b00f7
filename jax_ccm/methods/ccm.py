"""Compressed Context Memory (Kim et al., ICLR 2024, arXiv 2312.03414), and gisting on the same tokens.

A chunk is followed by n ``<COMP>`` tokens; their keys and values are what later text sees of it. With n = 1, chunks
``a``, ``b`` and the tail ``c`` (own places left, memory right; ``M1`` is written by the first chunk)::

    concat    a C b C c | M1 M2      independent  a C b C c | M1 M2      merge     a C b C c | M1 M2
    a         x . . . . | .  .       a            x . . . . | .  .       a         x . . . . | .  .
    C         x x . . . | .  .       C            x x . . . | .  .       C         x x . . . | .  .
    b         . . x . . | x  .       b            . . x . . | .  .       b         . . x . . | x  .
    C         . . x x . | x  .       C            . . x x . | .  .       C         . . x x . | x  .
    c         . . . . x | x  x       c            . . . . x | x  x       c         . . . . x | .  x

In merge, ``M2`` is a mixture of the states of both chunks.
"""

from __future__ import annotations

from typing import Literal

from jax_ccm.errors import UserError
from jax_ccm.types import INF, Ema, Kind, Mean, Method, Mix, Rule, Token, see

TEXT, QUERY, COMP, REPEAT, SINK, MEMORY = Kind.TEXT, Kind.QUERY, Kind.COMP, Kind.REPEAT, Kind.SINK, Kind.MEMORY
EVERY = (TEXT, QUERY, COMP, SINK)


def _method(
    name: str,
    *,
    comp_tokens: int,
    sink: bool,
    independent: bool,
    conditional: bool,
    farthest: int,
    mix: Mix | None,
    context: Literal["chunks", "joined"] = "chunks",
    streaming: bool = False,
    repeat: bool = False,
    fewest: int | None = None,
) -> Method:
    if comp_tokens < 1:
        raise UserError(f"comp_tokens is {comp_tokens}; a chunk is compressed into at least 1 token")
    if fewest is not None and not 1 <= fewest <= comp_tokens:
        raise UserError(f"fewest is {fewest}; it must lie between 1 and comp_tokens={comp_tokens}")
    readers = (QUERY,) if independent else (TEXT, QUERY, COMP)
    clauses = [
        see((TEXT, QUERY, COMP), (TEXT, QUERY), 0, 0),
        see(COMP, COMP, 0, 0),
        see(readers, MEMORY, 1, farthest),
    ]
    if sink:
        clauses.append(see(EVERY, SINK, 0, INF))
    gate = (COMP,) if conditional else EVERY
    if repeat:
        # A chunk's repetition sees the memory just after that chunk, and each token itself.
        clauses += [see(REPEAT, MEMORY, 0, 0), see(REPEAT, REPEAT, 0, 0, window=1)]
        gate += (REPEAT,)
    return Method(
        name=name,
        rule=Rule(tuple(clauses)),
        # Compression tokens are not counted: they share positions with the text that follows.
        closes=tuple(Token(COMP, row=k, offset=k) for k in range(comp_tokens)),
        mix=mix,
        gate=gate,
        sink=sink,
        context=context,
        rope="cache" if streaming else "running",
        repeat=Token(REPEAT, row=comp_tokens) if repeat else None,
        fewest=fewest,
    )


def concat(
    comp_tokens: int = 1,
    sink: bool = False,
    independent: bool = False,
    conditional: bool = True,
    streaming: bool = False,
    repeat: bool = False,
    fewest: int | None = None,
) -> Method:
    """CCM-concat: memory grows by ``comp_tokens`` slots a chunk (section 3.1).

    Args:
      comp_tokens: n, compression tokens after each chunk.
      sink: keep the first token of the session visible to all.
      independent: chunks do not see earlier memory, only the tail does (the reference's mode for MetaICL and LaMP).
      conditional: the LoRA acts on compression tokens only; False is the paper's ablation (table 21).
      streaming: keys are stored unrotated and take their place in the cache as position (section 4.3);
        recurrent only.
      repeat: in training, each chunk must also be said again, token by token, from the memory just after it: LoMA's
        repetition loss; in no paper.
      fewest: in training, each session is compressed into a random number of tokens a chunk, from this to
        ``comp_tokens``: one adapter then serves every such ``comp_tokens``; in no paper.
    """
    return _method(
        "ccm_concat",
        comp_tokens=comp_tokens,
        sink=sink,
        independent=independent,
        conditional=conditional,
        farthest=INF,
        mix=None,
        streaming=streaming,
        repeat=repeat,
        fewest=fewest,
    )


def merge(
    comp_tokens: int = 1,
    sink: bool = False,
    independent: bool = False,
    conditional: bool = True,
    streaming: bool = False,
    repeat: bool = False,
    fewest: int | None = None,
) -> Method:
    """CCM-merge: the running mean of all chunks' states in ``comp_tokens`` slots. Arguments as for `concat`."""
    return _method(
        "ccm_merge",
        comp_tokens=comp_tokens,
        sink=sink,
        independent=independent,
        conditional=conditional,
        farthest=1,
        mix=Mean(),
        streaming=streaming,
        repeat=repeat,
        fewest=fewest,
    )


def ema(
    comp_tokens: int = 1,
    sink: bool = False,
    independent: bool = False,
    conditional: bool = True,
    decay: float = 0.5,
    streaming: bool = False,
    repeat: bool = False,
    fewest: int | None = None,
) -> Method:
    """CCM-merge by an exponential moving average (table 16).

    Args:
      comp_tokens, sink, independent, conditional, streaming, repeat, fewest: as for `concat`.
      decay: weight of the newest chunk.
    """
    return _method(
        "ccm_ema",
        comp_tokens=comp_tokens,
        sink=sink,
        independent=independent,
        conditional=conditional,
        farthest=1,
        mix=Ema(decay),
        streaming=streaming,
        repeat=repeat,
        fewest=fewest,
    )


def gist(comp_tokens: int = 1, sink: bool = False, conditional: bool = True) -> Method:
    """Gisting (Mu et al. 2023): the whole context is one chunk, compressed once. Arguments as `concat`."""
    return _method(
        "gist",
        comp_tokens=comp_tokens,
        sink=sink,
        independent=False,
        conditional=conditional,
        farthest=1,
        mix=None,
        context="joined",
    )
