"""LoMA, lossless compressed memory attention (Wang & Xiao 2024, arXiv 2401.09486): a reimplementation.

The paper's code is not public; masks and positions it leaves open are decided here, each with an option. Text is cut
into chunks of t c tokens. A chunk (reading zone) is followed by t memory tokens; in training also by a token for each
of its text tokens (repetition zone) that must answer with that text token, from memory alone. With c = 2, t = 1,
chunks ``a b`` and the tail ``c`` (own tokens left, memory right)::

          a b m r r c | M     position
    a     x . . . . . | .     0
    b     x x . . . . | .     1
    m     x x x . . . | .     1
    r     . . . x . . | x     0
    r     . . . . x . | x     1
    c     . . . . . x | x     2
"""

from __future__ import annotations

from typing import Literal

from jax_ccm.errors import UserError
from jax_ccm.methods.ccm import check_repetition, one_of, text_to_start_from
from jax_ccm.rules.clauses import see
from jax_ccm.rules.mixtures import Ema, Mean
from jax_ccm.rules.types import INF, Clause, Kind, Method, Rule, Token

TEXT, QUERY, COMP, REPEAT, SINK, MEMORY = Kind.TEXT, Kind.QUERY, Kind.COMP, Kind.REPEAT, Kind.SINK, Kind.MEMORY
EVERY = (TEXT, QUERY, COMP, REPEAT, SINK)


def loma(
    ratio: int = 4,
    memory_tokens: int = 8,
    repeat: bool = True,
    repeat_by: Literal["placeholders", "text"] = "placeholders",
    repeat_weight: float = 1.0,
    repeat_share: float = 1.0,
    bidirectional: bool = True,
    history: bool = True,
    scope: Literal["all", "last"] = "all",
    positions: Literal["stride", "sequential"] = "stride",
    repeats_see: Literal["self", "causal", "both"] = "self",
    sink: bool = False,
    conditional: bool = False,
    memory: Literal["append", "mean", "ema"] = "append",
    decay: float = 0.5,
    start: Literal["learned", "mean"] = "learned",
) -> Method:
    """LoMA.

    Args:
      ratio: c, text tokens for each memory token.
      memory_tokens: t, memory tokens of a chunk of t c text tokens.
      repeat: lay out the repetition zone in training.
      repeat_by: each repeated token is guessed from a token of its own in its place, all at once ("placeholders"), or
        behind the "text" before it, as it is when a chunk is said again token after token; the latter in no paper.
      repeat_weight: w in ``L_read + w L_rep``.
      repeat_share: share of the training examples of which this is asked; the paper asks all.
      bidirectional: memory tokens of a chunk see each other both ways; False for causally.
      history: memory tokens see earlier memory; text always does.
      scope: text sees the memory of "all" closed chunks, or of the "last".
      positions: the k-th memory token stands at the end of its share of the chunk ("stride"), or k places behind the
        chunk, not counted ("sequential").
      repeats_see: besides memory, a repetition token sees "self", earlier ones ("causal", always so with repeat_by
        "text"), or all ("both").
      sink: keep the first token of the session visible to all.
      conditional: the LoRA acts on memory and repetition tokens only, as in CCM; in no paper.
      memory: the states of a chunk are appended, or blended slot by slot into one memory of t slots, by CCM-merge's
        running "mean" or by an "ema"; text and repetitions then see the latest mixture; in no paper.
      decay: weight of the newest chunk in an "ema".
      start: a memory token starts from its "learned" embedding alone, or from that and the "mean" embedding of its
        share of the chunk, or of the whole chunk with "sequential" positions; the latter in no paper.
    """
    for name, value in (("ratio", ratio), ("memory_tokens", memory_tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    check_repetition(repeat, repeat_by, repeat_share)
    if repeat_by == "text" and repeats_see == "both":
        raise UserError(
            "repeats_see is 'both', but with repeat_by 'text' later tokens are what is asked for; leave it out"
        )
    if repeat_weight < 0:
        raise UserError(f"repeat_weight is {repeat_weight}; it must be at least 0, the weight of a loss")
    if memory != "ema" and decay != 0.5:
        raise UserError(f"decay is {decay}, but memory is {memory!r}; only memory 'ema' has one")
    mix = {"append": None, "mean": Mean(), "ema": Ema(decay)}[one_of("memory", memory, ("append", "mean", "ema"))]
    farthest = {"all": INF, "last": 1}[one_of("scope", scope, ("all", "last"))]
    # Earlier memory is seen by memory tokens, too, as by any token of a plain forward on the live cache.
    readers = (TEXT, QUERY, COMP) if history else (TEXT, QUERY)
    alone = repeats_see == "self" and repeat_by == "placeholders"
    clauses: list[Clause] = [
        # The reading zone, causally; memory tokens stand behind it and see all of it, and each other (`both_ways`).
        see((TEXT, QUERY, COMP), (TEXT, QUERY), 0, 0),
        see(COMP, COMP, 0, 0),
        see(readers, MEMORY, 1, farthest),
        # Only the memory of its own chunk, at distance 0: a test of each chunk's memory alone.
        see(REPEAT, MEMORY, 0, 0),
        # Tokens fed alike are told apart by position alone; a window of 1 leaves each of them itself.
        see(REPEAT, REPEAT, 0, 0, window=1 if alone else None),
    ]
    if sink:
        clauses.append(see((TEXT, QUERY, COMP, SINK), SINK, 0, INF))
    both = ((COMP,) if bidirectional else ()) + ((REPEAT,) if repeats_see == "both" else ())
    one_of("repeats_see", repeats_see, ("self", "causal", "both"))
    stride = one_of("positions", positions, ("stride", "sequential")) == "stride"
    size = ratio * memory_tokens

    def place(k):
        # The k-th of t slots at ``c (k + 1) - 1`` within a chunk of t c tokens, counted from the text that follows.
        return ratio * (k + 1) - 1 - size if stride else k

    appending = Method(
        name="loma",
        rule=Rule(tuple(clauses), both_ways=both),
        # All memory tokens are one token, told apart by their positions; their embedding is the same row.
        closes=tuple(Token(COMP, embedding_index=0, offset=place(k)) for k in range(memory_tokens)),
        starts_from=text_to_start_from(start, share=ratio if stride else None),
        # The paper fine-tunes the model; a LoRA in place of that acts on every token.
        gate=(COMP, REPEAT) if conditional else EVERY,
        sink=sink,
        chunk=size,
        repeat=Token(REPEAT, embedding_index=1) if repeat else None,
        repeat_by=repeat_by,
        repeat_weight=repeat_weight,
        repeat_share=repeat_share,
    )
    return appending.mixing(mix)
