"""The command that plans: what it refuses, what it writes, and a real compilation where the compiler is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest

from jax_ccm import plan
from jax_ccm.config import from_mapping
from jax_ccm.errors import UserError
from jax_ccm.planning import report
from jax_ccm.weights import read_config

TINY = {
    "model": {
        "scratch": {"layers": 2, "heads": 4, "kv_heads": 4, "hidden": 512, "vocab_size": 256},
        "dtype": "bfloat16",
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

    found, shape = plan.model_shape(from_mapping({"model": {"source": f"some-org/{name}"}}))
    assert found == f"some-org/{name}" and shape == read_config(plan.SHAPES / name)
    count = sum(x.size for x in base_parameters(abstract_transformer(shape)).values())
    assert count / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(topology="v5e"), "such as v5e:4x4"),
        (dict(topology="v5e:2x2", raw=(0,)), "must be at least 1"),
        (dict(topology="h100:8x1"), "unknown chip"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        plan.plan(from_mapping(TINY), plan.Options(**options))


def test_tables():
    """Shares of full context, what does not fit, and an overview with a line for each conversation."""
    step = {"rows": 16, "accumulation": 8, "hbm_bytes": 5 * 2**30, "fits": True, "seconds": {"roofline": 2.5}}
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
    overview = report.overview([made])
    assert overview.count("\n") == 4 and "M, v5e:4x4 | 16 rows x 8: 5.0 of 16 GiB, too much" in overview


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("topology", "chips"), [("v5e:2x2", 4), ("v5e:1x1", 1)])
def test_plan_of_a_tiny_model(tmp_path, capsys, topology, chips):
    options = plan.Options(topology=topology, workdir=tmp_path, parts=("training",))
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
