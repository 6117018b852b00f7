"""Training runs on a tiny model: one program, exact resumption, clean stops, and nothing lost."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

from jax_ccm import train
from jax_ccm.config import cli
from jax_ccm.config.adapters import open_config
from jax_ccm.config.loading import load_experiment
from jax_ccm.config.schema import from_mapping, load_config, save_config
from jax_ccm.data.batches import prepare
from jax_ccm.errors import RunError, UserError
from jax_ccm.memory.cache import init_cache
from jax_ccm.memory.losses import mean_loss, training_loss
from jax_ccm.memory.steps import compress_step, parallel_forward
from jax_ccm.methods import build
from jax_ccm.numerics import precision
from jax_ccm.rules.objective import Objective
from jax_ccm.rules.types import Chunk
from jax_ccm.training import step as training_step
from jax_ccm.training.checkpoints import Checkpoints
from jax_ccm.training.metrics import Metrics, clock, cut
from jax_ccm.training.programs import grouped
from jax_ccm.training.run import Run
from jax_ccm.weights.adapters import COMP, Adapter

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load("""
model: {precision: float32, scratch: {layers: 2, hidden: 16, intermediate: 16, heads: 2, kv_heads: 1, vocab_size: 21}}
method: {name: ccm_concat, comp_tokens: 1, sink: true}
adapter: {rank: 2, dropout: 0.2}
data:
  format: recall
  train: ["generated:recall?split=train&facts=3&names=10&things=10&size=50"]
  validation: ["generated:recall?split=validation&facts=3&names=10&things=10&size=8"]
  batch_size: 3
  tokens: 20
  max_chunks: 3
  scored: 3
  join: 0.3
optimizer: {learning_rate: 1.0e-2, accumulation: 2, weight_decay: 0.01}
train: {steps: 8, trainable: all, log_every: 2, eval_every: 4, eval_examples: 6, checkpoint_every: 4}
""")


def tiny(**sections):
    """The tiny config with some keys changed."""
    tree = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}}
    return from_mapping(tree)


def last_state(workdir: Path, step: int):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("state",)) as store:
        return store.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


def records(workdir: Path) -> list[dict]:
    """The metrics, without how long things took."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and how often the loss was traced by the time of each step."""
    traced, seen = [], []
    with pytest.MonkeyPatch.context() as patch:
        settle = Run._settle
        patch.setattr(training_step, "training_loss", lambda *a, **k: traced.append(1) or training_loss(*a, **k))

        def count(self, pending, metrics):
            if pending is not None:
                seen.append(len(traced))
            settle(self, pending, metrics)

        patch.setattr(Run, "_settle", count)
        workdir = tmp_path_factory.mktemp("whole")
        summary = Run(tiny(), workdir).train()
    return workdir, summary, seen


def test_outputs(whole):
    workdir, summary, _ = whole
    assert summary["status"] == "finished" and summary["step"] == 8
    assert summary["tokens"] > summary["scored_tokens"] == 8 * 2 * 3 * 3
    assert summary["loss"] == [r["loss"] for r in records(workdir) if "loss" in r][-1]
    assert [r["step"] for r in records(workdir)] == [2, 4, 4, 6, 8, 8]
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert load_config(workdir / "config.yaml") == tiny()
    assert list((workdir / "tensorboard").glob("events*"))
    for name in ("adapter", "adapter_best"):
        assert load_experiment(tiny(), adapter=workdir / name).adapter_config.rank == 2


def test_compiled_once(whole):
    _, _, seen = whole
    assert seen[0] > 0 and set(seen) == {seen[0]}


