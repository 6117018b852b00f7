"""Where questions look: shares of attention by layer, kind and slot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.config.sections import EvalConfig
from jax_ccm.errors import UserError
from jax_ccm.evals import attended, heatmap
from jax_ccm.methods import build
from jax_ccm.weights.hf import parameters
from tests import cases
from tests.evals.support import random_sessions, session

pytestmark = pytest.mark.once


def indifferent(tokens: int):
    """A model whose queries are 0, so that each token attends to all that it sees alike."""
    model = cases.model(tokens=tokens)
    arrays = parameters(model)
    for name in arrays:
        if "q_proj" in name:
            arrays[name] = jnp.zeros_like(arrays[name])
    return jax.tree.unflatten(jax.tree.structure(model), list(arrays.values()))


def seen(places: int, tail: int) -> float:
    """The share of one key that a tail of so many tokens sees, beside so many others that it sees, too, and itself."""
    return float(np.mean([1 / (places + number + 1) for number in range(tail)]))


@pytest.mark.parametrize("name", ["concat_n2_sink", "concat_n2_recent", "merge_n2_sink", "evict", "concat_streaming"])
def test_uniform_attention_is_shared_by_what_is_seen(name):
    """Counted by hand: sink, slots and text of a session with three chunks and a tail of 1 + 3 tokens."""
    method = (cases.METHODS | cases.RECURRENT)[name]
    example = session([11, 12], [13, 14, 15, 16, 17], [18, 19, 20], [5, 6, 7], target=2)
    found = attended.shares(indifferent(method.num_embeddings), method, [example], rows=2)
    # Start token and separators belong to their segments; with a sink the start token is not of the text.
    chunks, recent = 3, method.recent
    slots = {"concat_n2_sink": 6, "concat_n2_recent": 4, "merge_n2_sink": 2, "evict": 12, "concat_streaming": 6}[name]
    text, sink = (4 if recent else 0), method.sink
    one = seen(sink + slots + text, tail=4)
    layers = cases.CONFIG.num_layers
    assert found["examples"] == 1 and np.shape(found["slots"]) == (layers, slots) and chunks == 3
    np.testing.assert_allclose(found["slots"], one, atol=2e-6)
    np.testing.assert_allclose(found["sink"], sink * one, atol=2e-6)
    np.testing.assert_allclose(found["memory"], slots * one, atol=1e-5)
    np.testing.assert_allclose(np.sum([found[part] for part in heatmap.PARTS], axis=0), 1, atol=2e-6)


def test_slots_are_counted_from_the_newest():
    """Of shorter sessions the newest slots count beside the newest of longer ones; batches change nothing."""
    method = cases.METHODS["concat_n2_sink"]
    model = cases.model(tokens=2)
    examples = [*random_sessions(2, 4), *random_sessions(1, 1, seed=1)]
    found = attended.shares(model, method, examples, rows=2)
    each = [attended.shares(model, method, [example], rows=1) for example in examples]
    assert [np.shape(one["slots"])[1] for one in each] == [8, 8, 2]
    np.testing.assert_allclose(
        np.array(found["slots"])[:, :2], np.mean([np.array(one["slots"])[:, :2] for one in each], axis=0), atol=2e-6
    )
    np.testing.assert_allclose(
        np.array(found["slots"])[:, 2:], np.mean([np.array(one["slots"])[:, 2:] for one in each[:2]], axis=0), atol=2e-6
    )
    np.testing.assert_allclose(found["memory"], np.mean([one["memory"] for one in each], axis=0), atol=2e-6)
    assert heatmap.attention_of(found).axes


def test_without_memory_all_is_text():
    found = attended.shares(cases.model(), build("full"), random_sessions(2, 3), rows=2)
    np.testing.assert_allclose(found["text"], 1, atol=2e-6)
    assert found["slots"] == [[]] * cases.CONFIG.num_layers and heatmap.attention_of(found).axes


def test_it_is_for_questions():
    with pytest.raises(UserError, match="eval.attention=4 is for questions, and eval.by is 'stream'"):
        EvalConfig(by="stream", attention=4)
