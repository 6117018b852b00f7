"""Conversations of several rows, and others of the same model with which they are compared."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.memory.generation import Sampling
from jax_ccm.sessions.conversations import Conversations
from tests.sessions.test_conversations import row
from tests.test_chat import experiment

ROWS = 6
BUSY = "session 0 is in the middle of a turn; wait for its end, or give it up"


@pytest.fixture(scope="package")
def made():
    return experiment("ccm_concat", comp_tokens=2, sink=True)


@pytest.fixture
def talk(made):
    return Conversations(made, ROWS, sampling=Sampling(1.0))


@pytest.fixture
def alone(made):
    """To which the same is said, one after the other."""
    return Conversations(made, ROWS, sampling=Sampling(1.0))


def same(ours: Conversations, theirs: Conversations, *rows: int) -> bool:
    """Whether rows hold the same turns, tokens and memory, bit for bit."""
    told = [
        (ours.state.turns[i], ours.state.tokens[i]) == (theirs.state.turns[i], theirs.state.tokens[i]) for i in rows
    ]
    return all(told) and all(all(map(np.array_equal, row(ours, i), row(theirs, i))) for i in rows)
