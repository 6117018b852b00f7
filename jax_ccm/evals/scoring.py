"""Likelihoods of scored tokens for many examples of many lengths, in a few compiled shapes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.evals.recurrent import filled, losses_and_hits, same_context, score_recurrently
from jax_ccm.evals.slots import context_slots
from jax_ccm.memory.losses import scored_logits
from jax_ccm.memory.steps import parallel_forward
from jax_ccm.nn.positions import warn_beyond
from jax_ccm.nn.transformer import Transformer
from jax_ccm.records import output, paths
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.rows import Sizes, arrange, batch, measure
from jax_ccm.rules.types import Method

# What compiling one more shape costs, in tokens of forward pass: a second or two of a CPU, more of anything faster.
SHAPE_COST = {"cpu": 1024}
SHAPE_COST_ELSEWHERE = 65536


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model thinks of the scored tokens of one example, in their order.

    Attributes:
      nll: ``float64 [q]``, negative log-likelihood in nats.
      hit: ``bool [q]``, whether the token is the most likely one.
    """

    nll: np.ndarray
    hit: np.ndarray


# What scores are computed by: parts of the library, and packages.
PARTS = (
    "attention", "distributed", "errors.py", "evals/recurrent.py", "evals/replies.py", "evals/scoring.py",
    "evals/slots.py", "evals/streaming.py", "memory", "methods", "nn", "numerics", "records", "rules", "weights",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "gguf")
# Of a file of scores.
ARRAYS = ("lengths", "nll", "hit")


@functools.cache
def code(folder: Path = Path(__file__).parents[1]) -> str:
    """A digest of all that computes scores: the sources of `PARTS` in ``folder`` and the versions of `PACKAGES`."""
    digest = hashlib.sha256(repr(output.versions(PACKAGES)).encode())
    for part in PARTS:
        path = folder / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()}:{len(content)}:".encode() + content)
    return digest.hexdigest()


