"""Parallel against recurrent: the same logits, losses and gradients by both roads."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from jax_ccm.data.config import DataConfig
from jax_ccm.errors import UserError
from jax_ccm.evals.recurrent import cache_for, caps_for, stream
from jax_ccm.memory.cache import check
from jax_ccm.memory.losses import mean_loss, scored_logits
from jax_ccm.memory.steps import compress, parallel_forward, read
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.rows import arrange, batch
from jax_ccm.rules.types import MemoryCache, Method

# Of the largest logit of a time step (at least 1), and of the norm of the gradient.
LOGIT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Large enough that a wrong gate shows, small enough that the model stays itself.
RANDOM_B = 0.05


def everything_scored(example: Example) -> Example:
    """The example with every text token of every segment as a target."""
    segments = tuple(dataclasses.replace(s, scored=np.ones(len(s.tokens), bool)) for s in example.segments)
    return dataclasses.replace(example, segments=segments)


def target_steps(method: Method, examples: Sequence[Example]) -> list[np.ndarray]:
    """For each example ``int32 [q]``: how many chunks were closed before each scored token (its time step)."""
    found = []
    for example in examples:
        row = arrange(method, example)
        number = np.repeat(np.arange(len(row)), [len(segment.tokens) for segment in row])
        scored = np.concatenate([segment.scored for segment in row])
        scored[0] = False  # the first token of a session is not predicted
        found.append(number[scored].astype(np.int32))
    return found


def parallel_logits(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    with_memory: bool = True,
) -> list[np.ndarray]:
    """Logits that predict the scored tokens, by one parallel forward.

    Args:
      model: the decoder with its adapter.
      method: the compression method.
      examples: the sessions; scored tokens may stand in any segment.
      with_memory: False hides every memory slot: what the same text does without its memory.

    Returns:
      For each example ``float32 [q, V]``, in the order of its scored tokens.
    """
    # Only training lays repetition out; a session has none.
    method = dataclasses.replace(method, repeat=None)
    made = batch(method, examples, caps_for(method, examples), model.config.vocab_size)
    if not with_memory:
        made = without_memory(made)
    logits = np.asarray(_parallel(model, made, method=method))
    return [row[used > 0] for row, used in zip(logits, made.weights, strict=True)]


def without_memory(made: Batch) -> Batch:
    """The batch with its memory hidden from everybody."""
    if made.memory is None:
        return made
    # Of kind PAD, which no rule sees.
    slots = dataclasses.replace(made.memory.slots, kind=np.zeros_like(made.memory.slots.kind))
    return dataclasses.replace(made, memory=dataclasses.replace(made.memory, slots=slots))


def recurrent_logits(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    cache: MemoryCache | None = None,
) -> list[np.ndarray]:
    """Logits that predict the scored tokens, by `read` and `compress` chunk by chunk; sessions of any lengths together.

    Args:
      model: the decoder with its adapter.
      method: the compression method.
      examples: the sessions.
      cache: an empty cache; None makes one with just enough room.

    Returns:
      As `parallel_logits`.

    Raises:
      UserError: if the cache given is too small.
    """
    sessions = stream(method, examples)
    state: MemoryCache = cache_for(model, method, examples) if cache is None else cache
    found: list[list[np.ndarray]] = [[] for _ in examples]

    def collect(logits, weights):
        logits = np.asarray(logits)
        for row, values, used in zip(found, logits, weights, strict=True):
            row.append(values[used > 0])

    for time in range(sessions.context.tokens.shape[0]):
        chunk = jax.tree.map(operator.itemgetter(time), sessions.context)
        state, logits = _read(model, state, chunk, method=method, query=False)
        collect(logits, sessions.weights[0][time])
        state = _compress(model, state, chunk.valid.any(axis=1), method=method)
    state, logits = _read(model, state, sessions.tail, method=method, query=True)
    collect(logits, sessions.weights[1])
    # Once, at the end: what was lost or spoiled on the way stays noted in the cache.
    check(state)
    return [np.concatenate(row) for row in found]


def parallel_gradients(model: Transformer, method: Method, examples: Sequence[Example]) -> tuple[float, Any]:
    """Mean loss of the scored tokens and its gradient with respect to the adapter, by the parallel forward.

    Returns:
      The loss, and a tree of float32 arrays of the adapter's structure.
    """
    method = dataclasses.replace(method, repeat=None)
    made = batch(method, examples, caps_for(method, examples), model.config.vocab_size)
    # The most specific type first: LoRAParam is also a Param.
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    loss, gradients = _parallel_gradients(adapter, base, made, graphdef=graphdef, method=method)
    return float(loss), gradients


def recurrent_gradients(model: Transformer, method: Method, examples: Sequence[Example]) -> tuple[float, Any]:
    """As `parallel_gradients`, differentiating through the recurrence (a `jax.lax.scan` over chunks)."""
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    sessions, cache = stream(method, examples), cache_for(model, method, examples)
    arrays = (sessions.context, sessions.tail, sessions.targets, sessions.weights)
    loss, gradients = _recurrent_gradients(adapter, base, cache, arrays, graphdef=graphdef, method=method)
    return float(loss), gradients


def gradient_gap(ours: Any, theirs: Any) -> float:
    """Norm of the difference of two gradients over the norm of the first; 0 if both are zero."""

    def norm(trees):
        return np.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in trees))

    # In float64: squares of small gradients would be rounded away.
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    difference = norm([np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs])
    return difference / max(norm([a for a, _ in pairs]), np.finfo(np.float32).tiny)


@functools.partial(jax.jit, static_argnames="method")
def _parallel(model, made, *, method):
    hidden = parallel_forward(model, made, method=method)  # [B, T, D]
    return scored_logits(model, hidden, made)


_read = jax.jit(read, static_argnames=("method", "query"))
_compress = jax.jit(compress, static_argnames="method")


@functools.partial(jax.jit, static_argnames=("graphdef", "method"))
def _parallel_gradients(adapter, base, made, *, graphdef, method):
    def loss(adapter):
        model = nnx.merge(graphdef, adapter, base)
        return mean_loss(model, parallel_forward(model, made, method=method), made, method)[0]

    return jax.value_and_grad(loss)(adapter)


@functools.partial(jax.jit, static_argnames=("graphdef", "method"))
def _recurrent_gradients(adapter, base, cache, arrays, *, graphdef, method):
    context, tail, targets, weights = arrays

    def loss(adapter):
        model = nnx.merge(graphdef, adapter, base)

        # The backward pass computes each chunk anew, instead of keeping the activations of all of them.
        @jax.checkpoint
        def step(cache, scanned):
            chunk, targets, weights = scanned
            cache, logits = read(model, cache, chunk, method=method)
            cache = compress(model, cache, jnp.any(chunk.valid, axis=1), method=method)
            return cache, _total_loss(logits, targets, weights)

        closed, losses = jax.lax.scan(step, cache, (context, targets[0], weights[0]))
        _, logits = read(model, closed, tail, method=method, query=True)
        total = jnp.sum(losses) + _total_loss(logits, targets[1], weights[1])
        # The mean over all scored tokens, as the parallel loss has it.
        return total / jnp.maximum(jnp.sum(weights[0]) + jnp.sum(weights[1]), 1.0)

    return jax.value_and_grad(loss)(adapter)


def _total_loss(logits, targets, weights):
    """Sum of weighted losses for logits ``[B, C, V]``, targets and weights ``[B, C]``."""
    return jnp.sum(cross_entropy(logits, targets) * weights)


def differences(
    parallel: Sequence[np.ndarray],
    recurrent: Sequence[np.ndarray],
    bare: Sequence[np.ndarray],
    steps: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """Differences by time step.

    Args:
      parallel, recurrent: logits ``[q, V]`` of each session by both roads.
      bare: the same with the memory hidden.
      steps: ``int32 [q]``, chunks closed before each token.

    Returns:
      For each time step "step", "tokens", "gap" (largest difference), "largest" (logit), "allowed", "memory" (largest
      move when the memory is hidden) and "passed".
    """
    rows = []
    for step in range(max(int(row.max(initial=0)) for row in steps) + 1):
        # A session of few tokens may have none at a step.
        def pick(rows, step=step):
            return [x[s == step] for x, s in zip(rows, steps, strict=True) if (s == step).any()]

        ours, theirs, without = pick(parallel), pick(recurrent), pick(bare)
        if not ours:
            continue

        def difference(a, b):
            return max(float(np.max(np.abs(x - y))) for x, y in zip(a, b, strict=True))

        largest = max(float(np.max(np.abs(x))) for x in ours)
        # A sum of products is off by parts of its size: a fixed tolerance would be loose for small logits and tight for
        # large.
        gap, allowed = difference(ours, theirs), LOGIT_TOLERANCE * max(1.0, largest)
        row = {"step": step, "tokens": sum(len(x) for x in ours), "gap": gap, "largest": largest, "allowed": allowed}
        # Comparing this way round, a NaN does not pass.
        rows.append(row | {"memory": difference(ours, without), "passed": bool(gap <= allowed)})
    return rows


def sessions(
    data: DataConfig,
    tokenizer: Any,
    method: Method,
    vocab: int,
    *,
    examples: int,
    steps: int,
    random_tokens: bool = False,
    seed: int = 0,
) -> tuple[list[Example], str]:
    """Sessions to run: of the config's data if it can be read, else of random tokens.

    Returns:
      Examples with different numbers of chunks, and what they are.
    """
    # Different numbers of chunks, so that rows that have ended go on beside others.
    counts = np.linspace(steps, 1, examples).round().astype(int)
    reason = "random tokens are asked for"
    if not random_tokens:
        try:
            return from_data(data, tokenizer, method, [int(count) for count in counts])
        except UserError as error:
            reason = f"the config's data cannot be used: {error}"
    print(f"random tokens ({reason})")
    rng = np.random.default_rng(seed)

    def text(low, high):
        return rng.integers(0, vocab, int(rng.integers(low, high))).astype(np.int32)

    def unscored(tokens):
        return Segment(tokens, np.zeros(len(tokens), bool))

    start, separator = text(1, 2), text(2, 3)
    made = [
        Example(start, separator, tuple(unscored(text(3, 12)) for _ in range(count + 1)), f"random session {number}")
        for number, count in enumerate(counts)
    ]
    return made, "random tokens"


def from_data(data: DataConfig, tokenizer: Any, method: Method, counts: Sequence[int]) -> tuple[list[Example], str]:
    from jax_ccm.data.questions import Evaluation

    split = next((name for name in ("validation", "test") if getattr(data, name)), None)
    if split is None:
        raise UserError("data.validation and data.test are empty")
    evaluation = Evaluation.open(data, tokenizer, split)
    if evaluation.config.draws_spans:
        # Windows with their spans, up to as many of them as are wanted.
        texts = evaluation.texts(marked=method.heeds_marks)
        windows = [texts[number % len(texts)] for number in range(len(counts))]

        def shorter(example, count):
            return dataclasses.replace(example, segments=example.segments[: count + 1])

        return list(map(shorter, windows, counts)), f"windows of data.{split}"
    found = []
    for number, count in enumerate(counts):
        # The longest context that there is, up to the one wanted.
        for step in range(count, 0, -1):
            examples = evaluation.examples(step)
            if examples:
                found.append(examples[number % len(examples)])
                break
    if not found:
        raise UserError(f"data.{split} has no record with a chunk of context")
    return found, f"data.{split}"


def with_adapter(model: Transformer, path: str | Path | None, *, random_b: bool, seed: int) -> tuple[Transformer, str]:
    """The model to check, and what its adapter is called."""
    if path:
        return model, f"the adapter of {path}"
    if not random_b or model.adapter is None or not model.adapter.rank:
        return model, "an untrained adapter (its LoRA does nothing)"
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    leaves, tree = jax.tree_util.tree_flatten_with_path(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        # B alone: A is drawn when an adapter is made, and B is zero then.
        RANDOM_B * jax.random.normal(key, leaf.shape, leaf.dtype) if "lora_b" in jax.tree_util.keystr(path) else leaf
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    adapter = jax.tree.unflatten(tree, drawn)
    described = f"a random adapter: no trained one was given, and its B is drawn with deviation {RANDOM_B}"
    return nnx.merge(graphdef, adapter, base), f"{described} (seed {seed})"


def print_table(result: dict[str, Any], sees_memory: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("time step", "tokens", "largest logit", "parallel - recurrent", "allowed", "without memory", ""):
        table.add_column(column, justify="right")

    def verdict(passed):
        return "ok" if passed else "FAILED"

    for row in result["steps"]:
        table.add_row(str(row["step"]), str(row["tokens"]), f"{row['largest']:.2f}", f"{row['gap']:.2e}",
                      f"{row['allowed']:.2e}", f"{row['memory']:.2e}", verdict(row["passed"]))  # fmt: skip
    Console(width=100).print(table)
    if "gradient" in result:
        gradient = result["gradient"]
        print(
            f"adapter gradient: |parallel - recurrent| / |parallel| = {gradient['relative_gap']:.2e} "
            f"(allowed {GRADIENT_TOLERANCE:.0e}, norm {gradient['norm']:.3g}) {verdict(gradient['passed'])}"
        )
    moved = max(row["memory"] for row in result["steps"])
    if sees_memory and moved < 1e-3:
        print(f"note: hiding the memory moves logits by {moved:.1e} at most; with this adapter the check says little")
    print("passed: parallel and recurrent agree" if result["passed"] else "FAILED: parallel and recurrent differ")
