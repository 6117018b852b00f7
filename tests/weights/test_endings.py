"""A reply ends at any of the tokens that the model's files name."""

import dataclasses
import json

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import Answering
from jax_ccm.sessions.turns import Turns
from jax_ccm.weights.endings import end_tokens
from tests.test_chat import experiment
from tests.weights import ggufs
from tests.weights.test_parity import GOLDEN


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ('{"eos_token_id": [9, 3, 9]}', '{"eos_token_id": 1}', (3, 9)),
        ('{"eos_token_id": 3}', None, (3,)),
        ('{"bos_token_id": 3}', '{"eos_token_id": [1, 2]}', (1, 2)),
        (None, '{"eos_token_id": 0}', (0,)),
        (None, '{"eos_token_id": null}', ()),
        (None, None, ()),
    ],
)
def test_folders(tmp_path, generation, config, ids):
    for name, text in (("generation_config.json", generation), ("config.json", config)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert end_tokens(tmp_path, 10) == ids


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"generation_config\.json: not JSON .*cut short"),
        ("", "not JSON"),
        ("[1]", "holds a JSON list; an object is needed"),
        ('{"eos_token_id": "a"}', r"generation_config\.json: eos_token_id is 'a'; it must be the id of a token"),
        ('{"eos_token_id": [1, 10]}', r"eos_token_id is \[1, 10\]; .* from 0 to 9"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "gives 'eos_token_id' twice"),
        ('{"eos_token_id": ' + "9" * 5000 + "}", "eos_token_id is inf"),
        ("[" * 100_000, "nested too deep"),
        ("\xff", "not UTF-8 text"),
    ],
)
def test_damaged_files(tmp_path, text, says):
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=says):
        end_tokens(tmp_path, 10)


def test_gguf(tmp_path):
    meta = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 7}
    path = ggufs.convert(GOLDEN / "llama_gqa", tmp_path / "m.gguf", extra_meta=meta)
    assert end_tokens(path, 10) == (3, 5, 7)
    with pytest.raises(UserError, match="tokenizer.ggml.eom_token_id is 7"):
        end_tokens(path, 7)


def test_any_of_them_stops_a_reply(tmp_path):
    """The answer that a model gives is cut where a token is made one that ends it."""
    made = experiment(comp_tokens=2)
    tokens = answer(made)
    assert len(tokens) == 6
    first = tokens.tolist().index(tokens[3])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, int(tokens[3])]}))
    config = dataclasses.replace(made.config, model=dataclasses.replace(made.config.model, tokenizer=str(tmp_path)))
    stopping = dataclasses.replace(made, config=config)
    assert stopping.ends == tuple(sorted({1, 257, int(tokens[3])}))
    np.testing.assert_array_equal(answer(stopping), tokens[:first])


def answer(made) -> np.ndarray:
    """The tokens of an answer."""
    talk = Conversations(made)
    turn = talk.turn(0, "hello there", Answering(max_tokens=6))
    going = Turns(talk.scratch)
    going.join(turn)
    while not going.over:
        going.step()
    return turn.made