class Store:
    """Scores on disk, so that baselines are run once for many adapters and an interrupted evaluation goes on.

    A file holds what one call of `score`, or of `replies.answer`, has computed. Its name is a digest of everything that
    decides it, the library's own code included: a changed library computes anew.
    """

    def __init__(self, folder: str | Path):
        self.folder = paths.usable(folder, "--store")

    def path(self, identity: str, method: Method, examples: Sequence[Example], what: str = "") -> Path:
        """The file for these examples.

        Args:
          identity: says which weights score them, and in which precision.
          method: what they are run with.
          examples: the sessions, in order.
          what: what else decides the result; "" for scores.
        """
        digest = hashlib.sha256(f"{code()}|{identity}|{method!r}|{what}|{len(examples)}".encode())
        for example in examples:
            pieces = [example.start, example.separator]
            # Lengths in front of the numbers: pieces cut otherwise are other examples.
            for s in example.segments:
                pieces += [s.tokens, s.scored, s.scored[:0] if s.kept is None else s.kept]
            for piece in pieces:
                digest.update(f"{len(piece)}:".encode() + piece.astype("<i4").tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.npz"

    def load(self, path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The arrays of these names in a file, or None if it is not there.

        Raises:
          UserError: for a damaged file.
        """
        if not path.exists():
            return None
        try:
            with path.open("rb") as stored, np.load(stored) as file:
                return {name: file[name] for name in names}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
            raise UserError(f"{path} cannot be read as stored scores ({e}); remove it to compute them again") from e

    def save(self, path: Path, **arrays: np.ndarray) -> None:
        """Writes a file, as a whole or not at all."""
        # Made in memory, so that the file can be put in its place as a whole.
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        paths.write(path, content.getvalue())


def once(
    store: Store | None,
    identity: str,
    method: Method,
    examples: Sequence[Example],
    names: Sequence[str],
    compute: Callable[[], dict[str, np.ndarray]],
    *,
    what: str = "",
    log: Callable[[str], None],
    about: str,
) -> dict[str, np.ndarray]:
    """What was computed for these examples before and stored, or is computed now.

    Args:
      store: where it is kept, or None.
      identity, method, examples, what: which it is (`Store.path`).
      names: of the arrays.
      compute: gives them.
      log: takes a line where they were stored.
      about: how that line begins, such as "memory: 24 examples, scored".

    Raises:
      UserError: for a damaged file.
    """
    if store is None:
        return compute()
    path = store.path(identity, method, examples, what)
    found = store.load(path, names)
    if found is None:
        store.save(path, **(found := compute()))
    else:
        log(f"{about} before ({path})")
    return found


def base_only(method: Method) -> Method:
    """The method with the adapter's LoRA switched off: a gate of zeros leaves the base model's layers bit for bit."""
    return dataclasses.replace(method, gate=())


def trimmed(example: Example) -> Example:
    """The example without what stands behind its last scored token, such as an unscored end of sequence.

    Attention is causal, so it changes no score.
    """
    tail = example.segments[-1]
    used = int(np.flatnonzero(tail.scored)[-1]) + 1 if tail.scored.any() else len(tail.tokens)
    kept = None if tail.kept is None else tail.kept[:used]
    tail = Segment(tail.tokens[:used], tail.scored[:used], kept)
    return dataclasses.replace(example, segments=(*example.segments[:-1], tail))


def _text_tokens(example: Example) -> int:
    between = len(example.separator) * (len(example.segments) - 1)
    return len(example.start) + between + sum(len(segment.tokens) for segment in example.segments)


def shapes(lengths: Sequence[int] | np.ndarray, rows: int, shape_cost: int) -> list[int]:
    """Padded lengths that make the total work smallest: padding is paid for in tokens, each shape costs a compilation.

    Args:
      lengths: tokens of each example.
      rows: rows of a batch; the last batch of a shape may hold idle ones, which are counted.
      shape_cost: what a shape costs, in tokens.

    Returns:
      Increasing lengths; an example takes the first that holds it.
    """
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: least cost of the j shortest lengths, by dynamic programming over where the last shape begins.
    best, begins = np.zeros(len(values) + 1), np.zeros(len(values) + 1, int)
    for j in range(1, len(values) + 1):
        # [j]: batches, if the last shape began behind each of the j shorter lengths; idle rows are paid for, too.
        batches = -(-(before[j] - before[:j]) // rows)
        cost = best[:j] + batches * rows * values[j - 1] + shape_cost
        begins[j] = int(np.argmin(cost))
        best[j] = cost[begins[j]]
    chosen, j = [], len(values)
    while j:
        chosen.append(int(values[j - 1]))
        j = int(begins[j])
    return chosen[::-1]


def score(
    model: Transformer,
    method: Method,
    examples: Sequence[Example],
    *,
    rows: int = 4,
    repeats: bool = False,
    capacity: int | None = None,
    store: Store | None = None,
    identity: str = "",
    log: Callable[[str], None] | None = None,
    name: str = "",
) -> list[Scores]:
    """Scores examples by the parallel forward, or by the recurrence, which equals it (`jax_ccm.evals.parity`).

    The recurrence serves methods that have no parallel form, sessions that would hold more memory than they may, and
    questions that share contexts (several answers to choose from, or a session that is also another's wrong memory) if
    it then reads less than half as much.

    Args:
      model: the decoder with its adapter.
      method: what the examples are run with.
      examples: sessions of any lengths.
      rows: rows of a batch.
      repeats: score the repetition of closed chunks, too, behind the text's own (`Method.repeat`).
      capacity: memory slots of a session beyond which the oldest are forgotten; None for any number.
      store: where scores are kept; None to compute them in any case.
      identity: of the weights and the precision, for the store.
      log: takes a line on the work done.
      name: of the work, for that line.

    Returns:
      `Scores` of each example, in the order given.
    """
    log = log or (lambda line: None)
    if not repeats:
        method = dataclasses.replace(method, repeat=None)
    examples = [trimmed(example) for example in examples]
    if not examples:
        return []
    if not forgets(method, examples, capacity):
        capacity = None
    warn_beyond(model.config, method, tokens=max(map(_text_tokens, examples)), forgets=capacity is not None)

    def compute() -> dict[str, np.ndarray]:
        if capacity is not None or method.recurrent_only or _shares(method, examples):
            start = time.perf_counter()
            found = score_recurrently(model, method, examples, rows=rows, capacity=capacity)
            scores = [Scores(*pair) for pair in found]
            log(f"{name}: {len(examples):,} examples, chunk by chunk, {time.perf_counter() - start:.0f} s")
        else:
            scores = _in_parallel(model, method, examples, rows, lambda line: log(f"{name}: {line}"))
        # Examples have different numbers of scored tokens: one behind the other, with their lengths.
        nll, hit = (np.concatenate([getattr(x, key) for x in scores]) for key in ("nll", "hit"))
        return {"lengths": np.array([len(x.nll) for x in scores]), "nll": nll, "hit": hit}

    about = f"{name}: {len(examples):,} examples, scored"
    what = "" if capacity is None else f"of {capacity} slots"
    found = once(store, identity, method, examples, ARRAYS, compute, what=what, log=log, about=about)
    nll, hit = (np.split(found[key], np.cumsum(found["lengths"])[:-1]) for key in ("nll", "hit"))
    return [Scores(*pair) for pair in zip(nll, hit, strict=True)]


def forgets(method: Method, examples: Sequence[Example], capacity: int | None) -> bool:
    """Whether any of the sessions comes to hold more memory slots than there is room for."""
    return capacity is not None and any(
        context_slots(method, example) > context_slots(method, example, capacity) for example in examples
    )


def _in_parallel(
    model: Transformer, method: Method, examples: Sequence[Example], rows: int, log: Callable[[str], None]
) -> list[Scores]:
    """`score` by the parallel forward, in a few shapes; while one batch is computed the next is laid out."""
    needs = [measure(method, example) for example in examples]
    lengths = np.array([need.tokens for need in needs])
    chosen = shapes(lengths, rows, SHAPE_COST.get(jax.default_backend(), SHAPE_COST_ELSEWHERE))
    # The first shape that holds each.
    shape_of = np.searchsorted(chosen, lengths)
    found: list[Scores | None] = [None] * len(examples)
    start, computed = time.perf_counter(), 0
    pending: list[tuple[np.ndarray, Batch, tuple[jax.Array, jax.Array]]] = []
    for number in range(len(chosen)):
        members = np.flatnonzero(shape_of == number)
        # Of the members alone: a long example elsewhere enlarges nothing here.
        caps = Sizes.of_all([needs[i] for i in members])
        for first in range(0, len(members), rows):
            those = members[first : first + rows]
            # Idle rows of the last batch repeat an example, so that the shape stays.
            made = batch(method, [examples[i] for i in filled(those.tolist(), rows)], caps, model.config.vocab_size)
            pending.append((those, made, _losses(model, made, method=method)))
            computed += rows * caps.tokens
            if len(pending) > 1:
                # Waits for a batch while the next one is computed already: calls return before the device is done.
                _collect(found, *pending.pop(0))
    for item in pending:
        _collect(found, *item)
    seconds = time.perf_counter() - start
    log(
        f"{len(examples):,} examples, {lengths.sum():,} tokens in {len(chosen)} shapes "
        f"({lengths.sum() / computed:.0%} filled), {seconds:.0f} s, {lengths.sum() / seconds:,.0f} tokens/s"
    )
    return [x for x in found if x is not None]


def _shares(method: Method, examples: Sequence[Example]) -> bool:
    """Whether reading each context once for all its tails is less than half of the work."""
    if method.context == "dropped":
        return False
    arranged = [arrange(method, example) for example in examples]
    lengths = [[len(segment.tokens) for segment in segments] for segments in arranged]
    contexts = sum(sum(lengths[those[0]][:-1]) for those in same_context(arranged))
    return 2 * (contexts + sum(length[-1] for length in lengths)) < sum(map(sum, lengths))


@functools.partial(jax.jit, static_argnames="method")
def _losses(model: Transformer, made: Batch, *, method: Method):
    """Losses ``float32 [B, Q]`` and hits ``bool [B, Q]`` of the scored tokens."""
    hidden = parallel_forward(model, made, method=method)  # [B, T, D]
    logits = scored_logits(model, hidden, made)  # [B, Q, V]
    return losses_and_hits(logits, made.targets)


def _collect(found: list[Scores | None], rows: np.ndarray, made: Batch, arrays) -> None:
    losses, hits = (np.asarray(x) for x in arrays)
    for row, index in enumerate(rows):
        used = made.weights[row] > 0
        found[index] = Scores(losses[row][used].astype(np.float64), hits[row][used])
