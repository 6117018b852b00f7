"""Checkpoints: what goes in comes out, the newest stay, and another config is refused."""

from __future__ import annotations

import gc
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ccm.config.schema import Config, from_mapping, to_mapping
from jax_ccm.config.sections import TrainConfig
from jax_ccm.errors import RunError, UserError
from jax_ccm.training import checkpoints
from jax_ccm.training.checkpoints import Checkpoints, differences, fingerprint, require_same

# Where a read fails, Orbax leaves others waiting behind, which complain whenever they are collected.
LEFTOVERS = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.filterwarnings(LEFTOVERS), pytest.mark.usefixtures("collected")]


@pytest.fixture(name="collected")
def _collected():
    """What a test leaves behind is collected with it, and not in a later one."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def state(value: float):
    params = {"a": {"b": jax.random.normal(jax.random.key(int(value)), (40, 50))}, "c": jnp.arange(4.0) * value}
    optimizer = optax.adamw(1e-3).init(params)
    return {"params": params, "optimizer": optimizer, "step": jnp.int32(value)}


def test_round_trip_and_retention(tmp_path):
    with Checkpoints(tmp_path, keep=2) as store:
        for step in (1, 2, 3):
            store.save(step, state(step), {"data": {"next_index": 7 * step}, "best": None})
    with Checkpoints(tmp_path, keep=2) as store:
        assert store.steps() == [2, 3]
        assert store.progress() == {"data": {"next_index": 21}, "best": None}
        restored = store.restore(state(0))
    assert (restored.step, restored.progress, restored.damaged) == (3, {"data": {"next_index": 21}, "best": None}, {})
    assert jax.tree.structure(restored.state) == jax.tree.structure(state(0))
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(3))


def test_no_checkpoint_yet(tmp_path):
    with Checkpoints(tmp_path) as store:
        assert store.latest() is None and store.progress() is None and store.restore(state(0)) is None


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(1, state(1), {})
        with pytest.raises(UserError, match="in use by another run; wait until that ends, or use another --workdir"):
            Checkpoints(tmp_path)
    abandoned = Checkpoints(tmp_path)
    assert abandoned.steps() == [1]
    del abandoned
    gc.collect()
    Checkpoints(tmp_path).close()


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(1, state(1), {"n": 1})
        store.save(1, state(2), {"n": 2})
        assert store.progress() == {"n": 1}


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "flipped": lambda step: flip(largest(step / "state")),
    "truncated": lambda step: os.truncate(largest(step / "state"), largest(step / "state").stat().st_size // 2),
    "missing": lambda step: largest(step / "state").unlink(),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "progress flipped": lambda step: flip(step / "progress" / "metadata"),
    "progress empty": lambda step: os.truncate(step / "progress" / "metadata", 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, damage):
    with Checkpoints(tmp_path) as store:
        store.save(1, state(1), {"n": 1000001})
        store.save(2, state(2), {"n": 2000002})
    DAMAGE[damage](tmp_path / "2")
    with Checkpoints(tmp_path) as store:
        found = store.restore(state(0))
        assert found.step == 1 and found.progress == {"n": 1000001}
        assert list(found.damaged) == [tmp_path / "2.damaged"] and found.damaged[tmp_path / "2.damaged"]
        assert store.steps() == [1] and store.latest() == 1
        jax.tree.map(np.testing.assert_array_equal, found.state, state(1))
        store.save(2, state(2), {"n": 2000002})  # the step comes again
    with Checkpoints(tmp_path) as store:
        assert store.restore(state(0)).step == 2


def test_all_damaged(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(1, state(1), {})
        store.save(2, state(2), {})
    DAMAGE["flipped"](tmp_path / "1")
    DAMAGE["progress empty"](tmp_path / "2")
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path) as store, pytest.raises(RunError) as error:
        store.restore(state(0))
    assert "no checkpoint in" in str(error.value) and "2: JSONDecodeError" in str(error.value)
    assert "1: 1 of 8 arrays are not what was saved" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_was_not_completed_does_not_count(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(1, state(1), {})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp-3")
    with Checkpoints(tmp_path) as store:
        assert store.steps() == [1]
        store.save(2, state(2), {})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8, bool])
def test_fingerprint_sees_every_change(dtype):
    x = np.random.default_rng(0).integers(2, size=(3, 4, 5)).astype(dtype)
    seen = {fingerprint({"x": x})["['x']"]}
    for place in np.ndindex(x.shape):
        changed = x.copy()
        changed[place] = not changed[place]
        seen.add(fingerprint({"x": changed})["['x']"])
    seen.add(fingerprint({"x": x[::-1]})["['x']"])  # the same elements in another order
    assert len(seen) == x.size + 2
    assert fingerprint({"x": x, "y": x[0]}) == fingerprint({"y": x[0], "x": x})


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64])
@pytest.mark.parametrize("host", [True, False])
def test_fingerprint_sees_all_of_64_bits(dtype, host):
    """One bit anywhere in an element, the same bit of both its halves, and where the element stands."""
    x = np.random.default_rng(0).integers(2**62, size=(2, 3), dtype=np.uint64)
    with jax.enable_x64(not host):
        taken = lambda bits: fingerprint({"x": bits.view(dtype) if host else jnp.asarray(bits.view(dtype))})["['x']"]
        known = taken(x)
        assert known < 2**64 and taken(x[::-1]) != known
        for change in [1 << bit for bit in range(64)] + [(1 << bit) + (1 << bit + 32) for bit in range(32)]:
            for place in ((0, 0), (1, 2)):
                changed = x.copy()
                changed[place] ^= np.uint64(change)
                assert taken(changed) != known, (place, hex(change))
        # What the devices hold and what was read to the host are the same.
        assert host or known == fingerprint({"x": x.view(dtype)})["['x']"]


def test_upper_halves_are_checked_when_they_are_read(tmp_path, monkeypatch):
    with jax.enable_x64(True):
        state = {"x": jnp.arange(6, dtype=jnp.int64) << 40}
        known, other = fingerprint(state), {"x": state["x"].at[3].add(1 << 50)}
        with Checkpoints(tmp_path) as store:
            store.save(1, state, {"n": 1})
            with monkeypatch.context() as patch:  # as if the disk had changed it
                patch.setattr(checkpoints, "fingerprint", lambda tree: known)
                store.save(2, other, {"n": 2})
            found = store.restore(state)
        assert found.step == 1 and list(found.damaged) == [tmp_path / "2.damaged"]
        np.testing.assert_array_equal(found.state["x"], state["x"])


def test_same_config_may_differ_in_cadence():
    one = to_mapping(Config())
    two = to_mapping(Config(train=TrainConfig(steps=5, log_every=1, eval_every=0)))
    assert set(require_same(one, two, "w")) == {"train.steps", "train.log_every", "train.eval_every"}


@pytest.mark.parametrize(
    "change",
    [{"train": {"seed": 1}}, {"method": {"name": "ccm_merge"}}, {"adapter": {"rank": 4}}, {"data": {"batch_size": 3}},
     {"optimizer": {"learning_rate": 1.0}}, {"model": {"source": "other"}}],
)  # fmt: skip
def test_another_config_is_refused(change):
    ((section, values),) = change.items()
    (name,) = values
    with pytest.raises(UserError, match=f"another config: {section}.{name} was .* now .*--workdir"):
        require_same(to_mapping(Config()), to_mapping(from_mapping(change)), "w")


def test_differences():
    a, b = to_mapping(Config()), to_mapping(Config(train=TrainConfig(steps=5)))
    assert differences(a, b) == {"train.steps": (1000, 5)}
