"""Perplexity over long text with a fixed number of slots: equal to token by token, of equal sizes, told in the end."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

from jax_ccm.errors import UserError
from jax_ccm.evals import report, streaming
from jax_ccm.evals.perplexity import Measured, System
from jax_ccm.evals.scoring import Scores, Store
from jax_ccm.evals.streaming import Budget
from jax_ccm.evals.systems import SINKS
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.steps import stream_step
from jax_ccm.methods import build
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Chunk
from tests import cases
from tests.test_compare import text_config
from tests.test_evaluate import run

WINDOW, CLOSES, CAPACITY = 14, 5, 5
STREAMS = {
    "concat": cases.RECURRENT["concat_streaming"],
    "concat_running": cases.METHODS["concat_n2_sink"],
    "merge": build("ccm_merge", comp_tokens=2, sink=True),
    "ema": cases.METHODS["ema_n2_all"],
    "compressive": cases.METHODS["compressive_now_sink"],
    "evict": cases.RECURRENT["evict"],
    "evict_streaming": cases.RECURRENT["evict_streaming"],
    "loma": build("loma", ratio=5, memory_tokens=1),
    **{name: build("streaming_llm", sinks=sinks) for name, sinks in SINKS.items()},
}


def texts(lengths=(61, 67), start=()) -> list[Example]:
    rng = np.random.default_rng(3)
    segments = lambda count: tuple(
        Segment(rng.integers(10, cases.VOCAB, size).astype(np.int32), np.ones(size, bool))
        for size in (count // 2, count - count // 2)
    )
    empty = np.zeros(0, np.int32)
    return [Example(np.array(start, np.int32), empty, segments(n), f"text {i}") for i, n in enumerate(lengths)]


def token_by_token(model, method, examples, budget: Budget, length: int):
    """Losses of a stream that is read one token at a time, and live slots behind each closing."""
    rows = np.stack([
        np.concatenate([e.start, *(s.tokens for s in e.segments)])[: len(e.start) + length] for e in examples
    ])  # fmt: skip
    cache = init_cache(model, method, len(rows), memory_capacity=CAPACITY, raw_capacity=WINDOW + 1, overflow="evict")
    sizes = budget.sizes()
    live, losses, found = 0, [], []
    step = jax.jit(lambda cache, chunk, closes: stream_step(
        model, cache, chunk, method=method, window=WINDOW, closes=closes
    ))  # fmt: skip
    aim = next(sizes)
    for place in range(rows.shape[1] - 1):
        closes = CLOSES if method.remembers else WINDOW + 1 - aim
        chunk = Chunk(rows[:, place : place + 1], np.ones((len(rows), 1), bool))
        cache, logits = step(cache, chunk, closes)
        losses.append(np.asarray(cross_entropy(logits[:, 0], rows[:, place + 1])))
        before, live = live, int(cache.slots.live.sum(1)[0])
        if live <= before:
            found.append(live)
            aim = next(sizes)
    return np.stack(losses, 1), found


@pytest.mark.once
@pytest.mark.parametrize("name", STREAMS)
def test_pieces_equal_token_by_token(name):
    """For every way to close, with and without a token at the start; and all hold the slots of the memory."""
    method, memory = STREAMS[name], cases.RECURRENT["concat_streaming"]
    budget = Budget(WINDOW, CLOSES, CAPACITY, method if method.remembers else memory)
    model = cases.model(tokens=2, num_layers=2)
    for start in ((), (1,)):
        examples, length = texts(start=start), 57
        losses, found = token_by_token(model, method, examples, budget, length)
        made = streaming.score_streams(model, method, examples, budget, length, rows=3)
        assert len(made) == 2 and len(found) > 5
        for row, scores in enumerate(made):
            expected = losses[row] if start else np.append(0, losses[row])
            np.testing.assert_allclose(scores.nll, expected, atol=2e-5, rtol=1e-5)
        assert found == list(itertools.islice(budget.sizes(), len(found)))


def test_lengths_are_of_the_same_texts_and_scores_are_kept(tmp_path):
    model, method = cases.model(tokens=2, num_layers=2), STREAMS["concat"]
    budget, examples = Budget(WINDOW, CLOSES, CAPACITY, method), texts((40, 61, 80))

    class Texts:
        def texts(self, marked):
            assert not marked
            return examples

    stages = streaming.stages(Texts(), (20, 60, 5, 900))
    assert [stage.step for stage in stages] == [5, 20, 60]
    assert [[q.examples[0].id for q in stage.right] for stage in stages] == [["text 1", "text 2"]] * 3
    system, said = System("memory", model, method, "memory", "weights"), []
    work = dict(rows=2, store=Store(tmp_path), log=said.append)
    first, again = (streaming.measure(system, stages, budget, **work) for _ in range(2))
    assert "scored before" in said[1] and "scored before" not in said[0]
    for stage, one, two in zip(stages, first, again, strict=True):
        assert [len(scores.nll) for (scores,) in one.right] == [stage.step - 1] * 2  # nothing stands before the first
        assert one.slots.tolist() == [min(stage.step, WINDOW + 1)] * 2
        for (a,), (b,), (whole,) in zip(one.right, two.right, first[-1].right, strict=True):
            np.testing.assert_array_equal(a.nll, b.nll)
            np.testing.assert_array_equal(a.nll, whole.nll[: stage.step - 1])
    assert len(streaming.stages(Texts(), (5,), most=2)[0].right) == 2
    with pytest.raises(UserError, match="longest stream has 80 tokens, fewer than the smallest of eval.steps, 100"):
        streaming.stages(Texts(), (100, 200))


def test_differences_are_of_pairs():
    """Of the same tokens: streams that are hard for both do not widen the interval."""
    rng = np.random.default_rng(0)
    hard, better = rng.normal(3, 2, (2, 2000)), rng.normal(0.1, 0.05, (2, 2000))

    def measured(nll, end):
        scores = [(Scores(row[:end], row[:end] < 1),) for row in nll]
        return Measured(scores, None, np.ones(2), {})

    lengths = (300, 2000)
    found = {
        name: [measured(nll, end) for end in lengths] for name, nll in (("window", hard), ("memory", hard - better))
    }
    rows = [{"systems": {"window": {}, "memory": {}}} for _ in lengths]
    for row, end in zip(streaming.compared(rows, found), lengths, strict=True):
        difference = row["systems"]["memory"]["minus"]["window"]
        np.testing.assert_allclose(difference.value, -better[:, :end].mean(), rtol=1e-6)
        assert difference.low < difference.value < difference.high and difference.error < 0.01
        assert "minus" not in row["systems"]["window"]
    alone = [{"systems": {"window": {}}} for _ in lengths]
    assert streaming.compared(alone, {"window": found["window"]}) == [{"systems": {"window": {}}}] * 2


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("none", {}, "'none' makes no memory of closed text"),
        ("full", {}, "'full' keeps closed text"),
        ("sentinel", {}, "'sentinel' keeps closed text"),
        ("concat_n2_recent", {}, "'ccm_concat' keeps closed text"),
        ("concat_n2_sink", dict(window=9), "eval.window is 9, but 6 slots of sink and memory and 5 tokens to close"),
        ("concat_n2_sink", dict(closes=2), "the first 2 tokens that are closed .* leave 2 slots of memory"),
        ("loma", {}, "data.chunk is 5, but method 'loma' takes 4 tokens at a time"),
    ],
)
def test_what_cannot_stream(method, change, message):
    with pytest.raises(UserError, match=message):
        Budget(**dict(window=WINDOW, closes=CLOSES, capacity=CAPACITY, memory=cases.METHODS[method]) | change)


@pytest.mark.once
def test_the_command(tmp_path, monkeypatch, capsys):
    stream = ("--eval.by", "stream", "--eval.steps", 9, 40, 500, "--eval.window", WINDOW)
    stream += ("--cache.memory_capacity", CAPACITY)
    method = {"name": "ccm_concat", "comp_tokens": 2, "sink": True, "streaming": True}
    config = text_config(tmp_path, method=method, max_chunks=20)
    out = tmp_path / "out"
    code, printed, err = run(monkeypatch, capsys, config, "--workdir", out, *stream)
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert [row["step"] for row in results["steps"]] == [9, 40]
    for row in results["steps"]:
        systems = row["systems"]
        assert set(systems) == {"window", "streaming_llm", "memory"}
        assert {cell["kv_slots"] for cell in systems.values()} == {min(row["step"], WINDOW + 1)}
        assert row["tokens"] == row["examples"] * (row["step"] - 1)
    assert len({cell["nll"]["value"] for cell in results["steps"][1]["systems"].values()}) == 3
    text = (out / "table.md").read_text()
    assert "| - window | - StreamingLLM |" in text and "nats a token that the memory loses more" in text
    minus = results["steps"][1]["systems"]["memory"]["minus"]["window"]
    pair = [results["steps"][1]["systems"][name]["nll"]["value"] for name in ("memory", "window")]
    np.testing.assert_allclose(minus["value"], pair[0] - pair[1], atol=2e-6)
    assert minus["ci95"][0] <= minus["value"] <= minus["ci95"][1]
    # As long as the window has room, all see all.
    short = [cell["nll"]["value"] for cell in results["steps"][0]["systems"].values()]
    np.testing.assert_allclose(short, short[0], rtol=1e-5)
    assert "no record is as long as 500, which is left out" in printed and "StreamingLLM" in printed
    figure = report.figure_of(results)
    low, high = figure.axes[0].get_ylim()
    for cell in (cell for row in results["steps"] for cell in row["systems"].values()):
        assert low <= cell["perplexity"]["ci95"][0] and cell["perplexity"]["ci95"][1] <= high
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["window", "StreamingLLM", results["memory"], "95 % interval"]
    assert (out / "plot.png").stat().st_size > 10_000 and "| length |" in (out / "table.md").read_text()
    for message, change in {
        "eval.window is 8, but": ("--eval.window", 8),
        "entry of eval.methods (by stream)": ("--eval.methods", "full"),
        "the longest stream has": ("--eval.steps", 5000),
        "it needs data.format 'text' without data.ratio": ("--data.ratio", 0.5),
    }.items():
        code, _, err = run(monkeypatch, capsys, config, "--workdir", tmp_path / "bad", *stream, *change)
        assert code == 2 and message in err and "Traceback" not in err, err
