"""``python -m jax_ccm.verify``: what passes, what fails and what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jax_ccm import verify
from jax_ccm.config import cli
from jax_ccm.config.loading import load_experiment
from jax_ccm.config.schema import load_config
from jax_ccm.errors import UserError
from jax_ccm.evals import parity
from jax_ccm.evals.parity import differences, print_table, sessions
from jax_ccm.verify import Options
from tests.test_compare import text_config
from tests.test_evaluate import write

pytestmark = pytest.mark.once


def test_passes_without_an_adapter_and_without_data(tmp_path, capsys):
    config = load_config(write(tmp_path / "c.yaml", data={"format": "recall", "test": ["nothing/*.jsonl"]}))
    options = Options(examples=2, steps=2, workdir=tmp_path / "out")
    result = verify.verify(config, options, command="the command")
    printed = capsys.readouterr().out
    assert result["passed"] and "random tokens (the config's data cannot be used" in printed
    assert "a random adapter" in printed and "passed: parallel and recurrent agree" in printed
    assert [row["step"] for row in result["steps"]] == [0, 1, 2]
    # The random B makes the memory matter, and the gradient too.
    assert max(row["memory"] for row in result["steps"]) > 1e-2
    assert result["steps"][0]["memory"] == 0
    assert result["gradient"]["norm"] > 0 and result["gradient"]["relative_gap"] < 1e-4
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "passed"
    assert (tmp_path / "out" / "config.yaml").exists() and (tmp_path / "out" / "metrics.jsonl").exists()


def test_spans_of_the_data_are_used(tmp_path, capsys):
    """Where the data draw spans, these are what is run, with the text outside of them."""
    config = load_config(text_config(tmp_path, ratio=0.5, span=3))
    options, experiment = Options(examples=2, steps=3, gradients=False), load_experiment(config)
    given = (config.data, experiment.tokenizer, experiment.method, experiment.model_config.vocab_size)
    examples, source = sessions(*given, examples=2, steps=3)
    assert source == "windows of data.test" and [len(example.segments) for example in examples] == [4, 2]
    assert any(segment.kept.any() for example in examples for segment in example.segments[:-1])
    assert verify.verify(config, options)["passed"]
    assert "windows of data.test" in capsys.readouterr().out


def test_data_that_keep_nothing_are_refused_where_nothing_else_is_seen(tmp_path):
    config = load_config(text_config(tmp_path, method={"name": "scattered"}))
    with pytest.raises(UserError, match="'scattered' sees only text that the data keep, and these keep none"):
        verify.verify(config, Options())


def test_a_difference_fails(tmp_path, monkeypatch, capsys):
    """A recurrence that is off by a little exits with 1."""
    config = write(tmp_path / "c.yaml")
    right = parity.recurrent_logits
    slightly = lambda *args, **options: [row + 1e-3 for row in right(*args, **options)]
    monkeypatch.setattr(parity, "recurrent_logits", slightly)
    monkeypatch.setattr("sys.argv", ["verify", config, "--gradients", "False", "--examples", "2", "--steps", "2"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(verify.main)
    printed = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "FAILED" in printed and "sessions of data.test" in printed


def test_nothing_to_see_is_said(tmp_path, capsys, monkeypatch):
    """A memory that moves nothing proves nothing, and a NaN does not pass."""
    logits = [np.ones((3, 4), np.float32)]
    broken = [np.full((3, 4), np.nan, np.float32)]
    steps = [np.array([0, 1, 1])]
    assert [row["passed"] for row in differences(logits, broken, logits, steps)] == [False, False]
    fine = differences(logits, logits, logits, steps)
    assert [(row["step"], row["tokens"], row["memory"], row["passed"]) for row in fine] == [
        (0, 1, 0, True),
        (1, 2, 0, True),
    ]
    print_table({"steps": fine, "passed": True}, sees_memory=True)
    assert "says little" in capsys.readouterr().out


def test_bad_input(tmp_path, monkeypatch, capsys):
    config = write(tmp_path / "c.yaml")

    def fails(text, *argv):
        monkeypatch.setattr("sys.argv", ["verify", config, *argv])
        with pytest.raises(SystemExit) as stopped:
            cli.run(verify.main)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and text in err

    fails("no parallel form to compare with; check it with --method.streaming False", "--method.streaming", "True")
    fails("'streaming_llm' takes indices in the cache as positions: it has no parallel form to compare with\n",
          "--method.name", "streaming_llm", "--method.comp_tokens", "None")  # fmt: skip
    fails("is not there", "--adapter", str(tmp_path / "nothing"))
    fails("--examples is 0", "--examples", "0")
    fails("--steps is 0", "--steps", "0")
