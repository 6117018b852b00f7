"""Compressed Context Memory (Kim et al., ICLR 2024, arXiv 2312.03414), and gisting on the same tokens.

A chunk is followed by n ``<COMP>`` tokens; their keys and values are what later text sees of it. With n = 1, chunks
``a``, ``b`` and the tail ``c`` (own tokens left, memory right; ``M1`` is written by the first chunk)::

    concat    a C b C c | M1 M2      independent  a C b C c | M1 M2      merge     a C b C c | M1 M2
    a         x . . . . | .  .       a            x . . . . | .  .       a         x . . . . | .  .
    C         x x . . . | .  .       C            x x . . . | .  .       C         x x . . . | .  .
    b         . . x . . | x  .       b            . . x . . | .  .       b         . . x . . | x  .
    C         . . x x . | x  .       C            . . x x . | .  .       C         . . x x . | x  .
    c         . . . . x | x  x       c            . . . . x | x  x       c         . . . . x | .  x

In merge, ``M2`` is a mixture of the states of both chunks.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax_ccm.errors import UserError
from jax_ccm.rules.clauses import see
from jax_ccm.rules.mixtures import Ema, Mean, Mix
from jax_ccm.rules.types import INF, Clause, Kind, Method, Rule, Token

TEXT, QUERY, COMP, REPEAT, SINK, MEMORY = Kind.TEXT, Kind.QUERY, Kind.COMP, Kind.REPEAT, Kind.SINK, Kind.MEMORY
EVERY = (TEXT, QUERY, COMP, SINK)


def concat(
    comp_tokens: int = 1,
    sink: bool = False,
    independent: bool = False,
    conditional: bool = True,
    streaming: bool = False,
    repeat: bool = False,
    repeat_by: Literal["placeholders", "text"] = "placeholders",
    repeat_share: float = 1.0,
    repeat_gated: bool = True,
    min_comp_tokens: int | None = None,
    recent: int = 0,
    ratio: int = 0,
    positions: Literal["sequential", "stride"] = "sequential",
    sight: Literal["chunk", "share"] = "chunk",
    start: Literal["learned", "mean"] = "learned",
) -> Method:
    """CCM-concat: memory grows by ``comp_tokens`` slots a chunk (section 3.1).

    Args:
      comp_tokens: n, compression tokens after each chunk.
      sink: keep the first token of the session visible to all.
      independent: chunks do not see earlier memory, only the tail does (the reference's mode for MetaICL and LaMP).
      conditional: the LoRA acts on compression tokens only; False is the paper's ablation (table 21).
      streaming: keys are stored unrotated and take their index in the cache as position (section 4.3);
        recurrent only.
      repeat: in training, each chunk must also be said again, token by token, from the memory just after it: LoMA's
        repetition loss; in no paper.
      repeat_by: each repeated token is guessed from a token of its own in its place, all at once ("placeholders",
        LoMA), or behind the "text" before it, as it is when a chunk is said again token after token.
      repeat_share: share of the training examples of which this is asked.
      repeat_gated: the LoRA acts on repetition, too; False leaves it to the base, so that memory must hold what was
        said in a form that the base reads.
      min_comp_tokens: in training, each session is compressed into a random number of tokens a chunk, from this to
        ``comp_tokens``: one adapter then serves every such ``comp_tokens``; in no paper.
      recent: the last so many closed chunks stay as text, and are compressed when newer ones have taken their place;
        in no paper. An adapter that was trained without serves any number.
      ratio: if not 0, a compression token for every so many text tokens of a chunk, and for the rest, up to
        ``comp_tokens``: long chunks get more slots than short ones; in no paper.
      positions: the k-th compression token stands k places behind the chunk, not counted ("sequential"), or, with
        ``ratio``, at the end of its share of the text, and all are one token ("stride", as LoMA's memory tokens); the
        last stands at the end of a chunk that is longer; in no paper.
      sight: with "stride", it sees the whole "chunk", or only what stands up to the end of its "share".
      start: a compression token starts from its "learned" embedding alone, or from that and the "mean" embedding of
        its share of the text, or of the whole chunk without "stride"; the latter in no paper.
    """
    if ratio < 0:
        raise UserError(
            f"ratio is {ratio}; it must be at least 1 text token a slot, or 0 for comp_tokens slots a chunk"
        )
    if comp_tokens < 1:
        raise UserError(f"comp_tokens is {comp_tokens}; a chunk is compressed into at least 1 token")
    if min_comp_tokens is not None and not 1 <= min_comp_tokens <= comp_tokens:
        raise UserError(f"min_comp_tokens is {min_comp_tokens}; it must lie between 1 and comp_tokens={comp_tokens}")
    if recent < 0 or (recent and (streaming or independent)):
        raise UserError(
            f"recent is {recent}; it must be at least 0, and 0 with independent, whose chunks see no others, and with "
            "streaming, whose text is compressed by its index in the cache"
        )
    stride = _checked_stride(positions, sight, ratio, streaming)
    check_repetition(repeat, repeat_by, repeat_share, repeat_gated)
    # A chunk is read by ordinary causal attention; each compression token sees the ones before it in its group.
    if sight == "chunk":
        clauses = [see((TEXT, QUERY, COMP), (TEXT, QUERY), 0, 0)]
    else:
        clauses = [see((TEXT, QUERY), (TEXT, QUERY), 0, 0), see(COMP, (TEXT, QUERY), 0, 0, behind=True)]
    clauses.append(see(COMP, COMP, 0, 0))
    if recent:
        # Text sees the memory of what it does not see itself.
        clauses += [see((TEXT, QUERY), (TEXT, QUERY), 1, recent), see((TEXT, QUERY), MEMORY, 1 + recent, INF)]
        clauses.append(see(COMP, MEMORY, 1, INF))
    else:
        # In the reference's terms `concat`, whose chunks are blind to memory, and `concat_recur`.
        clauses.append(see((QUERY,) if independent else (TEXT, QUERY, COMP), MEMORY, 1, INF))
    if sink:
        # Without it no chunk but the first sees a beginning-of-sequence token: the reference's --sink.
        clauses.append(see(EVERY, SINK, 0, INF))
    # The conditional LoRA (section 3.2): text is computed by the base as it was.
    gate = (COMP,) if conditional else EVERY
    if repeat:
        # A chunk's repetition sees the memory just after that chunk, and each token itself, or what was said before it.
        window = 1 if repeat_by == "placeholders" else None
        clauses += [see(REPEAT, MEMORY, 0, 0), see(REPEAT, REPEAT, 0, 0, window=window)]
        gate += (REPEAT,) * repeat_gated
    return Method(
        name="ccm_concat",
        rule=Rule(tuple(clauses)),
        # Compression tokens are not counted: they share positions with the text that follows.
        closes=tuple(
            # Alike but for their positions, where these say what they stand for: any number of them is one function.
            Token(COMP, embedding_index=0, offset=ratio * (k + 1) - 1, from_begin=True)
            if stride
            else Token(COMP, embedding_index=k, offset=k)
            for k in range(comp_tokens)
        ),
        starts_from=text_to_start_from(start, share=ratio if stride else None),
        gate=gate,
        sink=sink,
        recent=recent,
        # The reference's streaming class, which rotates keys by their index in the cache at every forward pass.
        rope="cache" if streaming else "running",
        repeat=Token(REPEAT, embedding_index=1 if stride else comp_tokens) if repeat else None,
        repeat_by=repeat_by,
        repeat_share=repeat_share,
        min_comp_tokens=min_comp_tokens,
        ratio=ratio or None,
    )


def _checked_stride(positions: str, sight: str, ratio: int, streaming: bool) -> bool:
    """Whether compression tokens stand at the ends of their shares of the text."""
    one_of("positions", positions, ("sequential", "stride"))
    one_of("sight", sight, ("chunk", "share"))
    if positions == "stride" and (not ratio or streaming):
        raise UserError(
            "positions is 'stride', which needs a ratio that says how long the share of a token is, and no streaming, "
            "where positions are indices in the cache"
        )
    if sight == "share" and positions != "stride":
        raise UserError("sight is 'share', but only tokens at positions 'stride' have one; set positions: stride")
    return positions == "stride"


def merge(
    comp_tokens: int = 1,
    sink: bool = False,
    independent: bool = False,
    conditional: bool = True,
    streaming: bool = False,
    repeat: bool = False,
    repeat_by: Literal["placeholders", "text"] = "placeholders",
    repeat_share: float = 1.0,
    repeat_gated: bool = True,
    min_comp_tokens: int | None = None,
    recent: int = 0,
    groups: int = 1,
    start: Literal["learned", "mean"] = "learned",
) -> Method:
    """CCM-merge: the running mean of all chunks' states in ``comp_tokens`` slots.

    Args:
      comp_tokens, sink, independent, conditional, streaming, repeat, repeat_by, repeat_share, repeat_gated,
        min_comp_tokens, recent, start: as for `concat`.
      groups: so many means of ``comp_tokens`` slots each, which chunks enter in turn: the memory is of constant size,
        and of up to this many chunks it holds each by itself, as `concat` does; in no paper. With 1 it is the paper's.
    """
    repeating = (repeat, repeat_by, repeat_share, repeat_gated)
    # What text sees, and what is run to close a chunk, is that of concat; only the update differs (equation 3).
    appending = concat(
        comp_tokens, sink, independent, conditional, streaming, *repeating, min_comp_tokens, recent, start=start
    )
    return dataclasses.replace(_grouped(appending, Mean(), groups), name="ccm_merge")


def ema(
    comp_tokens: int = 1,
    sink: bool = False,
    independent: bool = False,
    conditional: bool = True,
    decay: float = 0.5,
    streaming: bool = False,
    repeat: bool = False,
    repeat_by: Literal["placeholders", "text"] = "placeholders",
    repeat_share: float = 1.0,
    repeat_gated: bool = True,
    min_comp_tokens: int | None = None,
    recent: int = 0,
    groups: int = 1,
    start: Literal["learned", "mean"] = "learned",
) -> Method:
    """CCM-merge by an exponential moving average (table 16).

    Args:
      comp_tokens, sink, independent, conditional, streaming, repeat, repeat_by, repeat_share, repeat_gated,
        min_comp_tokens, recent, start: as for `concat`.
      decay: weight of the newest chunk.
      groups: as for `merge`.
    """
    repeating = (repeat, repeat_by, repeat_share, repeat_gated)
    appending = concat(
        comp_tokens, sink, independent, conditional, streaming, *repeating, min_comp_tokens, recent, start=start
    )
    return dataclasses.replace(_grouped(appending, Ema(decay), groups), name="ccm_ema")


def _grouped(appending: Method, mix: Mix, groups: int) -> Method:
    """The appending method with so many mixtures for its memory."""
    if groups < 1:
        raise UserError(f"groups is {groups}; there must be at least 1 that chunks enter")
    return appending.mixing(mix, groups)


def text_to_start_from(start: str, share: int | None = None, text: tuple[Kind, ...] = (TEXT, QUERY)) -> Clause | None:
    """What compression tokens start from (`Method.starts_from`).

    Args:
      start: "learned", nothing but their own embedding, or "mean", that of the text they stand for, too.
      share: how many tokens that is, up to their own position; None for the whole chunk.
      text: kinds of that text.
    """
    if one_of("start", start, ("learned", "mean")) == "learned":
        return None
    return see(COMP, text, 0, 0, window=share, behind=share is not None)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value of an option, or `UserError` that says which are allowed."""
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def check_repetition(repeat: bool, repeat_by: str, repeat_share: float, repeat_gated: bool = True) -> None:
    """Refuses options of a repetition that is not asked for, and shares that are none."""
    if not repeat and (repeat_by, repeat_share, repeat_gated) != ("placeholders", 1.0, True):
        raise UserError(
            f"repeat_by is {repeat_by!r}, repeat_share {repeat_share} and repeat_gated {repeat_gated}, but repeat is "
            "false; set repeat: true, or leave them out"
        )
    one_of("repeat_by", repeat_by, ("placeholders", "text"))
    if not 0 < repeat_share <= 1:
        raise UserError(f"repeat_share is {repeat_share}; it must lie in (0, 1]; for no repetition set repeat: false")


def gist(
    comp_tokens: int = 1,
    sink: bool = False,
    conditional: bool = True,
    online: bool = False,
    start: Literal["learned", "mean"] = "learned",
) -> Method:
    """Gisting (Mu et al. 2023): the whole context is one chunk, compressed once, which the tail sees.

    Args:
      comp_tokens, sink, conditional, start: as for `concat`.
      online: gisting-online, CCM's baseline: each chunk is compressed alone as it comes, and the memories stand side by
        side. Adapters serve both: the paper trains on whole contexts.
    """
    # No chunk sees a memory: there is but one chunk, or each is compressed alone.
    alone = concat(comp_tokens, sink, independent=True, conditional=conditional, start=start)
    return dataclasses.replace(alone, name="gist", context="chunks" if online else "joined")
