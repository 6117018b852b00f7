"""``python -m jax_ccm.devices.check``: what each part finds on a CPU, what ends no other row, and its tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ccm.attention import gpu
from jax_ccm.devices import attention, check, models, numbers, record, report, throughput
from jax_ccm.devices.settings import SIZES, Options
from jax_ccm.errors import UserError
from jax_ccm.methods import METHODS
from jax_ccm.nn import AdapterConfig, abstract_transformer
from jax_ccm.planning import chips
from jax_ccm.rules import visibility

pytestmark = pytest.mark.once

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("check")


def run(part: str, folder) -> dict:
    assert check.check(Options(part, folder), command=f"the command of {part}") == 0
    return json.loads((folder / f"{part}.json").read_text())


def test_numbers(folder):
    """Both kernels, interpreted, and plain products."""
    found = run("numbers", folder)
    assert [(row["dtype"], row["kernel"]) for row in found["rows"]] == [
        (dtype, kernel)
        for kernel in ("triton, interpreted", "mosaic, interpreted", "xla")
        for dtype in ("float32", "bfloat16")
    ]
    for row in found["rows"]:
        assert row["passed"] and 0 < max(row["forward"], row["gradients"]) <= row["allowed"]
    assert (found["status"], found["platform"], found["size"]) == ("finished", "cpu", "tiny")
    assert found["commit"] and found["date"] and found["versions"]["jax"] == jax.__version__


def test_a_wrong_kernel_does_not_pass(monkeypatch, tmp_path):
    """Nor does one that gives NaN; both kinds are told, and the rows behind them are measured."""
    right = gpu.attend
    wrong = lambda q, *rest, rule, interpret: (
        right(q, *rest, rule=rule, interpret=interpret) * (1.001 if q.dtype == jnp.float32 else jnp.nan)
    )
    monkeypatch.setattr(gpu, "attend", wrong)
    monkeypatch.setattr(
        numbers, "implementations", lambda: iter([("triton", functools.partial(numbers._kernel, "gpu"))])
    )
    assert check.check(Options("numbers", tmp_path)) == 1
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["status"] == "failed" and [row["outcome"] for row in found["rows"]] == ["failed"] * 2
    assert "allowed 1e-05" in found["rows"][0]["why"] and "off by nan" in found["rows"][1]["why"]


def test_all_methods_are_compared():
    """But those that have no parallel form; rows of each can be made, with something kept where text is kept."""
    assert set(numbers.METHODS) == set(METHODS) - {"streaming_llm", "evict"}
    for name in numbers.METHODS:
        case = numbers._case(name, "float32", TINY)
        assert len(case.expected) == 2 + 2 * len(case.keys)
        assert len(case.keys) == 1 + (case.method.name.startswith(("gist", "ccm", "compressive", "loma", "sentinel")))


def test_attention(folder):
    found = run("attention", folder)
    rows = {(row["implementation"], row["pass"]): row for row in found["rows"]}
    assert set(rows) == {(name, what) for name in attention.IMPLEMENTATIONS for what in attention.PASSES}
    for (name, what), row in rows.items():
        if name == "cudnn":
            assert row["outcome"] == "not there" and "this is cpu" in row["why"]
        else:
            assert row["seconds"] > 0 and row["flops"] == attention.PASSES[what] * row["pairs"] * 2 * 64


def test_visible_pairs_are_those_of_the_rule(monkeypatch):
    """Counted in blocks, one of them a shorter one."""
    monkeypatch.setattr(attention, "COUNTED", 60)
    made, pairs = attention._made(160)
    seen = [visibility.visible(attention.METHOD.rule, made.slots, keys) for keys in (made.slots, made.memory.slots)]
    assert pairs == sum(int(np.sum(x)) for x in seen) > 160


def test_cudnn_is_given_what_its_pairs_say():
    """The same function by plain products: causal attention of the arrays in the kernel's layout."""
    heads = attention.Heads(2, 1, 8)
    plain = functools.partial(jax.nn.dot_product_attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **more: plain(*x, **more))
        forward, gradients, (abstract, d_out, slots) = attention.causal(6, heads)
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in abstract]
        out = forward(arrays, slots)
        later = forward([x.at[:, 4:].set(0) for x in arrays], slots)
        pulled = gradients(arrays, jnp.ones(d_out.shape, jnp.float32), slots)
    np.testing.assert_array_equal(out[:, :4], later[:, :4])
    assert np.abs(out[:, 4:] - later[:, 4:]).max() > 0.1
    assert [x.shape for x in pulled[0]] == [x.shape for x in abstract]


