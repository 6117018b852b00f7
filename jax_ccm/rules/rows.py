"""The flat ragged rows of a parallel forward.

The layout of CCM-concat with n = 2 for chunks ``a b``, ``c`` and the tail ``d e``::

    place     0  1  2  3  4  5  6  7  8          memory    0  1  2  3
    token     a  b  C0 C1 c  C0 C1 d  e          written   C0 C1 C0 C1
    segment   0  0  0  0  1  1  1  2  2          by chunk  0  0  1  1
    position  0  1  2  3  2  3  4  3  4

Text sees its own segment in place and older segments only through the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.rules import shares
from jax_ccm.rules.batch import Batch, Packed
from jax_ccm.rules.examples import Example, Segment, concat, cut, join, with_prefix
from jax_ccm.rules.positions import closing_positions
from jax_ccm.rules.types import TEXT, Chunk, Kind, Method, Slots, Token

# What to do for a method that keeps no text.
WITH_SINK = "; with method.sink: true, where it has one, it keeps a system message"


def arrange(method: Method, example: Example) -> tuple[Segment, ...]:
    """The segments as the method is fed them, openings included; the last is the tail."""
    count = len(example.segments)
    if method.context == "dropped":
        return (with_prefix(example.start, example.segments[-1], keep=example.keeps_start),)
    if method.context == "joined" and count > 2:
        example = join(example, [count - 1, 1])
    first, *rest = example.segments
    start = with_prefix(example.start, first, keep=example.keeps_start)
    segments = (start, *(with_prefix(example.separator, segment) for segment in rest))
    # Chunks of fixed length know no boundaries: everything is one text, cut anew.
    return segments if method.chunk is None else cut(concat(*segments), method.chunk)


def chunk(rows: Sequence[Sequence[int] | np.ndarray], size: int, vocab_size: int) -> Chunk:
    """A `Chunk` of ragged rows of token ids, padded on the right; an empty row takes no part.

    Args:
      rows: token ids for each session.
      size: C, tokens of a row.
      vocab_size: V.

    Raises:
      UserError: for a row longer than ``size`` or a token outside the vocabulary.
    """
    tokens, valid = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        if len(row) > size:
            raise UserError(f"row {i} has {len(row)} tokens, and the chunk holds {size}; raise size or split the row")
        ids = np.asarray(row, np.int64)
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise UserError(f"row {i}: token id {wrong[0]} is outside the vocabulary (0..{vocab_size - 1})")
        tokens[i, : len(row)], valid[i, : len(row)] = ids, True
    return Chunk(tokens, valid)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a batch: ``tokens`` T, ``memory`` M (slots), ``scored`` Q."""

    tokens: int
    memory: int
    scored: int

    @classmethod
    def of_all(cls, needs: Sequence[Sizes]) -> Sizes:
        """The smallest sizes that hold rows which need these."""
        return cls(*(max(getattr(need, field.name) for need in needs) for field in dataclasses.fields(cls)))


def measure(method: Method, example: Example) -> Sizes:
    """The sizes that one example needs, in a row of `batch`.

    Args:
      method: what it is laid out for.
      example: the session.
    """
    return _measure(_for(method, example), arrange(method, example))


def _for(method: Method, example: Example) -> Method:
    """The method as one example asks for it: with so many closing tokens, and repetition or none."""
    method = method.closed_by(example.num_comp_tokens)
    return method if example.repeats else method.without_repetition()


