"""Our side of the comparison with PyTorch: the same weights, tokens, visibility and losses."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_ccm.benchmarks.peer import Step, serve
from jax_ccm.benchmarks.steps import random_text
from jax_ccm.memory.losses import mean_loss
from jax_ccm.memory.steps import parallel_forward
from jax_ccm.methods import build
from jax_ccm.nn import AdapterConfig, Transformer
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.rows import batch, measure
from jax_ccm.rules.types import Array, Method
from jax_ccm.rules.visibility import visible
from jax_ccm.weights import load_model


def rows(method: Method, vocab: int, *, count: int, tokens: int, chunk: int) -> Batch:
    """Rows of random text of so many tokens, those that close a chunk included; all text is scored."""
    each = chunk + len(method.closes)
    chunks = (tokens - 1) // each if method.closes else 0
    text = random_text(vocab, [chunk] * chunks + [tokens - chunks * each])
    return batch(method, [text] * count, measure(method, text), vocab)


def for_peer(made: Batch, method: Method) -> dict[str, np.ndarray]:
    """The same rows for a Transformer that knows one source of keys alone, as `pytorch_peer.make` takes them.

    A memory slot that is a copy of one token's key and value is seen where that token stands.
    """
    # What PyTorch's cross-entropy passes over.
    labels = np.full(made.tokens.shape, -100, np.int64)
    np.put_along_axis(labels, np.asarray(made.indices), np.where(made.weights > 0, made.targets, -100), axis=1)
    arrays = {"tokens": made.tokens, "labels": labels, "position": made.slots.position}
    if made.memory is not None:
        assert made.memory.mix is None and made.memory.share is None
        # bool [B, T, T]; who sees memory sees the place that it was copied from.
        mask = np.array(visible(method.rule, made.slots, made.slots))
        past = np.array(visible(method.rule, made.slots, made.memory.slots))
        for row, source in enumerate(np.asarray(made.memory.source)):
            np.logical_or.at(mask[row], (slice(None), source), past[row])
        arrays["mask"] = mask
    return {name: np.asarray(x) for name, x in arrays.items()}


def make(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Step]]:
    """A step for each precision.

    Args:
      settings: "model", a folder in Hugging Face's format; "method", its name and options; "adapter", None or the
        fields of an `AdapterConfig`; "rows", the arguments of `rows`; "comp", the embeddings of compression tokens;
        "precisions".
    """
    method = build(**settings["method"])
    adapter = None if settings["adapter"] is None else AdapterConfig(**settings["adapter"])
    about = {"python": platform.python_version(), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    steps = {}
    for precision in settings["precisions"]:
        key = None if adapter is None else jax.random.key(0)
        model = load_model(settings["model"], adapter=adapter, key=key, precision=precision)
        made = rows(method, model.config.vocab_size, **settings["rows"])
        if adapter is None:
            steps[precision] = to_embeddings(model, made, method)
        else:
            steps[precision] = to_adapter(model, made, method, np.asarray(settings["comp"], np.float32))
    return about, steps


class Given(nnx.Module):
    """Embeddings that were looked up before."""

    def __init__(self, embeddings: Array, table: nnx.Param):
        self.embeddings, self.embedding = nnx.data(embeddings), table

    def __call__(self, tokens: Array) -> Array:
        return self.embeddings


def to_embeddings(model: Transformer, made: Batch, method: Method) -> Step:
    """Forward and backward to the embeddings of all tokens."""
    graphdef, weights = nnx.split(model)

    def loss_of(embeddings, weights, made):
        model = nnx.merge(graphdef, weights)
        model.embed_tokens = nnx.data(Given(embeddings, model.embed_tokens.embedding))
        return mean_loss(model, parallel_forward(model, made, method=method), made, method)[0]

    step = jax.jit(jax.value_and_grad(loss_of))
    embeddings = model.embed_tokens(jnp.asarray(made.tokens))
    return _step(lambda: step(embeddings, weights, made))


def to_adapter(model: Transformer, made: Batch, method: Method, comp: np.ndarray) -> Step:
    """Forward and backward to the adapter, whose embeddings of compression tokens are given."""
    graphdef, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)
    trained = nnx.to_pure_dict(trained)
    # The same initial embeddings on both sides: otherwise losses could not be compared.
    trained["embed_tokens"]["comp"] = jnp.asarray(comp)

    def loss_of(trained, frozen, made):
        model = nnx.merge(graphdef, trained, frozen)
        return mean_loss(model, parallel_forward(model, made, method=method), made, method)[0]

    step, frozen = jax.jit(jax.value_and_grad(loss_of)), nnx.to_pure_dict(frozen)
    return _step(lambda: step(trained, frozen, made))


def _step(call: Callable[[], tuple[Any, Any]]) -> Step:
    def step() -> Callable[[], dict[str, float]]:
        # Calls return before the device is done.
        loss, gradient = jax.block_until_ready(call())

        def square():
            return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(gradient))

        # Outside of the time that is taken: it is for comparison alone.
        return lambda: {"loss": float(loss), "gradient": float(jnp.sqrt(square()))}

    return step


if __name__ == "__main__":
    serve(make)
