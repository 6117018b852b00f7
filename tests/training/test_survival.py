"""What a run outlives: kill -9, signals, damaged checkpoints, full disks, folders that cannot be written, lost data."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_ccm.errors import RunError, UserError
from jax_ccm.training.checkpoints import Checkpoints
from jax_ccm.training.run import Run
from tests.data.support import dialogues, tokenizer, write
from tests.lives import Life
from tests.training.test_checkpoints import LEFTOVERS, _collected, flip, largest  # noqa: F401 - a fixture
from tests.training.test_run import TINY, last_state, records, tiny

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings(LEFTOVERS), pytest.mark.usefixtures("collected")]
OFTEN = {"log_every": 1, "eval_every": 12, "checkpoint_every": 2}
SHORT = {"steps": 6, "log_every": 2, "eval_every": 0, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Compiled programs of the lives, apart from those of the other tests: who is killed may leave half of one."""
    return str(tmp_path_factory.mktemp("programs"))


def equal(one, two, step):
    """Whether two runs left the same, bit for bit."""
    assert records(one) == records(two)
    jax.tree.map(np.testing.assert_array_equal, last_state(one, step), last_state(two, step))
    adapters = [
        {path.parent.name: path.read_bytes() for path in run.glob("*/adapter.safetensors")} for run in (one, two)
    ]
    assert adapters[0] and adapters[0] == adapters[1]


def completed(workdir):
    """Steps of the checkpoints that are whole."""
    return {int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()}


