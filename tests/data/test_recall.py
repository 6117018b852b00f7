"""The recall task."""

import numpy as np
import pytest

from jax_ccm.data.recall import START, Recall, example
from jax_ccm.errors import UserError
from jax_ccm.methods import ccm
from jax_ccm.rules import rows


def test_a_session():
    task = Recall(facts=8, names=20, things=30)
    assert task.vocab_size == 51
    for index in range(50):
        record = task.record("train", 0, index)
        session = example(record)
        facts = [tuple(segment.tokens) for segment in session.segments[:-1]]
        tail = session.segments[-1]
        assert len(facts) == 8 and len({name for name, _ in facts}) == 8
        assert all(1 <= name <= 20 < thing <= 50 for name, thing in facts)
        assert sorted(map(tuple, tail.tokens.reshape(-1, 2))) == sorted(facts)
        assert tail.scored.tolist() == [False, True] * 8
        assert session.start.tolist() == [START]
    batch = rows.batch(ccm.concat(1), [session], rows.Sizes(41, 8, 8), task.vocab_size)
    assert set(batch.steps[0]) == {8} and (batch.targets > 20).all()


def test_draws():
    task = Recall()
    assert task.record("train", 0, 1) == task.record("train", 0, 1)
    assert task.record("train", 0, 1) != task.record("test", 0, 1) != task.record("test", 1, 1)
    records = [task.record("train", 0, index) for index in range(500)]
    for part, low in ((0, 1), (1, 51)):
        counts = np.bincount([fact[part] - low for record in records for fact in record["facts"]], minlength=50)
        assert len(counts) == 50 and counts.min() > 40 and counts.max() < 130  # 80 on average
    first = np.bincount([record["asked"][0] for record in records], minlength=8)
    assert first.min() > 30


def test_first_facts_only():
    record = {"facts": [[1, 11], [2, 12], [3, 13]], "asked": [2, 1, 0]}
    assert example(record, facts=2).segments[-1].tokens.tolist() == [2, 12, 1, 11]


def test_too_many_facts():
    with pytest.raises(UserError, match="9 facts need as many different names, there are 8"):
        Recall(facts=9, names=8)