def test_a_step_stays_on_the_device(tmp_path):
    """No callback, no transfer while it runs; the state is given away, the frozen weights are not copied."""
    with Run(tiny(train={"trainable": "adapter"}), tmp_path) as run:
        batch = next(grouped(run.batches, 2))
        key = jax.random.key(0)
        on_host = (run.state, run.frozen, batch, key)
        compiled = run._step.lower(*on_host).compile()
        on_device = jax.device_put(on_host)
        jax.block_until_ready(on_device)
        with jax.transfer_guard("disallow"):
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                compiled(*on_host)
            _, metrics = compiled(*on_device)
            jax.block_until_ready(metrics)
    assert not [word for word in ("callback", "infeed", "outfeed", "send(", "recv(") if word in compiled.as_text()]
    assert all(x.is_deleted() for x in jax.tree.leaves(on_device[0]))
    assert not any(x.is_deleted() for x in jax.tree.leaves(on_device[1]))
    sizes = compiled.memory_analysis()
    assert sizes.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(run.state))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that gets SIGTERM between two checkpoints, and is started again."""
    workdir = tmp_path_factory.mktemp("stopped")
    settle = Run._settle

    def stop_in_step_3(self, pending, metrics):
        settle(self, pending, metrics)
        if pending is not None and pending[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_settle", stop_in_step_3)
        first = Run(tiny(), workdir).train()
    # As if the process had gone on for a while after its last checkpoint, and was killed in the middle of a line.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9.9}\n{"step": 6, "lo')
    second = Run(tiny(), workdir).train()
    return workdir, first, second


def test_sigterm_saves_at_the_step_boundary(stopped):
    _, first, second = stopped
    assert first["status"] == "interrupted" and first["step"] in (2, 3)
    assert second["status"] == "finished"


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, stopped):
    a, b = whole[0], stopped[0]
    assert records(a) == records(b)
    jax.tree.map(np.testing.assert_array_equal, last_state(a, 8), last_state(b, 8))
    for name in ("adapter", "adapter_best"):
        assert (a / name / "adapter.safetensors").read_bytes() == (b / name / "adapter.safetensors").read_bytes()
    for name in ("loss", "validation_loss", "best_validation_loss", "best_step", "tokens", "scored_tokens"):
        assert whole[1][name] == stopped[2][name]


def test_a_finished_run_has_nothing_to_do_and_can_be_made_longer(stopped, tmp_path, capsys):
    workdir, _, second = stopped
    again = Run(tiny(), workdir).train()
    assert (again["loss"], again["step"]) == (second["loss"], 8)
    assert "done already" in capsys.readouterr().out
    with pytest.raises(UserError, match="at step 8, beyond train.steps = 4"):
        Run(tiny(train={"steps": 4}), workdir)


def test_a_resumed_run_keeps_the_precision_that_auto_became(whole, monkeypatch, capsys):
    """Whatever this machine would take by itself."""
    monkeypatch.setattr(precision, "processor_flags", lambda: frozenset(["avx512_bf16"]))
    with Run(tiny(model={"precision": "auto"}), whole[0]) as run:
        assert run.config.model.precision == run.experiment.config.model.precision == "float32"
    assert "model.precision was" not in capsys.readouterr().out


def test_a_run_holds_its_folder_until_it_is_closed(whole):
    with Run(tiny(), whole[0]) as run:
        with pytest.raises(UserError, match="is in use by another run"):
            Run(tiny(), whole[0])
    run.close()
    Run(tiny(), whole[0]).close()


def test_checkpoint_of_another_config_is_refused(whole):
    with pytest.raises(UserError, match="optimizer.learning_rate was 0.01, now 0.02; train.seed was 42, now 1"):
        Run(tiny(optimizer={"learning_rate": 0.02}, train={"seed": 1}), whole[0])


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    optimizer = {"learning_rate": 3e38, "warmup_ratio": 0.0, "schedule": "constant"}
    run = Run(tiny(optimizer=optimizer, train={"checkpoint_every": 1, "eval_every": 0}), tmp_path)
    with pytest.raises(RunError, match=r"at step 2 the loss is .* checkpoint of step 1 is kept.*learning_rate"):
        run.train()
    with Checkpoints(tmp_path / "checkpoints") as store:
        assert store.steps() == [1]


@pytest.fixture(scope="module")
def stages(whole, tmp_path_factory):
    """The paper's two stages in bfloat16 on a frozen base: a plain LoRA, then compression on top of it."""
    base = {"source": str(whole[0] / "model"), "precision": "bfloat16"}
    train = {"trainable": "adapter", "steps": 3, "eval_every": 0}
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    method = {"name": "full", "comp_tokens": None, "sink": None}
    Run(tiny(model=base, method=method, train=train, data={"join": 0.0}), one).train()
    config = tiny(model=base, adapter={"merge": str(one / "adapter")}, train=train)
    Run(config, two).train()
    return config, one, two


