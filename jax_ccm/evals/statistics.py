"""Means over tokens, shares, and how sure one can be of them: a bootstrap over dialogues."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
# Differences smaller than this many nats a token are too close to zero to divide by.
SMALLEST_GAP = 1e-3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
      value: computed on all examples; None where it is undefined.
      error: bootstrap standard error.
      low, high: bootstrap 95 % interval (percentiles).
    """

    value: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | list[float | None] | None]:
        """Plain values, rounded to 6 digits behind the point."""

        def plain(x):
            return None if x is None else round(float(x), 6)

        return {"value": plain(self.value), "error": plain(self.error), "ci95": [plain(self.low), plain(self.high)]}


class Resamples:
    """Bootstrap weights of examples, the same for every quantity, so that differences are paired.

    Whole groups are drawn: examples of one dialogue are not independent of each other.
    """

    def __init__(self, groups: Sequence[Hashable], resamples: int = RESAMPLES, seed: int = 0):
        """Draws the weights.

        Args:
          groups: for each example the dialogue (or record) that it comes from.
          resamples: number of draws.
          seed: of the draws.
        """
        # By their texts: ids of different types have no order of their own.
        _, member = np.unique([repr(group) for group in groups], return_inverse=True)
        self.groups = int(member.max(initial=-1)) + 1
        rng = np.random.default_rng(seed)
        # [resamples, groups], how often each is drawn: weights in place of copies.
        draws = rng.multinomial(self.groups, np.full(self.groups, 1 / max(self.groups, 1)), size=resamples)
        # The first row is the sample itself.
        self._weights = np.concatenate([np.ones((1, self.groups)), draws])[:, member]

    def mean(self, totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``float64 [1 + resamples]``: sum of totals over sum of counts, the sample's own first.

        Args:
          totals: ``float64 [examples]``.
          counts: ``float64 [examples]``.
        """
        # A resample in which nothing is counted is not a number, and is left out by `estimate`.
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self._weights @ totals) / (self._weights @ counts)


def estimate(values: np.ndarray) -> Estimate:
    """An `Estimate` of values whose first is the sample's own and the rest its resamples."""
    if not np.isfinite(values[0]):
        return Estimate(None)
    draws = values[1:][np.isfinite(values[1:])]
    if len(draws) < 2:
        return Estimate(float(values[0]))
    # Percentiles, so that intervals of ratios and of perplexities need not be symmetric.
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(values[0]), float(draws.std(ddof=1)), float(low), float(high))


def share(part: np.ndarray, whole: np.ndarray) -> Estimate:
    """An `Estimate` of ``part / whole``; undefined where the whole is not clearly above zero."""
    # A resample whose whole is about zero says nothing of a share.
    usable = whole > SMALLEST_GAP
    ratio = np.where(usable, part / np.where(usable, whole, 1.0), np.nan)
    return estimate(ratio)


def tree_to_json(tree: Any) -> Any:
    """Nested dicts and lists with every `Estimate` replaced by plain values."""
    if isinstance(tree, Estimate):
        return tree.to_json()
    if isinstance(tree, dict):
        return {str(key): tree_to_json(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [tree_to_json(value) for value in tree]
    return tree
