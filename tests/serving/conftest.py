"""One server for the tests of a module, and what a conversation alone would answer."""

from __future__ import annotations

import openai
import pytest

from jax_ccm.sessions.conversations import Conversations
from tests.serving.clients import ROWS, serving
from tests.test_chat import experiment


@pytest.fixture(scope="module")
def made():
    return experiment("ccm_concat", comp_tokens=2, sink=True)


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with serving(made, folder / "sessions", slots=folder / "slots") as found:
        yield found


@pytest.fixture
def url(server):
    return server[0]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def oracle(made):
    """Answers of one conversation at a time."""
    talk = Conversations(made, ROWS)

    def answers(turns, max_tokens=4):
        talk.reset(0)
        return [talk.say({0: text}, max_tokens=max_tokens)[0] for text in turns]

    return answers