def test_only_the_adapter_is_trained_and_saved(stages):
    config, _, workdir = stages
    state = last_state(workdir, 3)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state["params"])}
    assert names == {"lora_a", "lora_b", "comp"}
    trained = sum(x.size for x in jax.tree.leaves(state["params"]))
    moments = sum(x.size for x in jax.tree.leaves(state["optimizer"]) if x.ndim)
    assert moments == 2 * trained
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state["params"]))
    assert (jax.tree.leaves(state["params"]["layers"])[1] != 0).any()  # lora_b left zero


def test_second_stage_stands_on_the_merged_first(stages):
    config, one, two = stages
    plain = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, merge=""))
    merged, unmerged = (load_experiment(c).model.layers.self_attn.q_proj.kernel[...] for c in (config, plain))
    assert merged.dtype == jnp.bfloat16 and (merged != unmerged).any()
    assert load_experiment(config, adapter=two / "adapter").adapter_config.tokens == 1
    with pytest.raises(UserError, match="base model"):
        load_experiment(plain, adapter=two / "adapter")


def test_weights_are_arguments_of_the_step():
    _, step, arguments = pieces(tiny(train={"trainable": "adapter"}))
    consts = step.trace(*arguments).jaxpr.consts
    assert sum(np.size(x) for x in consts) < 64


@pytest.mark.parametrize(
    "objective", [{"distillation": 0.5}, {"dependence": 3.0, "dependence_floor": 0.1}, {"alignment": 0.5}]
)
def test_the_objective_of_the_config_is_minimised(objective):
    """The step's loss is that of `training_loss` with it, and not the plain one; validation stays the plain one."""
    config = tiny(adapter={"dropout": 0.0}, optimizer={"accumulation": 1}, train={"trainable": "adapter"},
                  objective=objective)  # fmt: skip
    graphdef, step, (state, frozen, batches, key) = pieces(config)
    method, first = load_experiment(config).method, jax.tree.map(lambda x: x[:1], batches)

    @functools.partial(jax.jit, static_argnames="objective")
    def loss(params, batch, objective):
        model = nnx.merge(graphdef, params, frozen)
        return training_loss(model, batch, method, objective)[0]

    one = jax.tree.map(lambda x: x[0], first)
    expected, plain = (loss(state["params"], one, each) for each in (config.objective, Objective()))
    held_out = training_step.make_validation(graphdef, method, config.train)(
        state["params"], frozen, [one], lambda: False
    )
    _, found = step(state, frozen, first, key)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(held_out, plain, rtol=1e-5)
    assert abs(expected - plain) > 1e-4


def test_a_teacher_that_is_not_there_is_not_asked(tmp_path):
    with pytest.raises(UserError, match="train.trainable 'all' trains it"):
        Run(tiny(objective={"distillation": 0.5}), tmp_path)
    without = {"method": {"name": "none", "comp_tokens": None, "sink": None}, "data": {"join": 0.0}}
    with pytest.raises(UserError, match="method 'none' is given none"):
        Run(tiny(objective={"distillation": 0.5}, train={"trainable": "adapter"}, **without), tmp_path)


def test_accumulation_averages_the_means_of_micro_batches():
    config = tiny(adapter={"dropout": 0.0}, optimizer={"clip_norm": 0.0, "schedule": "constant", "warmup_ratio": 0.0})
    graphdef, step, (state, frozen, batches, key) = pieces(config)
    method = load_experiment(config).method

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        model = nnx.merge(graphdef, params, frozen)
        return mean_loss(model, parallel_forward(model, batch, method=method), batch, method)[0]

    each = [jax.tree.map(lambda x, n=n: x[n], batches) for n in range(2)]
    losses, grads = zip(*(loss(state["params"], batch) for batch in each), strict=True)
    expected = optax.global_norm(jax.tree.map(lambda a, b: (a + b) / 2, *grads))
    _, found = step(state, frozen, batches, key)
    np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], expected, rtol=1e-4)


