"""Grids of age and length: each cell is the evaluation of its own questions, and is seen where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.data.questions import Choice, wrong_memory_choices
from jax_ccm.evals import heatmap, recall
from jax_ccm.evals.cells import discriminates
from jax_ccm.evals.perplexity import Measured, Stage, summarise, to_json
from jax_ccm.evals.replies import judge
from jax_ccm.evals.scoring import Scores
from tests.evals.support import random_sessions


def questions(age: int, counts: dict[int, int]) -> Stage:
    """So many questions of each number of chunks, mixed."""
    made = [
        example for chunks, many in counts.items() for example in random_sessions(many, chunks, seed=age * 9 + chunks)
    ]
    order = np.random.default_rng(age).permutation(len(made))
    right = [Choice((made[i],), 0) for i in order]
    return Stage(age, right, wrong_memory_choices(right))


def measured(stage: Stage, rate: float, seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    say = lambda chance: [judge("yes" if rng.random() < chance else "no", "yes") for _ in stage.right]
    scores = lambda: [(Scores(rng.random(2), np.ones(2, bool)),) for _ in stage.right]
    slots = np.array([len(q.examples[0].segments) for q in stage.right], float)
    return Measured(scores(), scores(), slots, {}, said=(say(rate), say(0.0)))


@pytest.fixture(scope="module")
def made():
    stages = [questions(1, {2: 4, 5: 6}), questions(3, {5: 5, 9: 3})]
    found = {
        "full": [measured(stages[0], 1.0, 0), measured(stages[1], 0.0, 1)],
        "memory": [measured(stages[0], 0.5, 2), measured(stages[1], 0.5, 3)],
    }
    return stages, found, recall.grid(stages, found, 8)


def test_cells(made):
    stages, found, cells = made
    places = {(cell["age"], *cell["chunks"]): cell["examples"] for cell in cells}
    assert places == {(1, 2, 2): 4, (1, 5, 5): 6, (3, 5, 5): 5, (3, 9, 9): 3}
    for cell in cells:
        number = [1, 3].index(cell["age"])
        own = [i for i, q in enumerate(stages[number].right) if len(q.examples[0].segments) - 1 == cell["chunks"][0]]
        for name, system in cell["systems"].items():
            said, losses = found[name][number].said, found[name][number].right
            assert system["replies"]["contains"]["value"] == pytest.approx(np.mean([said[0][i].contains for i in own]))
            assert system["nll"]["value"] == pytest.approx(np.mean([losses[i][0].nll for i in own]), abs=1e-5)
            assert system["wrong"]["replies"]["contains"]["value"] == 0
            assert system["kv_slots"] == cell["chunks"][0] + 1
    # The cells of an age are the age, taken apart.
    for number, row in enumerate(to_json(summarise(stages, found, 8))[:2]):
        parts = [(c["examples"], c["systems"]["memory"]["replies"]["f1"]["value"]) for c in cells]
        parts = [part for part, c in zip(parts, cells, strict=True) if c["age"] == [1, 3][number]]
        mean = sum(n * value for n, value in parts) / sum(n for n, _ in parts)
        assert row["systems"]["memory"]["replies"]["f1"]["value"] == pytest.approx(mean, abs=1e-5)


def test_what_tells_memories_apart(made):
    _, _, cells = made
    assert [discriminates(cell, "contains") for cell in cells if cell["age"] == 1] == [True, True]
    assert [discriminates(cell, "contains") for cell in cells if cell["age"] == 3] == [False, False]
    assert discriminates(cells[0], "accuracy") is None
    alone = cells[0] | {"dialogues": 1}
    assert discriminates(alone, "contains") is False


def test_one_length_is_no_grid():
    stages = [questions(1, {2: 3}), questions(2, {2: 3})]
    assert recall.grid(stages, {"memory": [measured(stage, 1.0, 0) for stage in stages]}, 8) == []
    assert heatmap.kind_of([]) is None


def test_many_lengths_are_put_together():
    stage = questions(2, {chunks: 2 for chunks in range(3, 26)})
    cells = recall.grid([stage], {"memory": [measured(stage, 1.0, 0)]}, 8)
    assert len(cells) == recall.MOST_LENGTHS and sum(cell["examples"] for cell in cells) == 46
    bounds = [cell["chunks"] for cell in cells]
    assert bounds[0][0] == 3 and bounds[-1][1] == 25
    assert all(before[1] < after[0] for before, after in zip(bounds, bounds[1:], strict=False))


def test_what_is_drawn(made, tmp_path):
    _, _, cells = made
    figure = heatmap.figure_of(cells)
    full, memory = figure.axes[:2]
    assert [place.get_title() for place in figure.axes[:3]] == ["full", "memory", "wrong memory (control)"]
    shown = np.ma.filled(memory.collections[0].get_array(), np.nan)
    assert shown.shape == (3, 2)  # lengths 2, 5, 9 by ages 1, 3
    for cell in cells:
        at = ([2, 5, 9].index(cell["chunks"][0]), [1, 3].index(cell["age"]))
        assert shown[at] == pytest.approx(cell["systems"]["memory"]["replies"]["contains"]["value"])
    assert np.isnan(shown[0, 1]) and np.isnan(shown[2, 0])
    said = [text.get_text().strip() for text in full.texts]
    assert said.count("0.00†") == 2 and "1.00" in said and "n=6" in said
    heatmap.plot(cells, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
