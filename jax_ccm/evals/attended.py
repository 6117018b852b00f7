"""Where a question looks: its attention to the sink, to each slot of memory, and to text, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_ccm.evals.heatmap import PARTS
from jax_ccm.evals.perplexity import Stage
from jax_ccm.evals.recurrent import behind_contexts, fit
from jax_ccm.memory.steps import attention_shares
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.examples import Example
from jax_ccm.rules.types import RAW, Kind, Method


def of(
    stages: Sequence[Stage], model: Transformer, method: Method, *, most: int, rows: int, capacity: int | None = None
) -> dict[str, Any]:
    """`shares` of the first questions of some stages, with the right answers."""
    asked = [choice.examples[choice.answer] for stage in stages for choice in stage.right]
    return shares(model, method, asked[:most], rows=rows, capacity=capacity)


def shares(
    model: Transformer, method: Method, examples: Sequence[Example], *, rows: int, capacity: int | None = None
) -> dict[str, Any]:
    """Shares of the attention that questions pay behind their contexts, as JSON.

    Args:
      model: the decoder with its adapter.
      method: what the examples are run with.
      examples: sessions of any lengths, each with a question and its answer as tail.
      rows: rows of a batch.
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.

    Returns:
      ``sink``, ``memory`` and ``text``, ``[L]`` each, which add up to 1: means over examples, over the heads of a layer
      and the tokens of the tail. ``slots``, ``[L][S]``: of ``memory`` each slot, the newest first, a mean over the
      examples that have it. ``examples`` says how many they are.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    slots: list[np.ndarray] = []
    for behind in behind_contexts(model, method, examples, rows=rows, capacity=capacity):
        own, past = map(np.asarray, _shares(model, behind.cache, *fit(behind.sessions.tail), method=method))
        kinds, index = np.asarray(behind.cache.slots.kind), np.asarray(behind.cache.slots.index)
        for row in range(len(behind.numbers)):
            kind, text = kinds[row], np.isin(kinds[row], RAW)
            memory = np.flatnonzero((kind != Kind.PAD) & (kind != Kind.SINK) & ~text)
            # The newest first; of those of one chunk the last.
            memory = memory[np.argsort(index[row][memory], kind="stable")][::-1]
            parts["sink"].append(past[:, row, kind == Kind.SINK].sum(axis=1))
            parts["memory"].append(past[:, row, memory].sum(axis=1))
            parts["text"].append(own[:, row] + past[:, row, text].sum(axis=1))
            slots.append(past[:, row, memory])
    longest = max(each.shape[1] for each in slots)
    means = [
        np.mean([each[:, number] for each in slots if each.shape[1] > number], axis=0) for number in range(longest)
    ]
    found = {name: _rounded(np.mean(each, axis=0)) for name, each in parts.items()}
    by_layer = np.stack(means, axis=1) if means else np.zeros((model.config.num_layers, 0))
    return {"examples": len(slots), **found, "slots": [_rounded(layer) for layer in by_layer]}


@functools.partial(jax.jit, static_argnames="method")
def _shares(model, cache, chunk, *, method):
    return attention_shares(model, cache, chunk, method=method)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