def pieces(config):
    """A graph, the step, and its arguments."""
    experiment = load_experiment(config)
    graphdef, params, frozen = training_step.split(experiment.model, config.train.trainable)
    optimizer = training_step.make_optimizer(config.optimizer, training_step.make_schedule(config.optimizer, 8))
    data = prepare(config.data, experiment.method, None, experiment.model_config.vocab_size).iterator(seed=0)
    batches = jax.tree.map(lambda *x: np.stack(x), next(data), next(data))
    dropout = config.adapter.dropout > 0
    step = training_step.make_step(
        graphdef, experiment.method, optimizer, config.train, objective=config.objective, dropout=dropout
    )
    return graphdef, step, (training_step.init_state(params, optimizer), frozen, batches, jax.random.key(0))


@pytest.mark.parametrize("attention", ["xla", "pallas"])
def test_attention_of_the_config_is_used(attention, monkeypatch):
    """In training and in validation."""
    config = tiny(train={"attention": attention})
    graphdef, step, (state, frozen, batches, key) = pieces(config)
    assert ("pallas_call" in str(jax.make_jaxpr(step)(state, frozen, batches, key))) == (attention == "pallas")
    asked = []
    forward = lambda *arguments, **options: (
        asked.append(arguments[0].attention) or parallel_forward(*arguments, **options)
    )
    monkeypatch.setattr(training_step, "parallel_forward", forward)
    loss = training_step.make_validation(graphdef, load_experiment(config).method, config.train)
    loss(state["params"], frozen, [jax.tree.map(lambda x: x[0], batches)], lambda: False)
    assert asked == [attention]


def test_schedule():
    config = tiny(optimizer={"learning_rate": 1.0, "warmup_ratio": 0.1}).optimizer
    schedule = training_step.make_schedule(config, 100)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 55, 100)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    constant = training_step.make_schedule(dataclasses.replace(config, schedule="constant"), 100)
    np.testing.assert_allclose([constant(s) for s in (5, 10, 99)], [0.5, 1, 1], atol=1e-6)


