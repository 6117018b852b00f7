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

Opening, separator and answer are templates and may name control tokens; in turns such names are text.

With a chat template (`jax_ccm.data.chat_template`) each turn has a head and a tail by its role, and there is no
separator::

    <|im_start|>user
    Hi there<|im_end|>
    <|im_start|>assistant
    Hello, how are you?<|im_end|>
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_ccm.data.chat_template import ROLES, ChatTemplate
from jax_ccm.data.config import DataConfig
from jax_ccm.data.encoding import Encoder
from jax_ccm.errors import UserError


class Template:
    """Encodes the pieces of a session.

    Attributes:
      start: int32, what precedes the first segment: the beginning-of-sequence token, then the opening.
      separator: int32, opens every segment but the first.
      answer: int32, stands between a turn and the answer to it where both are in one piece, as query and target.
      end: int32, behind a target: the end-of-sequence token or the tail of a message, or nothing.
      heads, tails: role ("user", "assistant") -> int32, what stands around each turn of the context; nothing in lines.
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
        chat_template: ChatTemplate | None = None,
    ):
        """Prepares the fixed pieces.

        Args:
          tokenizer: a fast tokenizer of transformers.
          bos: whether a session starts with the beginning-of-sequence token.
          eos: whether a target is followed by the end-of-sequence token.
          opening: text before the first segment.
          separator: text that opens every other segment.
          answer: text between query and target.
          chat_template: writes turns as messages; the other arguments then have no effect.

        Raises:
          UserError: if the tokenizer lacks a token that is asked for.
        """
        self._tokenizer, self._encoder = tokenizer, Encoder(tokenizer)
        if chat_template is not None:
            self._write(chat_template)
            return
        # Lines of text have separators instead.
        nothing = np.zeros(0, np.int32)
        self.heads, self.tails = dict.fromkeys(ROLES, nothing), dict.fromkeys(ROLES, nothing)
        self._system, self._messages = None, False
        self._opening, self._separator, self._answer = opening, separator, answer
        self.end = self._special("eos", eos)
        bos_ids = self._special("bos", bos)
        self.start = np.concatenate([bos_ids, self._encode([self._encoder.template(opening)])[0]])
        self.separator = self._behind("a", [self._encoder.template(separator)], space=False)[0]
        self.answer = self._behind("a", [self._encoder.template(answer)], space=False)[0]

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Any) -> Template:
        """The pieces of a config's format."""
        if config.writes_messages:
            return cls(tokenizer, chat_template=ChatTemplate.of(tokenizer))
        return cls(tokenizer, **config.fixed_texts())

    def _write(self, template: ChatTemplate) -> None:
        """Sets the pieces of messages."""

        def fixed(text):
            return self._behind("a", [self._encoder.template(text)], space=False)[0]

        self.heads = {role: self._encode([self._encoder.template(template.heads[role])])[0] for role in ROLES}
        self.tails = {role: fixed(template.tails[role]) for role in ROLES}
        # Content stands behind the head of its message and nothing else, so that it is the same tokens everywhere.
        self._opening, self._separator, self._answer = (
            template.heads["user"],
            template.heads["user"],
            template.heads["assistant"],
        )
        self.start = self._encode([self._encoder.template(template.start)])[0]
        self._system, self._messages = template.system, True
        self.separator = np.zeros(0, np.int32)
        # What ends the question, and what begins the answer.
        self.answer = np.concatenate([self.tails["user"], self.heads["assistant"]])
        self.end = self.tails["assistant"]

    def first(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text as the first segment of a session."""
        return self._behind(self._opening, texts)

    def later(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text as a segment behind the separator."""
        return self._behind("a" + self._separator, texts)

    def target(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text as a target behind a query and `answer`; without `end`."""
        return self._behind("a" + self._answer, texts)

    def starts(self, systems: Sequence[str], ids: Sequence[str]) -> list[np.ndarray | None]:
        """int32 tokens with which sessions begin that have a system message, in the place of `start`.

        Args:
          systems: the messages; sessions whose message is empty or white space begin as others do, None.
          ids: name them in messages.

        Raises:
          UserError: for a message where sessions have none.
        """
        given = [number for number, text in enumerate(systems) if text.strip()]
        if not given:
            return [None] * len(systems)
        if self._system is None:
            why = "turns are lines of text; set data.chat_template: true"
            if self._messages:
                why = "this chat template writes none that stands by itself; leave it out, or say it in the first turn"
            raise UserError(f"{ids[given[0]]}: there is a system message, but {why}")
        before, behind = (self._encode([self._encoder.template(text)])[0] for text in self._system)
        said = self._behind(self._system[0], [systems[number] for number in given])
        made = {number: np.concatenate([before, tokens, behind]) for number, tokens in zip(given, said, strict=True)}
        return [made.get(number) for number in range(len(systems))]

    def plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 tokens of each text by itself, unstripped."""
        return self._encode(texts)

    def words(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int32 tokens of a text by itself, and bool, those with which a word (after white space) begins."""
        (made,) = self._encoder.encode([text])
        begins = [
            # A token may hold the end of a word and the beginning of the next.
            any(not text[i].isspace() and (i == 0 or text[i - 1].isspace()) for i in range(first, last))
            for first, last in made.offsets
        ]
        return np.array(made.ids, np.int32), np.array(begins, bool)

    def _special(self, name: str, wanted: bool) -> np.ndarray:
        if not wanted:
            return np.zeros(0, np.int32)
        token = getattr(self._tokenizer, f"{name}_token_id")
        if token is None:
            raise UserError(f"data.{name} is true, but this tokenizer has no {name} token; set data.{name}: false")
        return np.array([token], np.int32)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(row.ids, np.int32) for row in self._encoder.encode(texts)]

    def _behind(self, before: str, texts: Sequence[str], space: bool = True) -> list[np.ndarray]:
        """The tokens that each text adds behind ``before``, a template."""
        texts = [text.strip() for text in texts] if space else texts
        glue = " " if space and before and not before[-1].isspace() else ""
        front = self._encoder.template(before)
        # The text in front alone, and with each text behind it: the tokens of the one must begin the other.
        (known,) = self._encode([front])
        found = []
        for text, row in zip(texts, self._encode([front + glue + text for text in texts]), strict=True):
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
