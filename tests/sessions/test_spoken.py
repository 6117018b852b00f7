"""The text of an answer as its tokens come is what decoding them all gives, and costs what the new ones cost."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.spoken import Spoken

# Pieces that begin or end within a word, a stop text, or a character (€ is E2 82 AC, 🙂 is F0 9F 99 82).
WORDS = [
    "a",
    "b",
    " a",
    "ab",
    " ",
    "\n",
    "\n\nUser",
    ":",
    "User:",
    "é",
    "€",
    "🙂",
    ".",
    "n't",
    "\ufffd",
    "STOP",
    "ST",
    "OP",
]
STOPS = ["\nUser:", "ab", "STOP", "€", "🙂a", "é", " ", "a\n", "\ufffd", "OP.", ".", ":", "b a", "never said"]


# Characters that are put together of pieces.
SPELLED = "é€🙂"


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def piece(word):
        return "".join(part for part, _ in cut.pre_tokenize_str(word))

    made = made_of(map(piece, WORDS), alphabet)
    made.decoder = decoders.ByteLevel()
    return made, [[made.token_to_id(byte) for byte in piece(word)] for word in SPELLED]


def byte_fallback():
    """A run of bytes is one text, or as many question marks as there are bytes."""
    numbers = [f"<0x{number:02X}>" for number in range(256)]
    made = made_of((word.replace(" ", "▁") for word in WORDS), numbers)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    return made, [[made.token_to_id(f"<0x{byte:02X}>") for byte in word.encode()] for word in SPELLED]


def spaced():
    """Without a decoder: tokens with spaces between them."""
    return made_of(WORDS), [[0]]


def reaching_back():
    """What comes later takes spaces away that were there."""
    made = made_of(WORDS)
    made.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", "."), decoders.Replace(" n't", "n't")])
    return made, [[WORDS.index(" "), WORDS.index(".")], [WORDS.index(" "), WORDS.index("n't")]]


def made_of(words, others=()):
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*words, *others]))}
    return Tokenizer(models.BPE(vocab=vocab, merges=[]))


def whole(kind):
    """A tokenizer with a special token, which is last and no part of the text; and the pieces of `SPELLED`."""
    made, spelled = kind()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made), spelled


KINDS = {kind.__name__: whole(kind) for kind in (byte_level, byte_fallback, spaced, reaching_back)}


def by_all_prefixes(tokenizer, tokens, stops):
    """The definition: as many tokens as fit in front of the first text that ends it."""
    decode = lambda count: tokenizer.decode(tokens[:count], skip_special_tokens=True)
    found = [at for stop in stops if (at := decode(len(tokens)).find(stop)) >= 0]
    return max(n for n in range(len(tokens)) if len(decode(n)) <= min(found)) if found else None


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=500, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_it_is_what_all_tokens_say(kind, data):
    tokenizer, spelled = KINDS[kind]
    often, last = len(WORDS) - 1, len(tokenizer) - 1
    token = st.one_of(st.integers(0, often), st.sampled_from(sum(spelled, [])), st.integers(0, last))
    # Characters in pieces, or special tokens, one after another for longer than what is decoded once more; and those
    # behind the vocabulary: models have rows for tokens that no tokenizer knows.
    pieces = st.lists(st.sampled_from(spelled), min_size=1, max_size=6).map(lambda parts: sum(parts, []))
    nothing = st.integers(1, 12).map(lambda count: [last] * count)
    part = st.one_of(st.lists(token, min_size=1, max_size=9), pieces, nothing, st.just([last + 3]))
    tokens = np.asarray(sum(data.draw(st.lists(part, min_size=1, max_size=7)), []), np.int32)
    stops = data.draw(st.lists(st.sampled_from(STOPS), max_size=3))
    spoken, at = Spoken(tokenizer), 0
    while at < len(tokens):
        at += data.draw(st.integers(1, 8))
        said = tokens[:at]
        spoken.go_on(said)
        assert spoken.text == tokenizer.decode(said, skip_special_tokens=True)
        end = spoken.stopped(said, stops)
        assert end == by_all_prefixes(tokenizer, said, stops)
        if end is not None:
            return


class Counting:
    """A tokenizer that counts what it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.tokens = tokenizer, 0

    def decode(self, tokens, **options):
        self.tokens += len(tokens)
        return self._tokenizer.decode(tokens, **options)

    def convert_ids_to_tokens(self, token):
        return self._tokenizer.convert_ids_to_tokens(token)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "spaced"])
def test_a_token_costs_the_same_however_long_the_answer_is(kind):
    tokenizer, spelled = KINDS[kind]
    often = [*range(len(WORDS)), *sum(spelled, [])]
    counting = Counting(tokenizer)
    # A character in pieces now and then, so that marks are not at every token.
    tokens = np.asarray([often[number % len(often)] for number in range(3000)] + often[-3:], np.int32)
    spoken = Spoken(counting)
    for count in range(1, len(tokens) + 1):
        spoken.go_on(tokens[:count])
        assert spoken.stopped(tokens[:count], ["never said"]) is None
    assert spoken.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert counting.tokens < 60 * len(tokens)
    counting.tokens = 0
    # Where a text ends the answer, the place is found without a look at all that stands in front of it.
    spoken.go_on(np.append(tokens, tokens[-3:]))
    assert spoken.stopped(np.append(tokens, tokens[-3:]), [spoken.text[-2:]]) is not None
    assert counting.tokens < 1000


@pytest.mark.parametrize("text", ["", "ab", "aab", "abab", "xaba", "ba", "abc\ufffd", "aaaa"])
@pytest.mark.parametrize("stop", ["a", "ab", "aba", "abac", "aaaaab", "cd", "abababab"])
def test_what_may_become_a_stop_text_is_held_back(text, stop):
    bare = text.rstrip("\ufffd")
    held = max((n for n in range(1, len(stop)) if bare.endswith(stop[:n])), default=0)
    assert Answering(stop=("never", stop)).sure(text) == bare[: len(bare) - held]


def test_a_long_stop_text_holds_nobody_up():
    """A client's own, as long as its request may be: it is looked at where it could begin, and not at each length."""

    class Text(str):
        __slots__ = ()
        compared = 0

        def startswith(self, *given):
            Text.compared += 1
            return super().startswith(*given)

    stop = Text("b" + "a" * 2**18)
    assert Answering(stop=(stop,)).sure("a" * 10**4 + "baa") == "a" * 10**4 and Text.compared <= 2
