"""Means over tokens and the bootstrap."""

from __future__ import annotations

import numpy as np

from jax_ccm.evals.statistics import Estimate, Resamples, estimate, share, tree_to_json


def test_mean_is_over_tokens_and_resamples_are_of_groups():
    # Two dialogues; the first has two examples.
    resamples = Resamples(["a", "a", "b"], resamples=400)
    totals, counts = np.array([2.0, 4.0, 1.0]), np.array([1.0, 2.0, 1.0])
    mean = resamples.mean(totals, counts)
    assert mean[0] == 7 / 4
    # A draw holds both examples of "a" or none: the mean is 6/3, 7/4 or 1/1.
    assert {round(x, 6) for x in mean[1:]} == {1.0, 1.75, 2.0}
    assert resamples.groups == 2


def test_error_is_that_of_a_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(3.0, 2.0, 400)
    found = estimate(Resamples(range(400)).mean(values, np.ones(400)))
    assert abs(found.error - values.std() / 20) < 0.01
    assert found.low < found.value < found.high
    assert abs((found.high - found.low) - 2 * 1.96 * found.error) < 0.05


def test_share_is_undefined_without_a_gap():
    assert share(np.array([0.5, 0.5, 0.5]), np.array([1.0, 1.0, 1.0])) == Estimate(0.5, 0.0, 0.5, 0.5)
    assert share(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == Estimate(None)
    assert share(np.array([0.5, 0.5]), np.array([-1.0, -1.0])) == Estimate(None)


def test_json():
    plain = tree_to_json({1: [Estimate(0.5, 0.1, 0.3, 0.7)], "none": Estimate(None)})
    assert plain["1"][0] == {"value": 0.5, "error": 0.1, "ci95": [0.3, 0.7]}
    assert plain["none"] == {"value": None, "error": None, "ci95": [None, None]}