def test_training(folder):
    found = run("training", folder)
    plain, kernel = found["rows"]
    assert plain["tokens_per_second"] > 0 and plain["of_matrix_rate"] > 0 and plain["mfu"] is None
    assert kernel["outcome"] == "not there" and "interpreted" in kernel["why"]


def test_training_halves_its_rows_until_they_fit(monkeypatch):
    """Another error is no reason to."""
    from jax_ccm.devices import training

    asked = []

    def step(shape, attention, count, size):
        asked.append(count)
        if count > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")
        return {"rows": count}

    monkeypatch.setattr(training, "_step", step)
    size = dataclasses.replace(TINY, rows=12)
    assert training._steps(None, "xla", size) == {"rows": 3} and asked == [12, 6, 3]
    monkeypatch.setattr(training, "_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training._steps(None, "xla", size)


def test_turns(folder):
    steps, turn = run("turns", folder)["rows"]
    assert {"prefill", "compress_step", "decode"} == set(steps["steps"])
    assert turn["turns"] == TINY.turns[0] and turn["systems"]["merge"]["turn"] > 0


def test_throughput(folder):
    found = run("throughput", folder)
    rows = {row["system"]: row for row in found["rows"]}
    chunks, chunk, slots = TINY.demonstrations, TINY.demonstration, TINY.slots
    assert {name: row["slots"] for name, row in rows.items()} == {
        "full context": chunks * chunk, "CCM-concat": chunks * slots, "CCM-merge": slots,
    }  # fmt: skip
    assert all(row["batch"] == TINY.most and row["samples_per_second"] > 0 for row in rows.values())
    sessions = [row["bytes_of_a_session"] for row in rows.values()]
    assert sessions == sorted(sessions, reverse=True)


@pytest.mark.parametrize(
    ("fits", "first", "tried", "best"),
    [(40, 16, [16, 32, 64], 32), (5, 16, [16, 8, 4], 4), (0, 4, [4, 2, 1], None), (9, 8, [8, 16], 8)],
)
def test_batches_are_doubled_or_halved(monkeypatch, tmp_path, fits, first, tried, best):
    """And the table has the largest that fits, with what became of the others."""

    def measured(model, way, batch, size):
        if batch > fits:
            raise record.DoesNotFit("no room")
        return {"seconds": {}, "samples_per_second": 7.5, "questions_per_second": 8.5, "bytes": 2**30}

    adapter, way = AdapterConfig(tokens=2), throughput.Baseline("full", throughput.build("full"), "all text")
    monkeypatch.setattr(throughput, "_measured", measured)
    shape = abstract_transformer(TINY.demonstrated[1], adapter, "bfloat16")
    each = jax.eval_shape(lambda: way.cache(shape, 1, turns=TINY.demonstrations, turn=TINY.demonstration)).nbytes
    limit = throughput.turns.weights_bytes(shape) + 2 * each * first
    monkeypatch.setattr(models, "bytes_limit", lambda: limit)
    rows = throughput._batches(
        {"model": "m", "system": "s"}, lambda: None, adapter, way, dataclasses.replace(TINY, most=None)
    )
    found = record.fill(tmp_path / "t.json", "throughput", "tiny", rows, limit=60, command="c")
    assert [row["batch"] for row in found["rows"]] == tried and found["status"] == "finished"
    (line,) = report.throughput(found)[1]
    numbers = [] if best is None else [str(TINY.demonstrations * TINY.demonstration), str(best), "7.5", "8.5", "1.0"]
    assert [cell for cell in line[2:7] if cell] == numbers
    assert line[7] == "; ".join(f"batch {n}: out of memory: no room" for n in tried if n > fits)


def test_no_larger_batch_behind_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "_measured", lambda *_: 1 / 0)
    found = record.fill(tmp_path / "t.json", "throughput", "tiny", throughput.rows(TINY), limit=60, command="c")
    assert [row["outcome"] for row in found["rows"]] == ["failed"] * 3


