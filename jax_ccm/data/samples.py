"""A few examples of a config's data: no more records are made and tokenised than it takes to show them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from jax_ccm.data.batches import TrainingSet, prepare
from jax_ccm.data.config import DataConfig
from jax_ccm.data.counts import NothingLeft
from jax_ccm.data.questions import Evaluation
from jax_ccm.data.sources import Records, Source, open_sources
from jax_ccm.rules.types import Method

Made = TypeVar("Made", TrainingSet, Evaluation)


def training(config: DataConfig, method: Method, tokenizer: Any, vocab: int, count: int) -> tuple[TrainingSet, str]:
    """What training draws from, of at least ``count`` units if there are so many, and which records they are of.

    Arguments and errors as `batches.prepare`.
    """
    # What is drawn from all records needs them all; what is tokenised already is not made again.
    if config.mixes_records or config.tokenized is not None:
        return prepare(config, method, tokenizer, vocab), ""
    # Which source an example is of does not matter here.
    sources, some = open_sources(config.train, config.format), dataclasses.replace(config, weights=())
    return _enough(sources, count, lambda source: prepare(some, method, tokenizer, vocab, sources=[source]))


def questions(config: DataConfig, tokenizer: Any, split: str, count: int) -> tuple[Evaluation, str]:
    """What a split's examples are of, as `training`. Arguments and errors as `Evaluation.open`."""
    if config.mixes_records:
        return Evaluation.open(config, tokenizer, split), ""
    sources = open_sources({"validation": config.validation, "test": config.test}[split], config.format)
    return _enough(sources, count, lambda source: Evaluation(config, tokenizer, [source]))


def _enough(sources: Sequence[Source], count: int, load: Callable[[Source], Made]) -> tuple[Made, str]:
    """What is made of some records, spread over all, so that ``count`` units are left where there are so many.

    Raises:
      NothingLeft: if nothing is left of all of them.
    """
    total = sum(map(len, sources))
    looked = min(count, total)
    while True:
        try:
            made = load(_spread(sources, looked))
        except NothingLeft:
            if looked == total:
                raise
        else:
            if len(made.units) >= count or looked == total:
                return made, f", {looked:,} of {total:,} records looked at"
        # Some were dropped: four times as many the next time cost a third more than to have known at once.
        looked = min(4 * looked, total)


def _spread(sources: Sequence[Source], count: int) -> Records:
    """So many of the records of all sources, and what was told of those that never were records."""
    ends = np.cumsum([len(source) for source in sources])
    records, where = [], []
    for place in np.linspace(0, ends[-1] - 1, count).round().astype(int).tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        source, index = sources[number], place - int(ends[number] - len(sources[number]))
        records.append(source[index])
        where.append(source.where(index))
    converted = [source for source in sources if isinstance(source, Records)]
    changed: collections.Counter[str] = collections.Counter()
    for source in converted:
        changed.update(source.changed)
    return Records("some of them", records, where, [each for source in converted for each in source.dropped], changed)
