"""Accuracy by the likelihood of choices."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.data.questions import Choice, wrong_memory_choices
from jax_ccm.evals import perplexity, tasks
from jax_ccm.evals.perplexity import Stage, System
from jax_ccm.evals.scoring import Scores
from jax_ccm.evals.statistics import Resamples
from jax_ccm.methods import build
from tests.evals.support import bigram, session


def test_rules_of_decision_on_a_rigged_model():
    """After token 3 the model likes 4, then 5; a long answer of likely tokens loses by its sum and wins by its mean."""
    table = np.zeros((8, 8))
    table[3, 4], table[4, 5], table[5, 6], table[3, 7] = 2.0, 3.0, 3.0, 2.5
    model = bigram(table)
    ask = lambda context, answer, right, number: Choice(
        tuple(session([context, 6], [3, *tokens], target=len(tokens), id=f"q{number}") for tokens in answer), right
    )
    right = [ask(4, ([7], [4, 5, 6]), 0, 0), ask(5, ([7], [4, 5, 6]), 1, 1), ask(7, ([6], [4]), 1, 2)]
    stage = Stage(1, right, wrong_memory_choices(right))
    measured = perplexity.measure(
        System("full", model, build("full"), ""), [stage], rows=4, answer=np.array([3], np.int32)
    )
    (row,) = perplexity.summarise([stage], {"full": measured}, 1)
    found = row["systems"]["full"]["accuracy"]
    # By the sum [7] beats [4, 5, 6]; by the mean it is the other way round.
    assert (found["sum"].value, found["mean"].value) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    totals = [[-s.nll.sum() for s in answers] for answers in measured[0].right]
    assert totals[0][0] > totals[0][1] and totals[0][0] < totals[0][1] / 3
    # Asked behind the same prefix, each answer is worth as much with the question as without: ties, the first wins.
    assert all(abs(v - measured[0].unconditional[tasks.answer_tokens(e).tobytes()]) < 1e-4
               for q, t in zip(right, totals, strict=True) for e, v in zip(q.examples, t, strict=True))  # fmt: skip
    assert row["systems"]["full"]["wrong"]["accuracy"]["sum"].value == found["sum"].value
    assert "tasks" not in found


def scores(*losses) -> tuple[Scores, ...]:
    return tuple(Scores(np.array([loss]), np.zeros(1, bool)) for loss in losses)


def test_averages_over_tasks_and_the_reference_score():
    """The reference leaves out glue-mrpc, calibrates poem_sentiment, and skips each task's last example."""
    answers = ([4], [5])
    question = lambda task: Choice(tuple(session([3], [6, *a], target=1, id=task) for a in answers), 0, task)
    asked, found = [], []
    for task, rights in {"plain": [1, 1, 0, 0], "glue-mrpc": [0, 0], "poem_sentiment": [1, 1, 0]}.items():
        for right in rights:
            asked.append(question(task))
            found.append(scores(1.0, 2.0) if right else scores(2.0, 1.0))
    key = lambda tokens: np.array(tokens, np.int32).tobytes()
    # By itself the first answer is worth 5 nats more: calibration turns every decision to the second.
    alone = {key([4]): -1.0, key([5]): -6.0}
    result = tasks.accuracy(asked, found, alone, Resamples(range(len(asked))))
    assert result["mean"].value == pytest.approx(4 / 9)
    assert result["calibrated"].value == 0
    assert result["task_mean"]["mean"] == pytest.approx((0.5 + 0 + 2 / 3) / 3)
    assert result["tasks"]["plain"] == {"questions": 4, "sum": 0.5, "mean": 0.5, "calibrated": 0.0}
    assert result["reference"] == pytest.approx((2 / 3 + 0) / 2)


def test_no_accuracy_without_choices():
    one = [Choice((session([3], [4], target=1),), 0)]
    assert tasks.accuracy(one, [scores(1.0)], {}, Resamples(["a"])) == {}
