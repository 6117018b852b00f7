"""The text of an answer while its tokens come: what decoding all of them gives, at the cost of the new ones."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Tokens in front of the new ones that are decoded with them. Decoders look no further back: they join a token to the
# one before it, drop a space at the very beginning, or tidy up the few characters of "do n't".
_CONTEXT = 8
# Half a character, or what is none: more bytes may make another one of it.
_HALF = "\ufffd"
# A byte by itself, in vocabularies that fall back to bytes. A run of these is decoded as a whole.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Spoken:
    """The text of an answer whose tokens come by and by.

    Attributes:
      text: of all tokens so far, without special ones.
    """

    def __init__(self, tokenizer: Any):
        """Nothing is said yet; the tokenizer is a fast one of transformers."""
        self.text = ""
        self._tokenizer = tokenizer
        # Tokens, and the characters that they are: up to here nothing that follows changes the text.
        self._marks: list[tuple[int, int]] = [(0, 0)]
        # The last mark before the newest tokens.
        self._before = 0

    def go_on(self, answer: np.ndarray) -> None:
        """Takes all int32 tokens of the answer, which begin with those that it was given before."""
        self._before = self._marks[-1][1]
        text = self._prefix(answer, len(answer))
        if not text.startswith(self.text[: self._before]):
            # Text that was thought to stay has changed: all of it is looked at anew.
            self._marks, self._before = [(0, 0)], 0
        self.text = text
        if len(answer) > self._marks[-1][0] and self._is_settled(answer):
            self._marks.append((len(answer), len(self.text)))

    def stopped(self, answer: np.ndarray, stops: Sequence[str]) -> int | None:
        """How many tokens of an answer stand in front of a text that ends it; None if there is none.

        Args:
          answer: int32 tokens that `go_on` took last, and after each earlier `go_on` no text had ended it.
          stops: texts, none of them empty.
        """
        # Such a text may have begun among earlier tokens, so that all but its last character stands there.
        found = [self.text.find(stop, max(self._before - len(stop) + 1, 0)) for stop in stops]
        first = min((at for at in found if at >= 0), default=None)
        if first is None:
            return None
        # Counted by the decoded text and not by tokens: it may begin or end in the middle of one. Tokens behind a mark
        # only add to the text, so that none beyond the first mark behind it has to be looked at.
        behind = bisect.bisect_right([characters for _, characters in self._marks], first)
        start, _ = self._marks[behind - 1]
        end = self._marks[behind][0] if behind < len(self._marks) else len(answer)
        del self._marks[behind:]
        return max(n for n in range(start, end) if len(self._prefix(answer, n)) <= first)

    def _prefix(self, answer: np.ndarray, count: int) -> str:
        """The text of the first tokens, of which as many as the last mark says are known."""
        start, characters = self._marks[-1]
        context = max(start - _CONTEXT, 0)
        known, both = self._decode(answer[context:start]), self._decode(answer[context:count])
        if both.startswith(known):
            return self.text[:characters] + both[len(known) :]
        # A decoder that reaches back over a mark: all of it, then.
        return self._decode(answer[:count])

    def _is_settled(self, answer: np.ndarray) -> bool:
        """Whether the text of these tokens stays as it is, whatever comes."""
        last = self._tokenizer.convert_ids_to_tokens(int(answer[-1]))
        if last is None or _BYTE.fullmatch(last) or self.text.endswith(_HALF):
            return False
        # A special token says nothing, so that what stands before it decides: the next token will tell.
        return self._decode(answer[-1:]) != ""

    def _decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