@pytest.mark.processes
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(tmp_path, programs, kills):
    """Every other kill comes while a checkpoint is being written, the rest at any time after that."""
    rng = random.Random(kills)
    steps = 8 * kills
    config = tiny(train={**OFTEN, "steps": steps})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert Life(tiny(train={**OFTEN, "steps": steps, "checkpoint_every": steps}), whole, programs).end() == "finished"
    torn, seen = 0, []
    for number in range(kills):
        process = Life(config, broken, programs).process
        before = completed(broken)
        while not completed(broken) - before:  # some progress in each life
            assert process.is_alive()
            time.sleep(0.0005)
        if number % 2:
            time.sleep(rng.uniform(0, 0.2))
        else:
            while not any(broken.glob("checkpoints/*tmp*")):
                assert process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += any(broken.glob("checkpoints/*tmp*"))
        seen.append(max(completed(broken)))
    assert torn >= kills // 4, "hardly any kill came within a write"
    assert seen == sorted(seen) and seen[-1] < steps
    assert Life(config, broken, programs).end() == "finished"
    equal(whole, broken, steps)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of six steps, with checkpoints of steps 4 and 6."""
    workdir = tmp_path_factory.mktemp("short")
    Run(tiny(train=SHORT), workdir).train()
    return workdir


@pytest.fixture
def halfway(short, tmp_path):
    """That run as it stood after step 4 and the write of step 6."""
    workdir = tmp_path / "run"
    shutil.copytree(short, workdir)
    shutil.rmtree(workdir / "adapter")
    return workdir


def signalled(monkeypatch, number, step):
    """Sends this process a signal while step ``step + 1`` runs."""
    settle = Run._settle

    def send(self, pending, metrics):
        settle(self, pending, metrics)
        if pending is not None and pending[0] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "_settle", send)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(short, tmp_path, monkeypatch, capfd, number):
    with monkeypatch.context() as patch:
        signalled(patch, number, 2)
        assert Run(tiny(train=SHORT), tmp_path).train()["status"] == "interrupted"
    name = signal.Signals(number).name
    text = capfd.readouterr()
    assert f"stopped by {name} at step 3 of 6; the checkpoint is saved" in text.out
    assert f"{name}: stopping after the step in hand" in text.err
    assert Run(tiny(train=SHORT), tmp_path).train()["status"] == "finished"
    equal(short, tmp_path, 6)


def test_validation_waits_when_the_run_has_to_stop(tmp_path, monkeypatch):
    config = tiny(train={**SHORT, "eval_every": 3})
    Run(config, tmp_path / "whole").train()
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, 2)
        patch.setattr(jax, "block_until_ready", lambda *_: pytest.fail("validated within the grace"))
        Run(config, tmp_path / "stopped").train()
    Run(config, tmp_path / "stopped").train()
    equal(tmp_path / "whole", tmp_path / "stopped", 6)


class Interrupted(list):
    """Sends this process a signal between its first and its second."""

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.mark.parametrize("stops", [1, 2])
def test_validation_is_given_up_when_the_run_has_to_stop(tmp_path, stops):
    """A signal that comes during a validation, and again during that with which the resumed run begins."""
    config = tiny(train={**SHORT, "eval_every": 3})
    Run(config, tmp_path / "whole").train()
    for _ in range(stops):
        run = Run(config, tmp_path / "stopped")
        run.validation = Interrupted(run.validation * 3)
        assert run.train()["status"] == "interrupted"
        assert run.progress.step == 3 and run.progress.unvalidated
    assert Run(config, tmp_path / "stopped").train()["status"] == "finished"
    equal(tmp_path / "whole", tmp_path / "stopped", 6)


def test_a_step_longer_than_the_grace_is_told_beforehand(tmp_path, capsys):
    Run(tiny(train={**SHORT, "grace": 1e-6}), tmp_path).train()
    out = capsys.readouterr().out
    assert out.count("take longer than train.grace = 1e-06 s: SIGTERM would lose") == 1


def test_a_damaged_checkpoint_is_skipped(short, halfway, capsys):
    flip(largest(halfway / "checkpoints" / "6" / "state"))
    Run(tiny(train=SHORT), halfway).train()
    out = capsys.readouterr().out
    assert f"the checkpoint 6 in {halfway / 'checkpoints'} is damaged (" in out and "it is now 6.damaged" in out
    assert "resuming from the checkpoint of step 4" in out
    equal(short, halfway, 6)


def test_nothing_but_damaged_checkpoints(halfway):
    for step in ("4", "6"):
        flip(largest(halfway / "checkpoints" / step / "state"))
    with pytest.raises(RunError, match="no checkpoint in .* can be read .*remove the folder to start over"):
        Run(tiny(train=SHORT), halfway)


def test_full_disk_while_a_checkpoint_is_written(short, tmp_path, monkeypatch):
    """The limit on the size of files fails the same write that a full disk would."""
    save = Run._save

    def full(self, metrics):
        if self.progress.step < 4:
            return save(self, metrics)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            return save(self, metrics)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", full)
        with pytest.raises(RunError, match="the checkpoint of step 4 cannot be written .*; the one of step 2 is kept"):
            Run(tiny(train=SHORT), tmp_path).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]  # room is given back
    assert Run(tiny(train=SHORT), tmp_path).train()["status"] == "finished"
    equal(short, tmp_path, 6)


@pytest.mark.parametrize("what", ["metrics.jsonl", "summary.json", "adapter.safetensors"])
def test_full_disk_while_something_else_is_written(short, tmp_path, monkeypatch, what):
    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        if what == "metrics.jsonl":
            patch.setattr("jax_ccm.training.metrics.Metrics.write", lambda *_: full(what))
        for write in ("write_text", "write_bytes"):
            real = getattr(Path, write)
            fails = lambda self, *a, real=real, **k: (full if what in self.name else real)(self, *a, **k)
            patch.setattr(Path, write, fails)
        with pytest.raises(RunError, match=r"at step \d the output in .* \(.*No space left.*(kept|no checkpoint)"):
            Run(tiny(train=SHORT), tmp_path).train()
    assert Run(tiny(train=SHORT), tmp_path).train()["status"] == "finished"
    equal(short, tmp_path, 6)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="--workdir .* cannot be used: .*checkpoints"):
        Run(tiny(train=SHORT), tmp_path)


@pytest.mark.processes
def test_read_only_workdir(short, programs):
    """Root may write everywhere, so the run becomes nobody; pytest's own folders are closed to nobody."""
    user = 65534 if os.getuid() == 0 else None
    for code in (Path(__file__).parents[2], Path(sys.prefix)):
        if user is not None and any(path.stat().st_mode & 0o005 != 0o005 for path in (code, *code.parents)):
            pytest.skip(f"nobody may read what is in {code}, not even the user of that name")
    base = Path(tempfile.mkdtemp(prefix="jax_ccm"))
    try:
        shutil.copytree(short, base / "run")
        for path in [base, *base.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        times = lambda: {path: path.stat().st_mtime_ns for path in (base / "run").rglob("*")}
        before = times()
        config = tiny(train={**SHORT, "steps": 8})
        failed = Life(config, base / "run", programs, user=user).end(1)
        assert failed.startswith("RunError: ") and "Permission denied" in failed
        assert "the checkpoint of step 6 is kept" in failed
        failed = Life(config, base / "new", programs, user=user).end(1)
        assert failed.startswith("UserError: --workdir") and "Permission denied" in failed
        assert times() == before and not (base / "new").exists()
    finally:
        for path in [base, *base.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IRWXU)
        shutil.rmtree(base)


def test_lost_data(tmp_path, monkeypatch):
    """A run has read its data when it starts; without them it does not start again, and its checkpoints wait."""
    path = Path(write(tmp_path / "turns.jsonl", dialogues(4, 5, 6)))
    data = {"format": "dialogue", "train": [str(path)], "validation": [], "tokens": 256, "scored": 200, "max_chunks": 6}
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"tokenizer": str(tmp_path / "tokenizer"), "scratch": {**TINY["model"]["scratch"], "vocab_size": 0}}
    config = tiny(model=model, data=data, train={**SHORT, "steps": 4})
    run = Run(config, tmp_path / "run")
    kept = path.rename(tmp_path / "kept")
    signalled(monkeypatch, signal.SIGTERM, 1)
    assert run.train()["status"] == "interrupted"
    with pytest.raises(UserError, match="turns.jsonl"):
        Run(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as store:
        assert store.restore(run.state).step == 2
    kept.rename(path)
    assert Run(config, tmp_path / "run").train()["status"] == "finished"
