"""Models whose likelihoods are known by hand, and sessions to score."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.nn import AdapterConfig, ModelConfig, Transformer
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.weights.hf import parameters
from tests import cases

SMALL = dataclasses.replace(cases.CONFIG, num_layers=2)


def bigram(table: np.ndarray, tokens: int = 0) -> Transformer:
    """A model that predicts the next token from the last one alone.

    Args:
      table: ``[V, V]``, row a holds the logits of what follows token a.
      tokens: compression tokens of its adapter.
    """
    vocab = len(table)
    config = ModelConfig("llama", vocab, vocab, 8, 1, 2, 1, 4, norm_eps=0.0)
    model = Transformer(jax.random.key(0), config, AdapterConfig(rank=2, tokens=tokens))
    arrays = parameters(model)
    for name in ("layers.self_attn.o_proj.kernel", "layers.mlp.down_proj.kernel"):
        arrays[name] = jnp.zeros_like(arrays[name])
    # The norm of a one-hot vector has a one of size sqrt(V).
    arrays["embed_tokens.embedding"] = jnp.eye(vocab)
    arrays["lm_head.kernel"] = jnp.asarray(table, jnp.float32) / np.sqrt(vocab)
    return jax.tree.unflatten(jax.tree.structure(model), list(arrays.values()))


def session(*segments, target: int, id: str = "", start=(1,), separator=(2,)) -> Example:
    """A session of token lists, of which the last ``target`` tokens of the tail are scored."""
    made = [Segment(np.array(tokens, np.int32), np.zeros(len(tokens), bool)) for tokens in segments]
    made[-1].scored[len(segments[-1]) - target :] = True
    return Example(np.array(start, np.int32), np.array(separator, np.int32), tuple(made), id)


def random_sessions(count: int, chunks: int, vocab: int = cases.VOCAB, seed: int = 0) -> list[Example]:
    """Sessions of random text; each has its own id."""
    rng = np.random.default_rng(seed)
    text = lambda: rng.integers(10, vocab, rng.integers(2, 6)).tolist()
    return [
        session(*(text() for _ in range(chunks)), [*text(), 5, 6], target=2, id=f"{seed}:{i}") for i in range(count)
    ]