def _measure(method: Method, segments: Sequence[Segment]) -> Sizes:
    """The sizes that arranged segments need."""
    chunks = len(closed(method, segments))
    text = sum(len(segment.tokens) for segment in segments)
    # The first token of a session has nothing before it that could predict it.
    scored = sum(int(segment.scored.sum()) for segment in segments) - int(segments[0].scored[:1].sum())
    repeated = sum(len(segment.tokens) for segment in segments[:chunks]) if method.repeat else 0
    closing = int(np.sum(method.num_closing(_compressed(method, segments)[:chunks])))
    # Where all closing tokens write, there are as many slots, however many a chunk has (`Method.ratio`).
    slots = closing if method.slots_per_chunk == len(method.closes) else chunks * method.slots_per_chunk
    if method.pool:
        # Pooled text begins behind the sinks; each chunk may end with a slot of fewer tokens.
        ends = np.cumsum([0] + [len(segment.tokens) for segment in segments[:-1]])
        slots = int(np.sum(-(-np.diff(np.maximum(ends - _sinks(method, segments[0]), 0)) // method.pool)))
    return Sizes(text + repeated + closing, slots, scored + repeated)


def _compressed(method: Method, segments: Sequence[Segment]) -> np.ndarray:
    """int ``[segments]``, how much text of each is compressed where it is closed: all but sinks and what is kept."""
    sizes = np.array([len(segment.tokens) for segment in segments])
    # Kept text of kind SINK stands at the beginning, and is counted with the sinks below.
    if method.kept_kind is not Kind.SINK:
        sizes = sizes - [0 if segment.kept is None else segment.kept.sum() for segment in segments]
    begins = np.cumsum(sizes) - sizes
    return sizes - np.clip(_sinks(method, segments[0]) - begins, 0, sizes)


def _sinks(method: Method, first: Segment) -> int:
    """Tokens at the beginning of a session that everybody sees: the method's own, or a system message."""
    if method.kept_kind is not Kind.SINK or first.kept is None:
        return method.sink
    return max(method.sink, int(first.kept.sum()))


def bound(method: Method, text: int, chunks: int, scored: int) -> Sizes:
    """Sizes enough for any example of at most so many text tokens, context chunks and scored tokens."""
    if method.chunk is not None:
        # Without repetition a last chunk that is full stays the tail (`closed`).
        chunks = (text if method.repeat else max(text - 1, 0)) // method.chunk
    repeated = text if method.repeat else 0
    closing = _most_closing(method, text, chunks)
    return Sizes(text + repeated + closing, most_slots(method, text, chunks), scored + repeated)


def closed(method: Method, segments: Sequence[Segment]) -> Sequence[Segment]:
    """The segments that a row of the parallel forward closes: all but the tail and the recent ones, whose text it sees.

    In training with repetition (`Method.repeat`) also a tail that is a full chunk: it can be repeated, though no text
    follows that could see its memory.
    """
    if method.repeat is not None and len(segments[-1].tokens) == method.chunk:
        return segments
    return segments[: max(len(segments) - 1 - method.recent, 0)]


def most_slots(method: Method, text: int, chunks: int) -> int:
    """Memory slots enough for any row of at most so many text tokens and context chunks."""
    if method.ratio is not None:
        return _most_closing(method, text, chunks)
    # Each chunk may have a rest.
    pooled = min(text, text // method.pool + chunks) if method.pool else 0
    return chunks * method.slots_per_chunk + pooled


def _most_closing(method: Method, text: int, chunks: int) -> int:
    """Closing tokens enough for any row of at most so many text tokens and context chunks."""
    most = chunks * len(method.closes)
    return most if method.ratio is None else min(most, text // method.ratio + chunks)


def require_parallel(method: Method) -> None:
    """Raises `UserError` for a method that runs only as a recurrence, saying why and what serves it."""
    if method.rope == "cache":
        raise UserError(
            f"method {method.name!r} rotates keys by their index in the cache and so has no parallel form; what is "
            "trained without (method.streaming: false, where a method has it) serves it"
        )
    if method.eviction is not None:
        raise UserError(
            f"method {method.name!r} selects what it keeps from what was read before and so has no parallel form; "
            "there is nothing to train, use it in evaluate, chat and generate"
        )


def batch(
    method: Method,
    examples: Sequence[Example],
    sizes: Sizes | Sequence[Sizes],
    vocab_size: int,
    pad: str = "right",
    rows: Sequence[int] | None = None,
) -> Batch:
    """Lays examples out for a parallel forward.

    A token is predicted from the text token before it, whatever compression tokens stand between. The first token
    of a session has no such token and is not scored.

    Args:
      method: the compression method.
      examples: the rows.
      sizes: static caps; every mixture of lengths within them gives arrays of the same shape. Of several, from small to
        large, the first is taken that holds all examples.
      vocab_size: V.
      pad: side of the padding, "right" or "left".
      rows: which of the examples to lay out, though all of them choose the sizes; None for all.

    Returns:
      A `Batch` of numpy arrays.

    Raises:
      UserError: if an example exceeds a cap, has an empty segment or a token outside the vocabulary, or the method has
        no parallel form.
    """
    require_parallel(method)
    arranged = [(_for(method, example), arrange(method, example), example.id) for example in examples]
    if not isinstance(sizes, Sizes):
        sizes = _smallest(sizes, [_measure(method, segments) for method, segments, _ in arranged])
    chosen = arranged if rows is None else [arranged[row] for row in rows]
    made = [_row(method, segments, sizes, vocab_size, id) for method, segments, id in chosen]
    # Rows are made with padding on the right, and rolled where it is wanted on the left.
    if pad == "left":
        made = [_shift(row, sizes.tokens) for row in made]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *made)


def _smallest(allowed: Sequence[Sizes], needs: Sequence[Sizes]) -> Sizes:
    """The first sizes that hold all rows in tokens and scored tokens; the last if none do."""
    tokens, scored = max(need.tokens for need in needs), max(need.scored for need in needs)
    return next((sizes for sizes in allowed if sizes.tokens >= tokens and sizes.scored >= scored), allowed[-1])


def _row(method: Method, segments: Sequence[Segment], sizes: Sizes, vocab: int, name: str) -> Batch:
    """One row, padded on the right: the arrays of a `Batch` without their first dimension."""
    where = f"example {name!r}" if name else "an example"
    begins = np.cumsum([0, *(len(segment.tokens) for segment in segments)])
    counts, parts = method.num_closing(_compressed(method, segments)), []
    for number, piece in enumerate(segments):
        closes = number < len(closed(method, segments))
        tail = number == len(segments) - 1 and not closes
        _check_segment(method, piece, vocab, number == 0, tail, f"{where}: segment {number}")
        kept = np.zeros(len(piece.tokens), bool) if piece.kept is None else piece.kept
        if closes:
            _check_span(method, kept, f"{where}: segment {number}")
        closing = method.closes[: counts[number]] if closes else None
        parts.append(_segment(method, piece, kept, tail, number, int(begins[number]), closing, vocab))
    text = _Text(*map(np.concatenate, zip(*parts, strict=True)))
    # The first tokens are sinks for all that follow, whatever they were laid out as.
    text.kind[np.flatnonzero(np.isin(text.kind, (*TEXT, Kind.SINK)))[: method.sink]] = Kind.SINK
    # Order in the row: compression tokens count, unlike for positions.
    slots = Slots(text.kind, text.segment, np.arange(len(text.tokens)), text.position)
    indices, targets, steps = _targets(text, slots)
    memory = _memory(method, slots, len(segments))
    needs = Sizes(len(text.tokens), len(memory.slots.kind), len(indices))
    for field in dataclasses.fields(Sizes):
        need, cap = getattr(needs, field.name), getattr(sizes, field.name)
        if need > cap:
            raise UserError(f"{where} needs {field.name}={need}, the batch has {cap}; raise the cap or filter the data")

    def scored(x, dtype: type = np.int32):
        return _pad(x, sizes.scored, dtype)

    return Batch(
        _pad(text.tokens, sizes.tokens), slots.map(lambda x: _pad(x, sizes.tokens)),
        _padded(method, memory, sizes.memory) if method.remembers and sizes.memory else None,
        scored(indices), scored(targets), scored(np.ones(len(indices)), np.float32), scored(steps),
    )  # fmt: skip


def _pad(x: np.ndarray, size: int, dtype: type = np.int32) -> np.ndarray:
    """The array with zeros behind it."""
    return np.concatenate([x, np.zeros(size - len(x), x.dtype)]).astype(dtype)  # np.pad is ten times slower


def _check_segment(method: Method, piece: Segment, vocab: int, first: bool, tail: bool, where: str) -> None:
    """Refuses text that cannot be laid out: none, ids that are no text, another length than the method's chunks."""
    count = len(piece.tokens)
    if not count:
        raise UserError(f"{where} is empty; drop it, or join it to its neighbour")
    if piece.tokens.min() < 0 or piece.tokens.max() >= vocab:
        bad = piece.tokens[(piece.tokens < 0) | (piece.tokens >= vocab)][0]
        raise UserError(
            f"{where}: token id {bad} is outside the vocabulary (0..{vocab - 1}). Compression tokens are placed by the "
            "method; they may stand neither in text nor in labels"
        )
    if method.chunk and not tail and count != method.chunk:
        raise UserError(f"{where} has {count} tokens; method {method.name!r} takes {method.chunk}")
    if piece.kept is None or not piece.kept.any():
        return
    if not tail and method.kept_kind is None:
        raise UserError(f"{where} has text to keep, but method {method.name!r} keeps none{WITH_SINK}")
    if method.kept_kind is Kind.SINK and (not first or (piece.kept[1:] > piece.kept[:-1]).any()):
        raise UserError(
            f"{where} has text to keep behind other text; method {method.name!r} keeps what a session begins with"
        )


def _check_span(method: Method, kept: np.ndarray, where: str) -> None:
    """Refuses a chunk whose kept text does not stand before the span that closes it."""
    if method.closes and (kept[1:] > kept[:-1]).any():
        raise UserError(f"{where} keeps text behind its span; end the segment with the span")
    if method.closes and kept.all():
        raise UserError(f"{where} keeps all of its text; join it to the next, which has a span")


class _Text(NamedTuple):
    """A row or a segment of it, ``int64`` arrays of one length.

    Attributes:
      tokens, kind, segment, position: as those of a `Batch` and its `Slots`.
      scored: bool, text that is a target.
      answers: the token that a repeating one is to be answered with, elsewhere -1.
    """

    tokens: np.ndarray
    kind: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    scored: np.ndarray
    answers: np.ndarray


def _segment(
    method: Method,
    piece: Segment,
    kept: np.ndarray,
    tail: bool,
    number: int,
    begin: int,
    closing: Sequence[Token] | None,
    vocab: int,
) -> _Text:
    """A segment's part of the row: its text, the tokens that close it, and, in training, what repeats it.

    Args:
      method: the method.
      piece: the text.
      kept: ``bool [c]``, text that stays as it is.
      tail: whether it is the tail, which nothing closes.
      number: of the segment.
      begin: position of its first token.
      closing: the tokens that close it; None if it stays open in this row.
      vocab: V.
    """
    count, fed = len(piece.tokens), piece.tokens[:0]
    if closing is not None:
        fed = _repeating(method, piece.tokens, vocab)
    closing = closing or ()
    # What a closing compresses begins behind the text that is kept, and behind sinks.
    sinks = min(max(method.sink - begin, 0), count) if method.kept_kind is Kind.SINK else 0
    span = begin + max(int(kept.sum()), sinks)
    # Compression tokens take positions relative to the text that follows or to the begin of the span, and are not
    # counted: the next segment begins where the text ends (CCM, "skip" positions of its code; Sentinel; LoMA).
    place = closing_positions(method, np.array(span), np.array(begin + count))[: len(closing)]
    again, whole = len(fed), count + len(closing) + len(fed)
    text = np.where(kept, method.kept_kind or Kind.QUERY, Kind.QUERY if tail else Kind.TEXT)

    def row(*arrays):
        return np.concatenate(arrays).astype(np.int64)

    return _Text(
        row(piece.tokens, [vocab + token.embedding_index for token in closing], fed),
        row(text, [token.kind for token in closing], np.full(again, Kind.REPEAT)),
        np.full(whole, number),
        # A repeated token has the position of the token that it repeats (LoMA).
        row(begin + np.arange(count), place, begin + np.arange(again)),
        np.concatenate([piece.scored, np.zeros(whole - count, bool)]),
        row(np.full(whole - again, -1), piece.tokens[:again]),
    )


def _repeating(method: Method, text: np.ndarray, vocab: int) -> np.ndarray:
    """What is fed to have a chunk repeated: placeholders, or a prompt and the text before each token."""
    if method.repeat is None:
        return text[:0]
    prompt = np.full(len(text), vocab + method.repeat.embedding_index)
    return prompt if method.repeat_by == "placeholders" else np.append(prompt[:1], text[:-1])


def _targets(row: _Text, slots: Slots) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each scored token is predicted, these tokens, and the chunks before them.

    Text is predicted behind the text before it, a repeated token in its place.
    """
    # The first token of a session has no text before it.
    scored = np.flatnonzero(row.scored)
    scored = scored[scored > 0]
    text = np.isin(slots.kind, (*TEXT, Kind.SINK))
    # For each token the last text at or before it: a token behind a chunk is predicted by that chunk's last text token,
    # and not by a compression token.
    before = np.maximum.accumulate(np.where(text, slots.index, -1))
    again = np.flatnonzero(row.answers >= 0)
    return (
        np.concatenate([before[scored - 1], again]),
        np.concatenate([row.tokens[scored], row.answers[again]]),
        slots.segment[np.concatenate([scored, again])],
    )


def _memory(method: Method, slots: Slots, segments: int) -> Packed:
    """Which tokens of a row write memory, and its slots, as many as there are; without the matrix of a mixture."""
    share = None
    if method.pool is not None:
        context = np.isin(slots.kind, TEXT) & (slots.segment < segments - 1)
        source, share, last = shares.pools(np.flatnonzero(context), slots.segment, method.pool)
    else:
        source = last = np.flatnonzero(np.isin(slots.kind, method.writes))
    index = slots.index[last]
    if method.mix is not None:
        # State t of the mixture exists once the last of its chunk's tokens has been run.
        count = method.slots_per_chunk
        index = index.reshape(-1, count).max(1, initial=0).repeat(count)
    kind = np.full(len(last), int(Kind.MEMORY))
    return Packed(source, Slots(kind, slots.segment[last], index, slots.position[last]), None, share)


def _padded(method: Method, memory: Packed, size: int) -> Packed:
    """The memory of a row in the size of the batch."""
    sources = size * (method.pool or 1)
    # Weights are for the whole batch's size, with rows of zeros for slots that this row does not have.
    mix = None if method.mix is None else shares.mix_matrix(method, len(memory.source), size)
    share = None if memory.share is None else _pad(memory.share, sources, np.float32)
    return Packed(_pad(memory.source, sources), memory.slots.map(lambda x: _pad(x, size)), mix, share)


def _shift(row: Batch, size: int) -> Batch:
    """The row with its padding on the left."""
    # Only indices into the row move; the memory, and what is scored, stay padded on the right.
    empty = size - int(row.slots.live.sum())

    def moved(indices, used):
        return np.where(used, indices + empty, 0).astype(np.int32)

    memory = row.memory
    if memory is not None:
        # One for each source: a pooled slot has several.
        used = np.repeat(memory.slots.live, len(memory.source) // len(memory.slots.kind))
        memory = dataclasses.replace(memory, source=moved(memory.source, used))
    return dataclasses.replace(
        row,
        tokens=np.roll(row.tokens, empty),
        slots=row.slots.map(lambda x: np.roll(x, empty)),
        memory=memory,
        indices=moved(row.indices, row.weights > 0),
    )
