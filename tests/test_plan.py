"""The command that plans: what it refuses, what it writes, and a real compilation where the compiler is installed."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import jax
import pytest

from jax_ccm import plan
from jax_ccm.config import cli
from jax_ccm.config.schema import from_mapping
from jax_ccm.errors import UserError
from jax_ccm.planning import chips, gpus, measure, models, programs, report, sessions, settings, training
from jax_ccm.weights import read_config

pytestmark = pytest.mark.once

TINY = {
    "model": {
        "scratch": {"layers": 2, "heads": 4, "kv_heads": 4, "hidden": 512, "vocab_size": 256},
        "precision": "bfloat16",
    },
    "method": {"name": "ccm_merge", "comp_tokens": 4},
    "data": {"batch_size": 8, "tokens": 64, "max_chunks": 4, "scored": 16},
    "mesh": {"fsdp": 4},
}


@pytest.mark.parametrize(("name", "billions"), [("Llama-2-7b-hf", 6.738), ("Llama-3.1-8B", 8.030), ("Qwen3-8B", 8.191)])
def test_shipped_shapes(name, billions):
    """Parameters of the released models, by their model cards."""
    from jax_ccm.nn import abstract_transformer
    from jax_ccm.weights.hf import base_parameters

    found, shape = models.model_shape(from_mapping({"model": {"source": f"some-org/{name}"}}))
    assert found == f"some-org/{name}" and shape == read_config(models.SHAPES / name)
    count = sum(x.size for x in base_parameters(abstract_transformer(shape)).values())
    assert count / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(topology="v5e"), "such as v5e:4x4"),
        (dict(topology="v5e:2x2", raw=(0,)), "must be at least 1"),
        (dict(topology="h200:8"), "unknown chip"),
        (dict(topology="h100:2x2x2"), "hosts x GPUs"),
        (dict(topology="v5e:16"), "such as v5e:4x4"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        plan.plan(from_mapping(TINY), settings.Options(**options))


def test_links_between_hosts():
    """Slices of TPUs and the GPUs of one host have their links; between hosts the network is what counts."""
    assert chips.find("h100:8") == chips.find("h100:1x8") == chips.CHIPS["h100"]
    assert chips.find("h100:2x8").link_bandwidth == chips.CHIPS["h100"].network_bandwidth
    assert chips.find("v5p:2x2x2") == chips.CHIPS["v5p"]


def test_tables():
    """Shares of full context, what does not fit, and an overview with a line for each conversation."""
    step = {
        "rows": 16,
        "accumulation": 8,
        "tokens": 1152,
        "hbm_bytes": 5 * 2**30,
        "fits": True,
        "seconds": {"roofline": 2.5},
    }
    most = {"full": 500, "concat": 2600, "merge": 9000}
    talk = {
        "setting": {"chunks": 16, "chunk_tokens": 50, "raw": 32},
        "systems": {name: {"sessions": count, "steps": {}} for name, count in most.items()},
    }
    talk["systems"]["merge"]["steps"] = {"decode_step": {"hbm_bytes": 15 * 2**30, "seconds": {"roofline": 0.0175}}}
    made = {"model": "org/M", "topology": "v5e:4x4", "devices": 16, "chip": {"hbm_bytes": 16 * 2**30}}
    made |= {"training": {"step": step, "largest_micro_batch": step | {"fits": False}}, "sessions": [talk, talk]}
    table = report.markdown(made)
    assert "not run" in table and "| step | 16 x 8 | 5.00 GiB | yes | 2.50 s |" in table
    assert "| largest micro batch | 16 x 8 | 5.00 GiB | no |  |" in table
    assert "| merge, a token, after 16 chunks of 50, 32 raw | 9,000 | 15.00 GiB | 17.5 ms |" in table
    assert "| 16 chunks of 50 | 32 | 500 | 2,600 (5.2 x) | 9,000 (18.0 x) |" in table
    overview = report.overview([made]).splitlines()
    # Other methods have columns of their own.
    other = {"setting": talk["setting"], "systems": {"full": {"sessions": 500}, "loma": {"sessions": 1000}}}
    both = report.overview([made, made | {"sessions": [other]}]).splitlines()
    assert both[0].endswith("| full context | concat | merge | loma |")
    assert both[2].endswith("| 500 | 2,600 (5.2 x) | 9,000 (18.0 x) | - |")
    # Apart or together: the same lines.
    apart = [{key: value for key, value in made.items() if key != part} for part in ("sessions", "training")]
    assert report.overview(apart).splitlines() == overview
    assert len(overview) == 4 and "M, v5e:4x4 | 16 rows x 8 of 1,152 tokens: 5.0 of 16 GiB, too much" in overview[2]
    assert overview[3].startswith("|  |  |  | 16 chunks of 50, 32 raw |")


def test_rows_that_training_refuses_are_not_planned(monkeypatch):
    """A micro-batch of two rows over four devices, however many are accumulated; and what has no parallel form."""
    monkeypatch.setattr(measure, "need", lambda *_: pytest.fail("something was compiled"))
    _, shape = models.model_shape(from_mapping(TINY))
    run = lambda **changes: training.micro_batches(
        from_mapping(TINY | changes), shape, jax.devices()[:1] * 4, chips.CHIPS["v5e"], find_largest=False
    )
    monkeypatch.setattr(
        jax, "make_mesh", lambda shape, names, **_: SimpleNamespace(shape=dict(zip(names, shape, strict=True)), size=4)
    )
    with pytest.raises(UserError, match="data.batch_size is 2, but rows are spread over .* = 4 devices"):
        run(data={**TINY["data"], "batch_size": 2}, optimizer={"accumulation": 8})
    with pytest.raises(UserError, match="data.tokens is 62, but the tokens of a row are spread"):
        run(data={**TINY["data"], "tokens": 62}, mesh={"context": 4})
    with pytest.raises(UserError, match="has no parallel form"):
        run(method={"name": "evict"})


@pytest.mark.skipif(gpus.missing() is None, reason="the compiler for GPUs is installed")
def test_no_compiler_for_gpus():
    with pytest.raises(UserError, match=r"planning for h100:8: .* was not found; .*pip install"):
        plan.plan(from_mapping(TINY), settings.Options(topology="h100:8"))


LACKS = {
    "v5e:2x2": "libtpu" if importlib.util.find_spec("libtpu") is None else None,
    "a100:1": gpus.missing(),
    "h100:4": gpus.missing(),
}


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [programs.decode_step, programs.compress_step], ids=lambda x: x.__name__)
@pytest.mark.parametrize("heads", [8, 16])
@pytest.mark.parametrize("topology", LACKS)
def test_no_second_cache(topology, heads, kind):
    """Serving changes the cache in place: what a step needs besides is a few layers of it."""
    if LACKS[topology]:
        pytest.skip(f"{LACKS[topology]} is not installed")
    config = from_mapping(TINY)
    scratch = {"layers": 32, "heads": heads, "kv_heads": 8, "hidden": 128 * heads, "vocab_size": 256}
    _, shape = models.model_shape(from_mapping(TINY | {"model": {"scratch": scratch, "precision": "bfloat16"}}))
    mesh = sessions.serving_mesh(shape, chips.devices(topology))
    method = sessions.systems(config)["concat"]
    cache = programs.abstract_cache(config, shape, method, mesh, 1024 * mesh.size, 128, 32)
    need = measure.need(kind(config, shape, method, mesh, cache), chips.find(topology))
    assert need.kinds["cache"] > 2**32
    assert need.kinds["temporaries"] < need.kinds["cache"] / 4, need.kinds


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("topology", "chips"), [("v5e:2x2", 4), ("v5e:1x1", 1)])
def test_plan_of_a_tiny_model(tmp_path, capsys, topology, chips):
    options = settings.Options(topology=topology, workdir=tmp_path, parts=("training",))
    made = plan.plan(from_mapping(TINY | {"mesh": {"fsdp": chips}}), options, command="python -m jax_ccm.plan")
    step = made["training"]["step"]
    assert step["fits"] and step["rows"] * step["accumulation"] == 8 and step["mesh"]["fsdp"] == chips
    kinds = step["hbm_bytes_by_kind"]
    assert kinds["weights"] > kinds["adapter"] and sum(kinds.values()) == step["hbm_bytes"]
    # Weights are gathered layer by layer, forward and backward.
    assert any("all-gather bf16" in line for line in step["collectives"]) == (chips > 1)
    assert json.loads((tmp_path / "plan.json").read_text()) == made
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "table.md", "plot.png", "config.yaml"}
    assert "nothing is run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "required"),
        (["--help"], 0, "plan overview DIR"),
        (["kernels"], 2, "required"),
        (["kernels", "--help"], 0, "h100"),
        (["kernels", "{}/new.json", "v9"], 2, "unknown target 'v9'"),
        (["kernels", "{}/bad.json", "v5e"], 2, "bad.json holds something else than compiled kernels"),
        (["kernels", "{}/bad.json/x.json", "v5e"], 2, "cannot be used"),
        (["overview"], 2, "required"),
        (["overview", "--help"], 0, "results/plan"),
        (["overview", "{}/nothing"], 2, "holds no plans"),
        (["overview", "{}"], 2, "bad.json is not a plan"),
    ],
)
def test_its_parts_have_help_and_messages(arguments, code, message, tmp_path, monkeypatch, capsys):
    """The kernels alone, and one table of many plans, are parts of the command: no traceback, whatever is given."""
    (tmp_path / "bad.json").write_text('{"jax": "0"}')
    monkeypatch.setattr("sys.argv", ["plan", *(argument.format(tmp_path) for argument in arguments)])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        cli.run(plan.main)
    said = capsys.readouterr()
    said = " ".join((said.out + said.err).replace("│", " ").split())
    assert stopped.value.code == code and message in said and "Traceback" not in said, said
