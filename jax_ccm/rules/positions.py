"""Where the tokens stand that close a chunk."""

from __future__ import annotations

import numpy as np

from jax_ccm.rules.types import Array, Method


def closing_positions(method: Method, begin: Array, end: Array) -> Array:
    """Positions of the tokens in `Method.closes`, in numpy or under jit.

    Args:
      method: the compression method, with n closing tokens.
      begin: integers ``[...]``, position of the first token of the chunk that is compressed.
      end: integers ``[...]``, position of the text that will follow the chunk.

    Returns:
      Integers ``[..., n]``, none below 0. Where tokens stand at the ends of their shares (`Method.ratio` with
      `Token.from_begin`), the last of them stands at the end of a chunk that is longer than all shares, so that
      no text is out of sight.
    """
    begin, end = begin[..., None], end[..., None]
    from_begin = np.array([token.from_begin for token in method.closes], int)
    position = begin * from_begin + end * (1 - from_begin) + np.array([token.offset for token in method.closes], int)
    if method.ratio is not None:
        is_last = np.arange(len(method.closes)) == len(method.closes) - 1
        missing = (end - 1 - position) * (from_begin * is_last)
        position = position + missing * (missing > 0)
    # ``max(position, 0)``, by operators that numpy and traced arrays share.
    return position * (position > 0)