def test_a_decoder_that_does_not_fit_is_not_made(monkeypatch):
    monkeypatch.setattr(models, "bytes_limit", lambda: 1000)
    with pytest.raises(record.DoesNotFit, match="the device has"):
        models.arbitrary(TINY.demonstrated[1], AdapterConfig(), "bfloat16")


def test_weights_are_small_and_of_both_signs():
    model = models.arbitrary(TINY.demonstrated[1], AdapterConfig(tokens=2), "bfloat16")
    table = np.asarray(model.embed_tokens.embedding[...], np.float32)
    assert np.abs(table).max() <= 0.031 and abs(table.mean()) < 1e-3 and len(np.unique(table)) > 500


def test_what_goes_wrong_in_a_row_ends_no_other(tmp_path):
    """Out of memory and what is not there are results; a failure is told; no time, no further row."""

    def fails(error):
        raise error

    def rows():
        yield {"row": 1}, lambda: fails(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"))
        yield {"row": 2}, lambda: fails(record.Unavailable("it has none"))
        assert json.loads(path.read_text())["status"] == "running"
        yield {"row": 3}, lambda: fails(ValueError("a | bug"))
        yield {"row": 4}, lambda: {"value": 1}

    path = tmp_path / "x.json"
    found = record.fill(path, "x", "tiny", rows(), limit=60, command="c")
    outcomes = [(row["outcome"], row.get("why")) for row in found["rows"]]
    assert outcomes == [
        ("out of memory", "RESOURCE_EXHAUSTED: Out of memory"), ("not there", "it has none"),
        ("failed", "ValueError: a | bug"), ("measured", None),
    ]  # fmt: skip
    assert found["status"] == "failed" and json.loads(path.read_text()) == found
    late = record.fill(path, "x", "tiny", iter([({"row": 1}, lambda: {})]), limit=-1, command="c")
    assert late["status"] == "out of time" and late["rows"][0]["outcome"] == "out of time"


def test_report(folder):
    """Of the parts that are there, each as its own file has it; what did not finish is said."""
    for part in report.TABLES:
        if not (folder / f"{part}.json").exists():
            run(part, folder)
    assert check.check(Options("report", folder)) == 0
    found = report.found_in(folder)
    text = (folder / "report.md").read_text()
    assert text == report.markdown(found)
    for part, title in report.TITLES.items():
        assert f"## {title}" in text and f"`the command of {part}`" in text
    for row in found["numbers"]["rows"]:
        assert f"| {row['method']} | {row['dtype']} | {row['kernel']} | {row['forward']:.1e} |" in text
    assert "not there: cuDNN runs on NVIDIA GPUs" in text
    ended = {"throughput": found["throughput"] | {"status": "running", "rows": []}}
    assert "its process was ended before it was done" in report.markdown(ended)
    failed = {"rows": [{"measured": "single steps", "outcome": "failed", "why": "a | b"}], "status": "failed"}
    assert "failed: a \\| b" in report.markdown({"turns": found["turns"] | failed})


def test_status(tmp_path):
    assert report.status(tmp_path, "gpu") == "never run"
    for name, day in (("A", "2030-01-02"), ("B", "2030-01-03")):
        (tmp_path / "gpu" / name).mkdir(parents=True)
        (tmp_path / "gpu" / name / "numbers.json").write_text(json.dumps({"device": name, "date": f"{day}T03:04:05"}))
    assert report.status(tmp_path, "gpu") == "last run on B at 2030-01-03"
    assert report.status(tmp_path, "tpu") == "never run"


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", None),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None),
     ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("TPU v5 lite", 197e12),
     ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("cpu", None)],
)  # fmt: skip
def test_peaks_by_the_name_of_a_device(kind, flops):
    chip = chips.named(kind)
    assert (chip.flops if chip else None) == flops


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="run a part first"):
        check.check(Options("report", tmp_path))
    with pytest.raises(UserError, match="--limit is 0"):
        check.check(Options("numbers", tmp_path, limit=0))
    monkeypatch.setattr(sys, "argv", ["check", "numbas"])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 2


def test_results_go_to_the_folder_of_the_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = record.folder_of(None)
    assert folder.is_dir() and folder.parts[:2] == ("results", "cpu")
