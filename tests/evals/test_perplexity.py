"""Perplexity by time step, the wrong-memory control and the shares."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jax_ccm.data.config import DialogueConfig
from jax_ccm.data.questions import Choice, Evaluation, wrong_memory_choices
from jax_ccm.data.sources import Records
from jax_ccm.errors import UserError
from jax_ccm.evals import perplexity
from jax_ccm.evals.perplexity import Measured, Stage, System
from jax_ccm.evals.scoring import Scores
from jax_ccm.methods import build
from jax_ccm.rules.types import Kind
from tests import cases
from tests.data import support as data
from tests.evals.support import SMALL, bigram, random_sessions, session

pytestmark = pytest.mark.once


def questions(*examples) -> list[Choice]:
    return [Choice((example,), 0) for example in examples]


def stage(step: int, examples) -> Stage:
    right = questions(*examples)
    return Stage(step, right, wrong_memory_choices(right))


def rigged(right, wrong=None) -> Measured:
    """Scores as given: a list of losses for each question."""
    made = lambda rows: [(Scores(np.array(row, float), np.zeros(len(row), bool)),) for row in rows]
    return Measured(made(right), None if wrong is None else made(wrong), np.ones(len(right)), {})


def test_perplexity_is_weighted_by_tokens_and_leaves_the_end_out():
    """Trap 15, by hand: two samples of 3 and 1 target tokens; the end of sequence does not count."""
    records = [{"turns": ["a", "b", "abc"]}, {"turns": ["b", "a", "c"]}]
    config = DialogueConfig(separator="|")
    evaluation = Evaluation(config, data.tokenizer(), [Records("r", records)])
    rng = np.random.default_rng(0)
    table = rng.normal(size=(data.VOCAB, data.VOCAB)) * 3
    model = bigram(table)
    stages = perplexity.stages(evaluation, [1])
    measured = perplexity.measure(System("full", model, build("full"), ""), stages, rows=2)
    (row,) = perplexity.summarise(stages, {"full": measured}, 4)
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    losses = []
    for text in (" abc", " c"):
        tokens = [*data.ids("|"), *data.ids(text)]
        losses.append([-log_p[a, b] for a, b in zip(tokens[len(data.ids("|")) - 1 :], data.ids(text), strict=False)])
    assert [len(x) for x in losses] == [len(data.ids(" abc")), len(data.ids(" c"))] and len(losses[0]) > len(losses[1])
    total, count = sum(map(sum, losses)), sum(map(len, losses))
    cell = row["systems"]["full"]
    assert row["tokens"] == count and row["examples"] == 2
    assert cell["perplexity"].value == pytest.approx(np.exp(total / count), rel=1e-5)
    assert cell["nll_by_example"] == pytest.approx(np.mean([np.mean(x) for x in losses]), rel=1e-5)
    # The end of sequence stands behind the target, and is not scored.
    tail = stages[0].right[0].examples[0].segments[-1]
    assert tail.tokens[-1] == data.tokenizer().eos_token_id and not tail.scored[-1]


def test_shares_by_hand():
    stages = [stage(1, random_sessions(2, 1)), stage(2, random_sessions(2, 2, seed=1))]
    measured = {
        "none": [rigged([[2.0, 2.0], [2.0, 2.0]])] * 2,
        "full": [rigged([[1.0, 1.0], [1.0, 1.0]], [[2.2, 2.2], [2.2, 2.2]])] * 2,
        "memory": [rigged([[1.3, 1.3], [1.3, 1.3]], [[1.6, 1.6], [1.6, 1.6]])] * 2,
        "full_lora": [rigged([[0.6, 0.6], [0.6, 0.6]], [[2.1, 2.1], [2.1, 2.1]])] * 2,
    }
    *_, row = perplexity.summarise(stages, measured, 8)
    assert row["step"] == "all" and row["examples"] == 4 and row["tokens"] == 8
    assert row["gap_closed"].value == pytest.approx(0.7)
    assert row["content_share"].value == pytest.approx(0.25)
    assert row["gap_closed_to_full_lora"].value == pytest.approx(0.5)
    assert row["content_share_to_full_lora"].value == pytest.approx(0.2)
    assert row["systems"]["memory"]["wrong"]["minus_right"].value == pytest.approx(0.3)
    assert row["systems"]["memory"]["kv_bytes"] == 8


def test_a_memory_that_is_only_a_soft_prompt_has_no_content():
    stages = [stage(1, random_sessions(2, 1))]
    measured = {
        "none": [rigged([[2.0], [2.0]])],
        "full": [rigged([[1.0], [1.0]], [[2.0], [2.0]])],
        "memory": [rigged([[1.2], [1.2]], [[1.2], [1.2]])],
    }
    (row,) = perplexity.summarise(stages, measured, 1)
    assert row["gap_closed"].value == pytest.approx(0.8)
    assert row["content_share"].value == 0


def test_the_control_sees_whether_memory_is_read():
    model = cases.model(tokens=2, config=SMALL)
    method = build("ccm_concat", comp_tokens=2)
    deaf = tuple(clause for clause in method.rule.sees if Kind.MEMORY not in clause.key)
    deaf_method = dataclasses.replace(method, rule=dataclasses.replace(method.rule, sees=deaf))
    # Contexts of equal length: otherwise the positions of the tail, too, would tell one from another.
    examples = [session([20 + i, 30], [7, 40 + i], [9, 50 + i, 60], target=2, id=str(i)) for i in range(4)]
    stages = [stage(2, examples)]
    cells = {}
    for name, rule in (("memory", method), ("deaf", deaf_method), ("none", build("none"))):
        (found,) = perplexity.measure(System(name, model, rule, ""), stages, rows=4)
        cells[name] = found
    losses = lambda side: np.concatenate([scores[0].nll for scores in side])
    assert abs(losses(cells["memory"].right) - losses(cells["memory"].wrong)).max() > 1e-2
    np.testing.assert_allclose(losses(cells["deaf"].right), losses(cells["deaf"].wrong), atol=1e-5)
    assert cells["none"].wrong is None
    assert cells["memory"].slots.tolist() == [4.0] * 4 and cells["none"].slots.tolist() == [0.0] * 4


def test_stages_of_few_records():
    config = DialogueConfig(separator="|")
    evaluation = Evaluation(config, data.tokenizer(), [Records("r", data.dialogues(3, 3, 3, 4, 4))])
    one, two = perplexity.stages(evaluation, [1, 2, 9], most=4)
    assert (one.step, len(one.right), two.step, len(two.right)) == (1, 4, 2, 2)
    assert one.wrong is not None
    with pytest.raises(UserError, match="no record has as many as 9 context chunks"):
        perplexity.stages(evaluation, [9])
    single = Evaluation(config, data.tokenizer(), [Records("r", data.dialogues(3))])
    (only,) = perplexity.stages(single, [1])
    assert only.wrong is None and "at least 2 sessions" in only.note
    uniform = bigram(np.zeros((data.VOCAB, data.VOCAB)))
    run = lambda name: perplexity.measure(System(name, uniform, build(name), ""), [only], rows=1)
    measured = {name: run(name) for name in ("none", "full")}
    (row,) = perplexity.summarise([only], measured, 4)
    assert "wrong" not in row["systems"]["full"] and "at least 2 sessions" in row["note"]
    assert row["systems"]["full"]["perplexity"].value == pytest.approx(data.VOCAB, rel=1e-4)
