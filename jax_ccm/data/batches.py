"""The training pipeline: shuffled, drawn anew each epoch, batched to one shape, resumable by index (grain)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np

from jax_ccm.data import documents, tokenized
from jax_ccm.data.config import DataConfig
from jax_ccm.data.counts import NothingLeft, Report
from jax_ccm.data.formats import Format
from jax_ccm.data.sources import Source, open_sources
from jax_ccm.data.units import Unit, Units
from jax_ccm.errors import UserError
from jax_ccm.rules import examples
from jax_ccm.rules import rows as layout
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.examples import Example
from jax_ccm.rules.types import Method


def caps(config: DataConfig, method: Method) -> layout.Sizes:
    """The static sizes of a training batch."""
    chunks = config.max_chunks
    if method.chunk is not None:
        # As many as the row has places for, whatever chunks the data have.
        # Each takes its text, with repetition the same again, and the tokens that close it.
        chunks = config.tokens // (method.chunk * (2 if method.repeat else 1) + len(method.closes))
    return layout.Sizes(config.tokens, layout.most_slots(method, config.tokens, chunks), config.scored)


def joined(example: Example, join: float, uncompressed: float, rng: np.random.Generator) -> Example:
    """Joins neighbouring context chunks at random; sometimes the whole context, into the tail.

    Args:
      example: the session.
      join: probability for each pair of neighbouring context chunks. The tail stays by itself.
      uncompressed: probability of joining everything into the tail instead.
      rng: draws; the same number of them for every choice.
    """
    count = len(example.segments)
    # Of count segments the last is the tail, so that there are count - 2 places between context chunks.
    whole, cuts = rng.random() < uncompressed, rng.random(max(count - 2, 0)) >= join
    if count == 1 or (cuts.all() and not whole):
        return example
    if whole:
        return examples.join(example, [count])
    # The context chunk that each group begins with, and where the last one ends.
    bounds = np.flatnonzero(np.concatenate([[True], cuts, [True]]))
    return examples.join(example, [*(int(size) for size in np.diff(bounds)), 1])


def buckets(config: DataConfig, method: Method) -> list[layout.Sizes]:
    """The sizes that batches of a config may have, from small to large; the last is `caps`."""
    most = caps(config, method)

    def scored(tokens):
        # In proportion to the tokens, rounded up.
        return -(-config.scored * tokens // config.tokens)

    return [layout.Sizes(tokens, most.memory, scored(tokens)) for tokens in (*sorted(config.buckets), config.tokens)]


class Batches(Iterator[Batch], Protocol):
    """Batches that can be gone on with where they were left."""

    def get_state(self) -> dict[str, Any]:
        """Where it stands: a small dict for JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there: the same batches follow."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Tokenised training data of a config, all of which fits the static sizes.

    Attributes:
      config: the data config.
      method: the method that the rows are laid out for.
      vocab_size: V.
      format: draws examples.
      units: what it draws from, source by source where they have weights.
      places: int64 ``[units]``, the most places of a row that a draw of each needs.
      report: how many records are used, how many were dropped and why.
      parts: how many of the units are of each source; one number for all where sources have no weights.
      digest: of the units, where they were tokenised before; else "".
    """

    config: DataConfig
    method: Method
    vocab_size: int
    format: Format
    units: Units
    places: np.ndarray
    report: Report
    parts: tuple[int, ...]
    digest: str

    def draw(self, unit: Unit, rng: np.random.Generator) -> Example:
        """A training example: joined, closed by so many tokens, and repeated, at random as config and method say."""
        example = joined(self.format.draw(unit, rng), self.config.join, self.config.uncompressed, rng)
        if self.method.min_comp_tokens is not None:
            count = int(rng.integers(self.method.min_comp_tokens, len(self.method.closes) + 1))
            example = dataclasses.replace(example, num_comp_tokens=count)
        if self.method.repeat is not None and self.method.repeat_share < 1:
            example = dataclasses.replace(example, repeats=bool(rng.random() < self.method.repeat_share))
        return example

    def iterator(self, *, seed: int, rows: Sequence[int] | None = None) -> Batches:
        """An endless iterator over numpy batches.

        It is a grain iterator. Each epoch has its own order and its own draws. What the batches are, and the
        state, is the same whoever asks for which rows: the data do not depend on the number of processes, and no
        record is lost or read twice.

        Args:
          seed: of order and draws, unless the config has its own.
          rows: which of the ``batch_size`` rows to give (those of this process); None for all.

        Raises:
          UserError: for rows that the batch does not have.
        """
        import grain

        size = self.config.batch_size
        rows = range(size) if rows is None else rows
        if not rows or min(rows) < 0 or max(rows) >= size:
            raise UserError(f"rows {list(rows)} of a batch of data.batch_size={size}; they must lie in 0..{size - 1}")
        seed = seed if self.config.shuffle_seed is None else self.config.shuffle_seed
        # Everything is in memory already: threads would only fight for the interpreter lock.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        # Units stand source by source; these are the numbers of each.
        ends = np.cumsum([0, *self.parts])
        numbers = [np.arange(first, end) for first, end in zip(ends, ends[1:], strict=False)]
        # A repeated MapDataset counts on: index // len is the epoch for the shuffle, and the index seeds the draw.
        if self.config.buckets:
            # All rows are drawn everywhere, because all of them together say which bucket holds the batch.
            data = self._mixed([own[self.groups(self.places[own], seed)] for own in numbers], self.draw_group, seed)
            batches = data.map(functools.partial(self.batch, rows=rows))
            return cast(Batches, iter(batches.to_iter_dataset(options)))
        # Row r of batch i is draw i * batch_size + r, whichever process asks for it.
        drawn = self._mixed(numbers, lambda number, rng: self.draw(self.units[number], rng), seed)
        batches = grain.MapDataset.range(len(drawn) // size)
        batches = batches.map(lambda i: self.batch([drawn[i * size + r] for r in rows]))
        return cast(Batches, iter(batches.to_iter_dataset(options)))

    def _mixed(self, sources: Sequence[Sequence[Any]], draw: Callable[..., Any], seed: int) -> Any:
        """An endless data set of draws; those of several sources by their weights."""
        import grain

        data = [grain.MapDataset.source(those).seed(seed).shuffle().random_map(draw).repeat() for those in sources]
        return data[0] if len(data) == 1 else grain.MapDataset.mix(data, self.config.weights)

    def groups(self, lengths: np.ndarray, seed: int) -> np.ndarray:
        """Numbers of units in batches of similar length: sorted, ties by chance, and cut; the last overlaps another.

        Args:
          lengths: of the units.
          seed: of the chance.

        Returns:
          int64 ``[batches, batch_size]``.
        """
        # The last key sorts first: by length, and by chance among equal lengths.
        order = np.lexsort((np.random.default_rng(seed).random(len(lengths)), lengths))
        size = self.config.batch_size
        # Fewer units than rows: some stand in a batch more than once.
        if len(order) < size:
            order = np.resize(order, size)
        starts = [*range(0, len(order) - size + 1, size), *([len(order) - size] if len(order) % size else [])]
        return np.stack([order[start : start + size] for start in starts])

    def draw_group(self, group: np.ndarray, rng: np.random.Generator) -> list[Example]:
        """Examples of the units with these numbers, each from draws of its own."""
        # Not by `rng.spawn`: grain resets one generator for each index, but not the count of its children, so that a
        # draw would depend on how many came before it in this process.
        seeds = rng.integers(2**63, size=len(group))
        return [self.draw(self.units[i], np.random.default_rng(seed)) for i, seed in zip(group, seeds, strict=True)]

    def batch(self, examples: list[Example], rows: Sequence[int] | None = None) -> Batch:
        """Rows as arrays of the smallest sizes allowed that hold all examples.

        Args:
          examples: of a whole batch, or, where there is one size only, of some of its rows.
          rows: which of the examples to lay out; None for all.
        """
        return layout.batch(self.method, examples, buckets(self.config, self.method), self.vocab_size, rows=rows)


def prepare(
    config: DataConfig,
    method: Method,
    tokenizer: Any,
    vocab_size: int,
    *,
    sources: Sequence[Source] | None = None,
    format: Format | None = None,
) -> TrainingSet:
    """Opens and tokenises the training data, and drops what does not fit the static sizes.

    Args:
      config: the data config.
      method: the method to lay rows out for.
      tokenizer: a fast tokenizer of transformers; None for the recall task.
      vocab_size: V of the model.
      sources: records of your own, in place of those that ``config.train`` names.
      format: how records become examples, in place of that which ``config.format`` names.

    Raises:
      UserError: for unreadable data, a token outside the vocabulary, data of which nothing fits, or joining with a
        method that has no chunks to join.
    """
    config.require(method)
    format = format or documents.build(config, tokenizer)
    given: Sequence[Any] = config.train if sources is None else sources
    if config.weights and len(given) != len(config.weights):
        raise UserError(f"data.weights has {len(config.weights)} numbers for {len(given)} sources; give one for each")
    groups = [[one] for one in given] if config.weights else [given]
    if sources is not None:
        digest, loaded = "", [_loaded(format, method, group, vocab_size) for group in groups]
    elif config.tokenized is not None:
        stored = tokenized.Stored.open(config, format, tokenizer)
        needs = stored.needs(config, format, method)
        stored.require(vocab_size)
        whole = range(len(given))
        numbers = [whole[n : n + 1] for n in whole] if config.weights else [whole]
        digest, loaded = stored.digest, [stored.part(own, needs) for own in numbers]
    else:
        opened = (open_sources(group, config.format) for group in groups)
        digest, loaded = "", [_loaded(format, method, group, vocab_size) for group in opened]
    report = functools.reduce(Report.joined, (own for _, _, own in loaded))
    most = caps(config, method)
    found = [_fitting(needs, most, config, report) for _, needs, _ in loaded]
    report.kept = sum(map(len, found))
    if not report.kept:
        raise NothingLeft("training", report)
    for name, own in zip(config.train, found, strict=False):
        if not len(own):
            raise UserError(f"data.weights: nothing of {name!r} is left ({report}); raise the limits, or leave it out")
    # The needs are places, slots and scored tokens.
    places = np.concatenate([needs[own, 0] for (_, needs, _), own in zip(loaded, found, strict=True)])
    units = Units([own for own, _, _ in loaded], found)
    if digest:
        # Which of the stored units are used is decided by limits of the config, and belongs to the digest.
        digest = hashlib.sha256(digest.encode() + b"".join(own.tobytes() for own in found)).hexdigest()
    return TrainingSet(config, method, vocab_size, format, units, places, report, tuple(map(len, found)), digest)


def _loaded(format: Format, method: Method, sources: Sequence[Source], vocab: int) -> tokenized.Part:
    """Sources, tokenised now."""
    units, report = format.load(sources)
    tokenized.require_known(units, vocab)
    return units, tokenized.measured(format, method, units), report


def _fitting(needs: np.ndarray, most: layout.Sizes, config: DataConfig, report: Report) -> np.ndarray:
    """Numbers of the units that fit the static sizes, of those whose needs are given; the report counts the others."""
    over = needs > np.array([most.tokens, most.memory, most.scored])
    # For each unit the number of the first limit that it exceeds, or 3: it fits.
    first = np.where(over.any(1), over.argmax(1), len(over[0]) if len(over) else 0)
    reasons = (
        f"of more than data.tokens={config.tokens} places",
        f"of more than data.max_chunks={config.max_chunks} chunks",
        f"with more than data.scored={config.scored} scored tokens",
    )
    for number, reason in enumerate(reasons):
        if count := int((first == number).sum()):
            report.dropped[reason] += count
    return np.flatnonzero(first == len(reasons))


def train_iterator(
    config: DataConfig,
    method: Method,
    tokenizer: Any,
    vocab_size: int,
    *,
    seed: int,
    rows: Sequence[int] | None = None,
    log: Callable[[str], None] = print,
) -> Batches:
    """`prepare`, a line on what is used and what was dropped through ``log``, and `TrainingSet.iterator`."""
    data = prepare(config, method, tokenizer, vocab_size)
    log(f"training data: {data.report}")
    return data.iterator(seed=seed, rows=rows)
