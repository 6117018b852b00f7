"""Methods and data of a user's own, named in a config, without an edit of the library."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from jax_ccm import methods
from jax_ccm.config import adapters, cli
from jax_ccm.config.loading import build_method
from jax_ccm.config.schema import Config, from_mapping, load_config, save_config, to_mapping
from jax_ccm.data.batches import prepare
from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError
from jax_ccm.training.run import Run
from tests import pretrained

METHOD = '''
"""CCM-concat that forgets."""

from jax_ccm import Kind, Method, Rule, Token, see


def recent(comp_tokens: int = 1, chunks: int = 3) -> Method:
    """CCM-concat of the last chunks.

    Args:
      comp_tokens: n, compression tokens after each chunk.
      chunks: how many chunks are remembered.
    """
    text, comp = (Kind.TEXT, Kind.QUERY), Kind.COMP
    clauses = see((*text, comp), text, 0, 0), see(comp, comp, 0, 0), see((*text, comp), Kind.MEMORY, 1, chunks)
    closes = tuple(Token(comp, embedding_index=k, offset=k) for k in range(comp_tokens))
    return Method(name="recent", rule=Rule(clauses), closes=closes, gate=(comp,))


def other() -> Method:
    return 3


def untyped(chunks=3) -> Method:
    return recent(chunks=chunks)
'''
DATA = """
from jax_ccm.data.sources import Records


def told(size: int = 4, name: str = "Ann") -> Records:
    return Records("told", [{"turns": [f"{name} {i}", "hi", "who?", name]} for i in range(size)])


def wrong() -> Records:
    return Records("wrong", [{"text": "no turns"}])
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Two modules in the folder of the command."""
    (tmp_path / "own_method.py").write_text(METHOD)
    (tmp_path / "own_data.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)


def write(tmp_path, text: str):
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


def test_a_method_by_its_name():
    method = methods.build("own_method:recent", comp_tokens=2, chunks=1)
    assert method.name == "recent" and len(method.closes) == 2 and method.rule.sees[-1].farthest == 1
    with pytest.raises(UserError, match="did you mean 'chunks'"):
        methods.build("own_method:recent", chunk=2)
    with pytest.raises(UserError, match="returned 3; it must return a Method"):
        methods.build("own_method:other")
    with pytest.raises(UserError, match="does not say that it returns Method"):
        methods.build("json:dumps")


def test_its_options_are_config_keys(tmp_path):
    path = write(tmp_path, "method: {name: own_method:recent, comp_tokens: 2, chunks: 5}")
    config = load_config(path)
    assert build_method(config).rule.sees[-1].farthest == 5
    assert from_mapping(to_mapping(config)) == config
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert adapters.chosen(config)["method"] == {"name": "own_method:recent", "comp_tokens": 2, "chunks": 5}
    with pytest.raises(UserError, match="method.chunsk.*did you mean 'method.chunks'"):
        load_config(write(tmp_path, "method: {name: own_method:recent, chunsk: 5}"))
    with pytest.raises(UserError, match="has no type; annotate it"):
        load_config(write(tmp_path, "method: {name: own_method:untyped}"))
    with pytest.raises(UserError, match="method.chunks is 'x'"):
        load_config(write(tmp_path, "method: {name: own_method:recent, chunks: x}"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Nothing."""

    adapter: str = ""
    """An adapter."""


def test_its_options_are_on_the_command_line(tmp_path, capsys):
    path = str(write(tmp_path, "method: {name: own_method:recent}"))
    _, config = cli.parse(Options, [path, "--method.chunks", "7"], command="jax_ccm.x")
    assert config.method.options() == {"chunks": 7}
    with pytest.raises(SystemExit):
        cli.parse(Options, [path, "--help"], command="jax_ccm.x")
    assert "how many chunks are remembered" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    # Named on the command line alone, its defaults hold.
    _, config = cli.parse(
        Options, [str(write(tmp_path, "{}")), "--method.name", "own_method:recent"], command="jax_ccm.x"
    )
    assert build_method(config).name == "recent"


def test_data_by_their_name(tmp_path):
    (source,) = open_sources(["python:own_data:told?size=3&name=Ida"], "dialogue")
    assert len(source) == 3 and source[1]["turns"][0] == "Ida 1"
    with pytest.raises(UserError, match=r"wrong\[0\]: the record has no field 'turns'"):
        open_sources(["python:own_data:wrong"], "dialogue")
    with pytest.raises(UserError, match="did you mean 'size'"):
        open_sources(["python:own_data:told?sise=3"], "dialogue")
    with pytest.raises(UserError, match="does not say that it returns Records"):
        open_sources(["python:subprocess:call?args=ls"], "dialogue")


def test_records_in_memory():
    """The library takes a source as it is."""
    import own_data  # type: ignore

    config = dataclasses.replace(Config().data, batch_size=2, tokens=64, scored=16)
    method = methods.build("ccm_concat")
    data = prepare(config, method, pretrained.tokenizer(), 300, sources=[own_data.told(3)])
    assert data.report.kept == 3
    batch = next(data.iterator(seed=0))
    assert batch.tokens.shape == (2, 64) and np.asarray(batch.weights).any()


@pytest.mark.once
def test_a_run_with_both(tmp_path, monkeypatch):
    """Trained, found again by the adapter's folder; an adapter from elsewhere runs no code that its config names."""
    pretrained.make_base(tmp_path / "base")
    own = {"method": {"name": "own_method:recent", "chunks": 2}, "data": {"train": ["python:own_data:told?size=4"]}}
    config = pretrained.config(tmp_path, **own)
    Run(config, tmp_path / "run").train()
    found = adapters.open_config(str(tmp_path / "run" / "adapter"))
    assert build_method(found) == build_method(config) and found.data.train == ("python:own_data:told?size=4",)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run" / "adapter", elsewhere)
    monkeypatch.setattr(adapters, "locate_adapter", lambda name: elsewhere)
    with pytest.raises(UserError, match="names code, own_method:recent, which does not come with an adapter"):
        adapters.open_config("someone/adapter")
    text = (elsewhere / "config.yaml").read_text().replace("own_method:recent", "ccm_concat")
    (elsewhere / "config.yaml").write_text(text.replace("  chunks: 2\n", ""))
    with pytest.raises(UserError, match="names code, python:own_data"):
        adapters.open_config("someone/adapter")
