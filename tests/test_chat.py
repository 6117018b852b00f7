"""Conversations: memory of constant size, the same numbers as the recurrence, clear mistakes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_ccm import layout, methods, sharding, steps
from jax_ccm.chat import Conversation
from jax_ccm.closing import Closing
from jax_ccm.config import from_mapping
from jax_ccm.errors import UserError
from jax_ccm.experiment import Experiment
from jax_ccm.types import Kind
from tests import cases


def experiment(name="ccm_concat", **method):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i + 2 for i, c in enumerate(alphabet)} | {"<s>": 0, "</s>": 1}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    config = from_mapping({"method": {"name": name, **method}, "cache": {"memory_capacity": 12, "raw_capacity": 64}})
    model = cases.model(tokens=2, vocab_size=len(tokenizer))
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    return Experiment(config, model, methods.build(name, **method), tokenizer, mesh)


@pytest.mark.parametrize("independent", [False, True])
def test_turns_become_memory(independent):
    session = Conversation(experiment(comp_tokens=2, sink=True, independent=independent), max_tokens=6)
    for turn in range(1, 4):
        session.say("hello there")
        slots, ours, full = session.memory_bytes()
        assert slots == 1 + 2 * turn and ours == slots * cases.CONFIG.kv_bytes_per_slot(4) and full > ours
        assert not (np.asarray(session.cache.slots.kind) == Kind.QUERY).any()
    # Answers depend on what was said before, and not if the memory is left out.
    other = Conversation(experiment(comp_tokens=2, sink=True, independent=independent), max_tokens=6)
    assert other.say_without_memory("hello there") == session.say_without_memory("hello there")
    other.say("what else")
    assert np.abs(np.asarray(other.cache.v - session.cache.v)[:, 0, 1]).max() > 1e-3


def test_methods_that_cut_text_themselves():
    """LoMA compresses every full chunk, question and answer alike; what is left over stays raw across turns."""
    session = Conversation(experiment("loma", ratio=4, memory_tokens=2), max_tokens=6)
    for _ in range(2):
        session.say("hello there")
        tokens = int(session.cache.tokens[0])
        kinds = np.asarray(session.cache.slots.kind)
        assert (kinds == Kind.MEMORY).sum() == tokens // 8 * 2
        assert ((kinds == Kind.TEXT) | (kinds == Kind.QUERY)).sum() == tokens % 8
    assert tokens > 32


def test_turns_become_spans():
    """With Sentinel tokens a turn is a span: one slot, and no text is kept."""
    session = Conversation(experiment("sentinel"), max_tokens=6)
    for turn in range(1, 4):
        session.say("hello there")
        kinds = np.asarray(session.cache.slots.kind)
        assert (kinds == Kind.MEMORY).sum() == turn and (kinds != Kind.PAD).sum() == turn


def test_spans_within_turns():
    """Question and answer are closed while they are read and made; what is left is the turn's last span."""
    session, slots = Conversation(experiment("sentinel"), max_tokens=6, closing=Closing(4)), 0
    for _ in range(2):
        before = int(session.cache.tokens[0])
        session.say("hello there")
        slots += -(-(int(session.cache.tokens[0]) - before) // 4)
        kinds = np.asarray(session.cache.slots.kind)
        assert (kinds == Kind.MEMORY).sum() == slots == session.memory_bytes()[0]
    with pytest.raises(UserError, match="compresses chunks that saw no memory"):
        Conversation(experiment(comp_tokens=2, independent=True), closing=Closing(4))


def test_gist_compresses_everything_anew():
    """The memory is that of the whole conversation as one chunk; online, each turn stays by itself."""
    made = experiment("gist", comp_tokens=2)
    session = Conversation(made, max_tokens=3)
    for _ in range(2):
        session.say("hello")
    assert session.cache.tokens.tolist() == [len(session.said)] and session.cache.chunks.tolist() == [1]
    chunk = layout.chunk([session.said], len(session.said), made.model_config.vocab_size)
    whole = steps.compress_step(made.model, session.empty(), chunk, method=made.method)
    np.testing.assert_allclose(session.cache.k, whole.k, atol=1e-5)
    assert session.memory_bytes()[0] == 2
    with pytest.raises(UserError, match="compresses the whole conversation anew .* cache.raw_capacity=64"):
        session.say("x" * 50)
    assert session.turns == 2
    session = Conversation(experiment("gist", comp_tokens=2, online=True), max_tokens=3)
    for turn in range(1, 3):
        session.say("hello")
        assert session.memory_bytes()[0] == 2 * turn


def test_mistakes():
    session = Conversation(experiment(comp_tokens=2), max_tokens=6)
    with pytest.raises(UserError, match="turn is empty"):
        session.say("  ")
    with pytest.raises(UserError, match="raise cache.raw_capacity"):
        session.say("x" * 70)
    for _ in range(6):
        session.say("a")
    with pytest.raises(UserError, match="larger memory_capacity"):
        session.say("a")
    recall = dataclasses.replace(experiment(comp_tokens=2), tokenizer=None)
    with pytest.raises(UserError, match="can chat"):
        Conversation(recall)
