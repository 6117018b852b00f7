"""Accuracy by the likelihood of choices.

The reference implementation decides by the sum of log-probabilities (LaMP), or by their mean over tokens (MetaICL),
with one task, poem_sentiment, corrected by what the answer is worth behind ``Output:`` alone; its MetaICL score leaves
out glue-mrpc and, by a slip, the last example of each task. All three decisions are reported, and its own score beside
the plain average over tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_ccm.data.questions import Choice
from jax_ccm.evals.scoring import Scores
from jax_ccm.evals.statistics import Resamples, estimate
from jax_ccm.rules.examples import Example, Segment

CALIBRATED_TASK = "poem_sentiment"
EXCLUDED_TASK = "glue-mrpc"


def answer_tokens(example: Example) -> np.ndarray:
    """The scored tokens of the tail: the answer."""
    tail = example.segments[-1]
    return tail.tokens[tail.scored]


def unconditional(like: Example, examples: Iterable[Example], prefix: np.ndarray) -> dict[bytes, Example]:
    """Each answer that occurs, by itself behind the answer prefix, by the bytes of its tokens.

    Args:
      like: gives the tokens that start a session.
      examples: sessions with all their answers.
      prefix: int32 tokens such as those of ``Output:``.
    """
    found = {}
    for example in examples:
        tokens = answer_tokens(example)
        scored = np.arange(len(prefix) + len(tokens)) >= len(prefix)
        # The prefix is read, and the answer behind it is scored.
        segment = Segment(np.concatenate([prefix, tokens]).astype(np.int32), scored)
        found[tokens.tobytes()] = Example(like.start, like.separator, (segment,), "an answer alone")
    return found


def accuracy(
    questions: Sequence[Choice],
    scores: Sequence[tuple[Scores, ...]],
    alone: Mapping[bytes, float],
    resamples: Resamples,
) -> dict[str, Any]:
    """Shares of questions whose right answer is the most likely one.

    Args:
      questions: what was asked.
      scores: for each question the scores of its answers.
      alone: total log-likelihood of each answer by itself; may be empty.
      resamples: of the questions.

    Returns:
      "sum", "mean" and "calibrated" (`Estimate` over all questions), and for few-shot tasks "tasks", their averages
      "task_mean" and "reference"; empty if the questions have one answer only.
    """
    decided = correct(questions, scores, alone)
    if not decided:
        return {}
    ones = np.ones(len(questions))
    result: dict[str, Any] = {rule: estimate(resamples.mean(values, ones)) for rule, values in decided.items()}
    by_task: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_task.setdefault(question.task, []).append(index)
    if set(by_task) != {""}:
        result["tasks"] = {
            task: {"questions": len(those)} | {rule: float(values[those].mean()) for rule, values in decided.items()}
            for task, those in by_task.items()
        }

        def average(values):
            return float(np.mean([values[those].mean() for those in by_task.values()]))

        result["task_mean"] = {rule: average(values) for rule, values in decided.items()}
        result["reference"] = reference_average(by_task, decided)
    return result


def correct(
    questions: Sequence[Choice], scores: Sequence[tuple[Scores, ...]], alone: Mapping[bytes, float]
) -> dict[str, np.ndarray]:
    """Whether the right answer of each question is the most likely one, by rule of decision.

    Args:
      questions: what was asked.
      scores: for each question the scores of its answers.
      alone: total log-likelihood of each answer by itself; empty for no "calibrated".

    Returns:
      ``float64 [questions]`` of 0 and 1 for "sum", "mean" and "calibrated"; empty if the questions have one answer
      only.
    """
    if all(len(question.examples) == 1 for question in questions):
        return {}
    right: dict[str, list[bool]] = {"sum": [], "mean": [], "calibrated": []}
    for question, found in zip(questions, scores, strict=True):
        total = np.array([-answer.nll.sum() for answer in found])
        # By tokens, too: a long answer has a lower sum in any case.
        values = {"sum": total, "mean": total / [len(answer.nll) for answer in found]}
        if alone:
            values["calibrated"] = total - [alone[answer_tokens(e).tobytes()] for e in question.examples]
        for rule, value in values.items():
            right[rule].append(int(np.argmax(value)) == question.answer)
    return {rule: np.array(values, float) for rule, values in right.items() if values}


def reference_average(by_task: Mapping[str, Sequence[int]], correct: Mapping[str, np.ndarray]) -> float | None:
    """The MetaICL score as the reference implementation computes it, slip included, or None if no task counts.

    Args:
      by_task: the questions of each task, in order.
      correct: 0 or 1 for each question, by rule of decision.
    """
    found = []
    for task, those in by_task.items():
        rule = "calibrated" if CALIBRATED_TASK in task and "calibrated" in correct else "mean"
        # The slip of the reference: the last question of each task is left out. A task of one question then has none.
        if EXCLUDED_TASK not in task and len(those) > 1:
            found.append(correct[rule][list(those)[:-1]].mean())
    return float(np.mean(found)) if found else None
