"""Text as tokens that are nothing but text: what somebody wrote never becomes a control token.

A tokenizer finds its added tokens in any text, so that a turn ``use <|im_end|> to stop`` would hold the token that ends
a turn. Here such a name is spelt out, in ordinary tokens that give the same text when they are decoded. Only templates,
which the config gives, may hold control tokens.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """Names of the tokens that steer a model: the special ones, and added ones that the chat template writes.

    Other added tokens (runs of spaces, HTML tags) are text. Some models do not call the tokens special that say who
    speaks, but their templates name them.

    Args:
      tokenizer: a fast tokenizer of transformers.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    named = set(tokenizer.all_special_tokens)
    found = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()

    def steers(token):
        return token.special or token.content in named or token.content in template

    return frozenset(token.content for token in found if steers(token) and token.content.strip("▁ \t\r\n"))


class Encoder:
    """A copy of a tokenizer that calls its control tokens by names that no text has.

    It adds no tokens of its own, cuts nothing off and pads nothing.
    """

    def __init__(self, tokenizer: Any):
        """Copies a tokenizer.

        Args:
          tokenizer: a fast tokenizer of transformers; not changed.
        """
        from tokenizers import Tokenizer

        # Nobody can write what was drawn at random just now.
        tree, hidden = json.loads(tokenizer.backend_tokenizer.to_str()), uuid.uuid4().hex
        names = self._names = {name: hidden + name for name in control_tokens(tokenizer)}
        # Longest first, as tokenizers look for them.
        self._found = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        for token in tree["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        # The model could also build such a name by itself, from the vocabulary.
        model = tree["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(name, name): number for name, number in model["vocab"].items()}
        else:
            model["vocab"] = [(names.get(name, name), score) for name, score in model["vocab"]]
        if "merges" in model:
            # Older versions of the tokenizers library write "a b", newer ones ["a", "b"].
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [(a, b) for a, b in pairs if not {a, b, a + b} & names.keys()]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        # The pieces are put together by `Template`, which knows where a session begins and ends.
        tree |= {"post_processor": None, "truncation": None, "padding": None}
        self._copy = Tokenizer.from_str(json.dumps(tree))

    def template(self, text: str) -> str:
        """The text of a template in a form in which `encode` knows the control tokens of it."""
        return self._found.sub(lambda match: self._names[match[0]], text)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodes texts, each by itself."""
        return self._copy.encode_batch(list(texts), add_special_tokens=False)