def test_weight_decay_spares_scales_and_biases():
    params = {"layers": {"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, "norm": {"scale": jnp.ones(2)}}
    config = dataclasses.replace(tiny().optimizer, weight_decay=0.5)
    optimizer = training_step.make_optimizer(config, optax.constant_schedule(0.1))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert updates["layers"]["mlp"]["kernel"][0, 0] == pytest.approx(-0.05)
    assert not updates["layers"]["mlp"]["bias"].any() and not updates["norm"]["scale"].any()


def test_continue_from_an_adapter_of_other_sizes_is_refused(whole):
    with pytest.raises(UserError, match="adapter.rank is 4, but the adapter to start from, .*, has 2"):
        load_experiment(tiny(adapter={"rank": 4, "load": str(whole[0] / "adapter")}))
    with pytest.raises(UserError, match="adapter.targets is .'q_proj'., but .*; set the key to that or to more"):
        load_experiment(tiny(adapter={"rank": 2, "targets": ["q_proj"], "load": str(whole[0] / "adapter")}))


@pytest.mark.once
def test_continue_from_an_adapter_on_fewer_projections(whole, tmp_path, capsys):
    source = str(whole[0] / "adapter")
    four = ["q_proj", "k_proj", "v_proj", "o_proj"]
    old = tiny(adapter={"load": source})
    wider = tiny(adapter={"load": source, "targets": [*four, "up_proj", "down_proj"]})
    before, after = load_experiment(old), load_experiment(wider)
    assert "adapter.targets: up_proj, down_proj start fresh" in capsys.readouterr().out
    found = Adapter.of(after.model, method=after.method, base="").arrays
    new = {f"layers.mlp.{name}.{leaf}" for name in ("up_proj", "down_proj") for leaf in ("lora_a", "lora_b")}
    assert found.keys() - Adapter.of(before.model, method=before.method, base="").arrays.keys() == new
    assert found["layers.mlp.up_proj.lora_a"].any() and not found["layers.mlp.up_proj.lora_b"].any()
    chunk = Chunk(jnp.arange(1, 9)[None], jnp.ones((1, 8), bool))
    sizes = {"batch": 1, "memory_capacity": 4, "raw_capacity": 16}
    caches = [
        compress_step(x.model, init_cache(x.model, x.method, **sizes), chunk, method=x.method) for x in (before, after)
    ]
    np.testing.assert_array_equal(*(cache.k for cache in caches))
    Run(wider, tmp_path / "wider").train()
    trained = Adapter.read(tmp_path / "wider" / "adapter")
    assert trained.arrays["layers.mlp.up_proj.lora_b"].any()
    # Its own shape holds where it is named on the command line.
    assert load_experiment(old, adapter=tmp_path / "wider" / "adapter").adapter_config.targets == trained.config.targets


def test_start_from_an_adapter_of_another_method(whole, tmp_path, capsys):
    """Only where the config allows it; the adapter that comes of it is the new method's alone."""
    begun = {"load": str(whole[0] / "adapter"), "accept_other_method": True}
    merge = {"name": "ccm_merge", "comp_tokens": 1, "groups": 2}
    with pytest.raises(UserError, match="was trained for the method ccm_concat"):
        load_experiment(tiny(method=merge, adapter={"load": begun["load"]}))
    start = load_experiment(tiny(method=merge, adapter=begun))
    said = "was trained for ccm_concat (1 token, sink); it starts ccm_merge (1 token, 2 groups, sink)"
    assert said in capsys.readouterr().out
    there = Adapter.read(begun["load"]).arrays
    for path, x in Adapter.of(start.model, method=start.method, base="").arrays.items():
        np.testing.assert_array_equal(x, there[path], err_msg=path)
    more = load_experiment(tiny(method=merge | {"comp_tokens": 3}, adapter=begun))
    rows = Adapter.of(more.model, method=more.method, base="").arrays[COMP]
    np.testing.assert_array_equal(rows, np.repeat(there[COMP][:1], 3, axis=0), err_msg="the last stands for the others")
    assert "it starts ccm_merge (3 tokens, 2 groups, sink)" in capsys.readouterr().out
    with pytest.raises(UserError, match="a plain LoRA without compression tokens"):
        Adapter.read(begun["load"]).trained_on(build("full")).trained_on(more.method)
    Run(tiny(method=merge, adapter=begun), tmp_path / "merge").train()
    own = open_config(str(tmp_path / "merge" / "adapter"))
    assert own.method.groups == 2 and not own.adapter.accept_other_method
    with pytest.raises(UserError, match="was trained for the method ccm_merge"):
        load_experiment(tiny(), adapter=tmp_path / "merge" / "adapter")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": []}}, "data.train is empty"),
        ({"method": {"name": "ccm_concat", "decay": 0.5}}, "option of method 'ccm_concat'"),
        ({"method": {"name": "ccm_concta"}}, "did you mean 'ccm_concat'"),
        ({"model": {"scratch": {"vocab_size": 0}}}, "scratch.vocab_size is 0"),
        ({"model": {"scratch": {"vocab_size": 21, "hidden": 15}}}, "model.scratch: hidden=15"),
        ({"model": {"scratch": {"vocab_size": 21, "kv_heads": 3}}}, "model.scratch: 4 query heads cannot share 3"),
        ({"adapter": {"rank": 0}, "method": {"name": "full", "comp_tokens": None, "sink": None},
          "train": {"trainable": "adapter"}, "data": {"join": 0.0}}, "nothing to train"),
        # Before anything is loaded.
        ({"method": {"name": "evict", "comp_tokens": None, "sink": None}, "data": {"train": ["missing.jsonl"]},
          "model": {"source": "missing"}}, "no parallel form"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, sections, message):
    with pytest.raises(UserError, match=message):
        Run(tiny(**sections), tmp_path)


def test_the_folder_of_an_evaluation_is_left_alone(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.yaml"
    save_config(tiny(), path)
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["train", str(path), "--workdir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main)
    assert stopped.value.code == 2 and "holds the results of another command" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "results.json", path]


def test_metrics_after_the_resumed_step_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert cut(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert cut(path, 2) == 0 and cut(tmp_path / "none.jsonl", 0) == 0
    # A kill between a line and its end: the next record gets a line of its own.
    path.write_text('{"step": 1}\n{"step": 2}')
    assert cut(path, 2) == 0 and path.read_text() == '{"step": 1}\n{"step": 2}\n'
    # What a machine that stopped may leave of blocks that were not written; and no record.
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[2]\n{"step": "x"}\n{"step": null}\n{"step": 2}\n' + bytes(9))
    assert cut(path, 2) == 5 and path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_records_are_on_disk_before_the_checkpoint_that_stands_on_them(tmp_path, monkeypatch):
    """When the machine stops, what was written last is lost: no record that the checkpoint takes for written."""
    save, fsync, seen, disk = Checkpoints.save, os.fsync, [], {}

    def on_disk(number):
        fsync(number)
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.is_file():
            disk[path] = path.read_bytes()

    def saving(self, step, state, progress):
        files = [tmp_path / "metrics.jsonl", *(tmp_path / "tensorboard").iterdir()]
        assert all(disk[path] == path.read_bytes() for path in files)
        assert json.loads(disk[files[0]].splitlines()[-1])["step"] == progress["progress"]["step"] == step
        # TensorBoard's own queue was emptied, too.
        seen.append(len(disk[files[1]]))
        save(self, step, state, progress)

    monkeypatch.setattr(os, "fsync", on_disk)
    monkeypatch.setattr(Checkpoints, "save", saving)
    with Run(tiny(train={"steps": 4, "log_every": 1, "eval_every": 0, "checkpoint_every": 2}), tmp_path) as run:
        run.train()
    assert len(seen) == 2 and seen[0] < seen[1]


def test_progress_line_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Metrics(tmp_path, start=0, steps=10) as metrics:
        metrics.advance(4, 2.5)
        metrics.report(5, 10, {"loss": 2.25, "tokens_per_second": 1234.0}, 60)
        metrics.say("a line above")
    out = capsys.readouterr().out
    assert "5/10" in out and "2.2500" in out and "1,234 tokens/s" in out and "a line above" in out


def test_wandb_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.wandb is 'mine'.*pip install"):
        Metrics(tmp_path, start=0, steps=1, wandb="mine")


def test_a_resumed_run_continues_its_run_of_wandb(tmp_path, monkeypatch):
    opened = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **given: opened.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    # Begun, resumed twice, logged to another project, begun anew.
    for start, project in ((0, "mine"), (4, "mine"), (6, "mine"), (6, "other"), (0, "other")):
        Metrics(tmp_path, start=start, steps=8, wandb=project).close()
    first, second, third, moved, anew = (given["id"] for given in opened)
    assert first == second == third and len({first, moved, anew}) == 3
    assert {given["resume"] for given in opened} == {"allow"} and opened[3]["project"] == "other"


def test_clock():
    assert [clock(s) for s in (5, 65, 3605, 100000)] == ["0:05", "1:05", "1:00:05", "27:46:40"]


@pytest.mark.processes
def test_command_stops_on_sigterm_with_code_0(tmp_path):
    path, workdir = tmp_path / "tiny.yaml", tmp_path / "run"
    save_config(tiny(train={"steps": 1_000_000, "log_every": 1, "checkpoint_every": 1_000_000}), path)
    command = [sys.executable, "-m", "jax_ccm.train", str(path), "--workdir", str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 300
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM at step" in out and "Traceback" not in err
    with Checkpoints(workdir / "checkpoints") as store:
        assert store.latest() == json.loads((workdir / "summary.json").read_text())["step"] > 0


def test_validation_has_no_weights_of_training_sources(tmp_path):
    sources = [f"generated:recall?split=train&facts=3&names=10&things=10&size=9&seed={seed}" for seed in (1, 2)]
    steps = {"steps": 2, "eval_every": 2, "checkpoint_every": 2}
    with Run(tiny(data={"train": sources, "weights": [3, 1]}, train=steps), tmp_path / "run") as run:
        run.train()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["validation_loss"] > 0
