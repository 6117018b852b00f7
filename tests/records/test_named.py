"""Functions that a config names: found, called only if they are meant for it, and given arguments of their types."""

from __future__ import annotations

import subprocess

import pytest

from jax_ccm.errors import UserError
from jax_ccm.records import named


def count(start: int, step: float = 1.0, name: str = "", down: bool = False) -> int:
    return start


def silent(start):
    return start


def test_found():
    assert named.function(f"{__name__}:count", "it", (int, str)) is count


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:f", "no module 'nowhere'"),
        (f"{__name__}:cuont", "did you mean 'count'"),
        (f"{__name__}:subprocess", "unknown function"),
        ("a b:c", "package.module:function"),
        (":f", "package.module:function"),
        ("subprocess:call", "does not say that it returns int; it is not called"),
        (f"{__name__}:silent", "not called. Annotate it: def silent"),
    ],
)
def test_refused(name, message, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError, match=message):
        named.function(name, "it", (int,))


def test_arguments():
    given = {"start": "3", "step": "0.5", "name": "x", "down": "true"}
    assert named.arguments(count, given, "it") == {"start": 3, "step": 0.5, "name": "x", "down": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "lacks the option 'start'"),
        ({"start": "x"}, "'x'; it must be a whole number"),
        ({"start": "1", "down": "yes"}, "write true or false"),
        ({"start": "1", "stop": "2"}, "did you mean 'step'"),
    ],
)
def test_arguments_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        named.arguments(count, given, "it")
