"""``python -m jax_ccm.bench``: what it writes, that its states are the real ones, and its messages; no timing."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jax_ccm import bench
from jax_ccm.benchmarks import baselines, report, turns
from jax_ccm.benchmarks.settings import Options
from jax_ccm.config import cli
from jax_ccm.config.schema import load_config
from jax_ccm.methods import build
from jax_ccm.rules.types import Kind
from tests import cases

pytestmark = pytest.mark.once

TURN = 6
BASELINES = baselines.compared("ccm_merge", dict(comp_tokens=2, sink=True), capacity=6, window=9)


@pytest.mark.parametrize(
    ("name", "options"), [("ccm_concat", dict(independent=True)), ("loma", dict(ratio=2, memory_tokens=2))], ids=str
)
def test_a_turn_that_is_run_leaves_the_state_of_one_turn_more(name, options):
    """Also where a turn is read once more to be closed, and where the method cuts text itself."""
    baseline = baselines.of(baselines.compared(name, options, capacity=6, window=9), build(name, **options))
    model = cases.model(tokens=baseline.method.num_embeddings, num_layers=1)
    session = turns.Conversation(model, lambda: model, baseline, turns=3, prompt=4, reply=TURN - 4)
    left, expected = session.cache, baselines.fill(session.cache, baseline.method, turns=4, turn=TURN)
    for field in ("kind", "segment", "index", "position"):
        ours, real = (np.asarray(getattr(x.slots, field)) for x in (left, expected))
        # Text that is still open was read as a question and an answer.
        np.testing.assert_array_equal(np.where(ours == Kind.QUERY, Kind.TEXT, ours) if field == "kind" else ours, real)
    assert int(left.chunks[0]) == int(expected.chunks[0]) and int(left.tokens[0]) == 4 * TURN


def test_needed_flops_are_those_of_the_program():
    """Of one layer, since XLA counts the body of a scan once."""
    config = dataclasses.replace(cases.CONFIG, num_layers=1, hidden_size=64, intermediate_size=256)
    model, length = cases.model(config=config), 4
    slots = jax.tree.map(jnp.asarray, baselines.slots_after(BASELINES[0].method, 1, length, 0).map(lambda x: x[None]))
    run = jax.jit(lambda model, x: model.logits(model(x, slots, None, rule=BASELINES[0].method.rule)[0]))
    counted = run.lower(model, jnp.ones((1, length), jnp.int32)).compile().cost_analysis()["flops"]
    # The program also computes the pairs that nobody sees, and what is not a matrix product.
    needed = config.forward_flops(length, length * length, length)
    assert needed < counted < 1.2 * needed


def test_sessions_that_fit():
    model, merge = cases.model(tokens=2), BASELINES[-1]
    most = lambda budget: turns.most_sessions(model, merge, budget, turns=3, turn=TURN, prompt=4)
    found = most(2**21)
    assert 5 < found["sessions"] and 0.95 * 2**21 < found["bytes"] <= 2**21
    assert most(2**10)["sessions"] == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    sizes = {"layers": 1, "hidden": 16, "intermediate": 16, "heads": 2, "kv_heads": 1, "vocab_size": 101}
    tree = {
        "model": {"precision": "float32", "scratch": sizes},
        "method": {"name": "ccm_merge", "comp_tokens": 1},
        "adapter": {"rank": 2},
        "data": {"format": "recall", "batch_size": 2},
        "cache": {"memory_capacity": 4},
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    (folder / "reference.json").write_text('{"source": "another machine", "seconds": {"decode": [0.5, 1]}}')
    arguments = [folder / "c.yaml", "--workdir", folder / "out", "--reference", folder / "reference.json"]
    sizes = {"turns": [2, 4], "prompt": 3, "reply": 2, "window": 6, "chunk": 8, "prefill": 8, "rounds": 2}
    sizes |= {"train_rounds": 1, "memory_gib": 0.01}
    for name, value in sizes.items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    options, config = cli.parse(Options, [str(x) for x in arguments], command="jax_ccm.bench")
    bench.bench(config, options, command="the command")
    return folder / "out"


def test_everything_is_written(written):
    results = json.loads((written / "bench.json").read_text())
    names = [baseline.name for baseline in BASELINES]
    assert [row["turns"] for row in results["turns"]] == [2, 4]
    for row in results["turns"]:
        assert list(row["systems"]) == names == list(results["baselines"]) == list(results["sessions"]["systems"])
        for cell in row["systems"].values():
            parts = cell["first token"]["seconds"], 2 * cell["token"]["seconds"], cell["close"]["seconds"]
            assert cell["turn"] == pytest.approx(sum(parts)) and cell["turn"] > 0
    states = {name: [row["systems"][name]["state_bytes"] for row in results["turns"]] for name in names}
    for name in ("window", "concat, evicting", "merge"):
        assert states[name][0] == states[name][1]
    # Two more turns: five tokens of text each, or one slot each; a slot holds keys, values and four integers.
    slot = results["kv_bytes_per_slot"] + 16
    assert states["full"][1] - states["full"][0] == 10 * slot
    assert states["concat"][1] - states["concat"][0] == 2 * slot
    assert list(results["steps"]) == ["prefill", "compress_step", "decode", "train"]
    assert all(cell["seconds"] > 0 and cell["flops"] > 0 for cell in results["steps"].values())
    assert results["machine"]["flops_per_second"] > 0 and results["command"] == "the command"
    assert load_config(written / "config.yaml").method.name == "ccm_merge"
    assert json.loads((written / "summary.json").read_text())["status"] == "finished"
    assert (written / "plot.png").stat().st_size > 10_000


def test_tables(written):
    results = json.loads((written / "bench.json").read_text())
    for name in report.TABLES:
        text = (written / f"{name}.md").read_text()
        assert text == report.markdown(results, name)
        assert "`the command`" in text and "another machine" in text
    assert sum(line.startswith("|") for line in (written / "turns.md").read_text().splitlines()) == 2 + 2 * 5
    assert "| 0.5 to 1 |" in (written / "steps.md").read_text()
    assert "sessions in 0.01 GiB" in (written / "sessions.md").read_text()


def test_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text("{}\n")
    (tmp_path / "bad.json").write_text('{"source": "x", "seconds": {"decode": 3}}')
    cases_of = {
        "--turns is [10, 1]; give different numbers": ("--turns", "10", "1"),
        "--rounds is 0; it must be at least 1": ("--rounds", "0"),
        "--memory_gib is -1.0": ("--memory_gib", "-1"),
        "nothing.json cannot be used": ("--reference", str(tmp_path / "nothing.json")),
        "bad.json cannot be used": ("--reference", str(tmp_path / "bad.json")),
        "--workdir": ("--workdir", str(tmp_path / "c.yaml")),
        "Set method.online: true": ("--method.name", "gist"),
    }
    for text, argv in cases_of.items():
        argv = argv if "--workdir" in argv else ("--workdir", str(tmp_path / "out"), *argv)
        monkeypatch.setattr("sys.argv", ["bench", str(tmp_path / "c.yaml"), *argv])
        with pytest.raises(SystemExit) as stopped:
            cli.run(bench.main)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and text in err and "Traceback" not in err, err
