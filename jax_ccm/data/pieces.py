"""The tokens of the pieces that a session is put together from.

A session is a text, `opening turn separator turn separator query answer target`, for a dialogue::

    Hi there
    A: Hello, how are you?
    A: Fine.

and its pieces are tokenised each as they would be in that text, so that training, evaluation and chat, which put the
same pieces together at different times, agree token by token. Two conventions follow. A piece that stands behind
others has one space in front of it, unless the text before it ends in white space or is empty; with byte-level BPE the
space belongs to its first token, and SentencePiece puts it there by itself. A separator is tokenised behind a letter:
the tail of the tokens of ``a\\nA:`` (CCM's reference implementation does the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_ccm.data.config import DataConfig
from jax_ccm.errors import UserError


class Pieces:
    """Encodes the pieces of a session.

    Attributes:
      start: int32, what precedes the first segment: the beginning-of-sequence token, then the opening.
      separator: int32, opens every segment but the first.
      answer: int32, stands between query and target.
      end: int32, the end-of-sequence token, or nothing.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        bos: bool = True,
        eos: bool = True,
        opening: str = "",
        separator: str = "\nA:",
        answer: str = "\nA:",
    ):
        """Prepares the fixed pieces.

        Args:
          tokenizer: a fast tokenizer of transformers.
          bos: whether a session starts with the beginning-of-sequence token.
          eos: whether a target is followed by the end-of-sequence token.
          opening: text before the first segment.
          separator: text that opens every other segment.
          answer: text between query and target.

        Raises:
          UserError: if the tokenizer lacks a token that is asked for.
        """
        self._tokenizer = tokenizer
        self._opening, self._separator, self._answer = opening, separator, answer
        self.end = self._special("eos", eos)
        bos_ids = self._special("bos", bos)
        self.start = np.concatenate([bos_ids, self._encode([opening])[0]]) if opening else bos_ids
        self.separator = self._behind("a", [separator], space=False)[0]
        self.answer = self._behind("a", [answer], space=False)[0]

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Any) -> Pieces:
        """The pieces of a config's format."""
        given = {name: config.option(name) for name in ("bos", "eos", "opening", "separator", "answer")}
        return cls(tokenizer, **{name: value for name, value in given.items() if value is not None})

    def first(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text as the first segment of a session."""
        return self._behind(self._opening, texts)

    def later(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text as a segment behind the separator."""
        return self._behind("a" + self._separator, texts)

    def target(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text as a target behind a query and `answer`; without `end`."""
        return self._behind("a" + self._answer, texts)

    def plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text by itself, unstripped."""
        return self._encode(texts)

    def words(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int32 tokens of a text by itself, and bool, those with which a word (after white space) begins."""
        made = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        begins = [
            any(not text[i].isspace() and (i == 0 or text[i - 1].isspace()) for i in range(first, last))
            for first, last in made["offset_mapping"]
        ]
        return np.array(made["input_ids"], np.int32), np.array(begins, bool)

    def _special(self, name: str, wanted: bool) -> np.ndarray:
        if not wanted:
            return np.zeros(0, np.int32)
        token = getattr(self._tokenizer, f"{name}_token_id")
        if token is None:
            raise UserError(f"data.{name} is true, but this tokenizer has no {name} token; set data.{name}: false")
        return np.array([token], np.int32)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        ids = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [np.array(row, np.int32) for row in ids]

    def _behind(self, before: str, texts: Sequence[str], space: bool = True) -> list[np.ndarray]:
        """The tokens that each text adds behind ``before``."""
        texts = [text.strip() for text in texts] if space else texts
        glue = " " if space and before and not before[-1].isspace() else ""
        known = self._encode([before])[0] if before else np.zeros(0, np.int32)
        found = []
        for text, row in zip(texts, self._encode([before + glue + text for text in texts]), strict=True):
            if not np.array_equal(row[: len(known)], known):
                raise UserError(
                    f"the tokenizer merges the end of {before!r} with the text behind it ({text[:30]!r}), so "
                    "that they are not separate pieces; end the separator without white space, or in another character"
                )
            found.append(row[len(known) :])
        return found


def sentence_ends(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that end in a full stop, a question or exclamation mark, or hold a line break."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, text in enumerate(texts) if "\n" in text or text.strip().endswith((".", "?", "!", "…", "。")))
