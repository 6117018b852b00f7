"""Two and four real processes on the loopback interface: they are one run, and none outlives another in silence."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_ccm.config import cli
from jax_ccm.distributed import processes
from jax_ccm.errors import UserError
from tests.lives import Life, start_all
from tests.training.test_run import records, tiny

ELSEWHERE = ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES",
             "TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS", *processes.VARIABLES)  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("programs"))


def config(steps=8, **train):
    """Dropout, joining and accumulation are on; the learning rate does not depend on the number of steps."""
    cadence = {"log_every": 1, "eval_every": 4, "eval_examples": 8, "checkpoint_every": 2, "heartbeat": 10}
    return tiny(
        data={"batch_size": 4},
        optimizer={"schedule": "constant", "warmup_ratio": 0.0},
        train={"steps": steps, **cadence, **train},
    )


@pytest.fixture(scope="module")
def whole(programs, tmp_path_factory):
    """One process, uninterrupted."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert Life(config(), workdir, programs).end() == "finished"
    return workdir


def close(one, two):
    """Whether two runs took the same steps: not bit for bit, since sums are split among devices."""
    for ours, theirs in zip(records(one), records(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name in ("adapter/adapter.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        for path in ours:
            np.testing.assert_allclose(ours[path], theirs[path], atol=1e-5, err_msg=path)


def wait_for(workdir, step, lives):
    """Until a step is recorded."""
    path = workdir / "metrics.jsonl"
    while f'{{"step": {step},' not in (path.read_text() if path.exists() else ""):
        assert all(life.process.is_alive() for life in lives), lives[0].log.read_text()
        time.sleep(0.002)


@pytest.mark.processes
def test_two_are_one_and_stop_together(whole, programs, tmp_path):
    """One of two is told to stop: both do, after the same step; one process alone goes on from what they saved."""
    workdir = tmp_path / "run"
    lives = start_all(2, config(checkpoint_every=100), workdir, programs)
    wait_for(workdir, 2, lives)
    os.kill(lives[1].process.pid, signal.SIGTERM)
    assert [life.end() for life in lives] == ["interrupted"] * 2
    step = json.loads((workdir / "summary.json").read_text())["step"]
    assert 2 < step < 8
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {str(step)}
    # The first process alone prints.
    assert "done" not in lives[1].log.read_text() and f"at step {step} of 8" in lives[0].log.read_text()
    assert "step 1/8" in lives[0].log.read_text() and "step 1/8" not in lives[1].log.read_text()
    assert Life(config(), workdir, programs).end() == "finished"
    close(workdir, whole)


@pytest.mark.processes
def test_one_killed_the_other_says_so_and_the_run_goes_on(whole, programs, tmp_path):
    workdir = tmp_path / "run"
    lives = start_all(2, config(), workdir, programs)
    wait_for(workdir, 3, lives)
    lives[1].process.kill()
    began = time.monotonic()
    lives[0].process.join(120)
    assert lives[0].process.exitcode not in (None, 0), f"still there after {time.monotonic() - began:.0f} s"
    said = lives[0].log.read_text()
    assert "another one is gone" in said or "another task died" in said
    lives = start_all(2, config(), workdir, programs)
    assert [life.end() for life in lives] == ["finished"] * 2
    close(workdir, whole)


@pytest.mark.processes
@pytest.mark.slow
def test_a_checkpoint_of_four_is_read_by_one_and_by_two(whole, programs, tmp_path):
    workdir = tmp_path / "run"
    assert [life.end() for life in start_all(4, config(steps=4), workdir, programs)] == ["finished"] * 4
    for count in (1, 2, 4):
        copy = tmp_path / f"run{count}"
        shutil.copytree(workdir, copy)
        lives = start_all(count, config(), copy, programs)
        assert [life.end() for life in lives] == ["finished"] * count
        close(copy, whole)


@pytest.mark.processes
@pytest.mark.slow
def test_four_with_weights_cut_and_buckets(programs, tmp_path):
    """Weights over two processes, rows over two, and the same bucket for all."""
    one, four = tmp_path / "one", tmp_path / "four"
    changed = {"data": {"batch_size": 4, "buckets": [16]}, "optimizer": {"accumulation": 1}}
    make = lambda **mesh: tiny(**changed, mesh=mesh, train={"eval_examples": 8, "log_every": 1})
    assert Life(make(), one, programs).end() == "finished"
    assert [life.end() for life in start_all(4, make(data=2, fsdp=2), four, programs)] == ["finished"] * 4
    close(four, one)


@pytest.mark.processes
def test_a_mistake_ends_all(programs, tmp_path):
    """A batch that does not spread over two processes: no process stays behind."""
    lives = start_all(2, tiny(), tmp_path / "run", programs)
    assert "data.batch_size is 3, but rows are spread over" in lives[0].end(1)
    lives[1].process.join(120)
    assert lives[1].process.exitcode not in (None, 0)


@pytest.mark.processes
def test_workdirs_that_are_not_shared(programs, tmp_path):
    lives = start_all(2, config(), [tmp_path / "host0", tmp_path / "host1"], programs)
    assert "is not the same folder for all 2 processes" in lives[0].end(1)


@pytest.fixture
def alone(monkeypatch):
    """An environment in which nobody else is, and where joining others would show."""
    for name in ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    monkeypatch.setattr(processes, "is_first", lambda: True)
    before = jax.config.jax_cpu_collectives_implementation
    yield joined
    jax.config.update("jax_cpu_collectives_implementation", before)


@pytest.mark.parametrize(
    "given",
    [{}, {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, {"SLURM_NTASKS": "8"},
     {"TPU_WORKER_HOSTNAMES": "localhost"}, {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
     dict(zip(processes.VARIABLES, ("host:1", "1", "0"), strict=True))],
)  # fmt: skip
def test_one_process_joins_nobody(alone, monkeypatch, given):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    processes.initialize(60)
    processes.refuse_several()
    assert alone == []


@pytest.mark.parametrize(
    ("given", "chips"),
    [({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, []), ({"OMPI_COMM_WORLD_SIZE": "2"}, []),
     ({"TPU_WORKER_HOSTNAMES": "a,b"}, []), ({}, ["/dev/accel0"])],
)  # fmt: skip
def test_clusters_that_jax_knows(alone, monkeypatch, given, chips):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("glob.glob", lambda pattern: chips)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    processes.initialize(60)
    assert alone == [{"heartbeat_timeout_seconds": 60}]


def test_named_processes(alone, monkeypatch):
    for name, value in zip(processes.VARIABLES, ("host:1", "3", "2"), strict=True):
        monkeypatch.setenv(name, value)
    processes.initialize(30)
    (found,) = alone
    assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == ("host:1", 3, 2)


# What a launcher sets for the second of two or more.
LAUNCHED = {
    "variables": dict(zip(processes.VARIABLES, ("host:1", "2", "1"), strict=True)),
    "srun": {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2"},
}
PACKAGE = Path(processes.__file__).parents[1]
COMMANDS = sorted(path.stem for path in PACKAGE.glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("launcher", LAUNCHED)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_joins_the_others_or_refuses_to_be_one_of_several(alone, monkeypatch, capsys, command, launcher):
    """Not so many copies of one run that write into one folder."""
    for name, value in LAUNCHED[launcher].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", [command])
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(PACKAGE / f"{command}.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and ("runs in one process" in err) == (command != "train"), err


def test_hosts_of_a_slice_are_known_to_the_devices(alone, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    processes.refuse_several()
    with pytest.raises(UserError, match="the devices are those of 4 processes"):
        processes.refuse_several(devices=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [(("host:1", "2", None), "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES without JAX_PROCESS_ID"),
     (("host:1", "2", "2"), "JAX_NUM_PROCESSES=2 and JAX_PROCESS_ID=2"), (("host:1", "two", "0"), "NUM_PROCESSES=two")],
)  # fmt: skip
def test_mistakes(alone, monkeypatch, values, message):
    for name, value in zip(processes.VARIABLES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes.initialize(60)
    with pytest.raises(UserError, match=message):
        processes.refuse_several()
