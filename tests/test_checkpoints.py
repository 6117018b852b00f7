"""Checkpoints: what goes in comes out, the newest stay, and another config is refused."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ccm.checkpoints import Checkpoints, require_same
from jax_ccm.config import Config, TrainConfig, from_mapping, to_mapping
from jax_ccm.errors import RunError, UserError


def state(value: float):
    params = {"a": {"b": jnp.full((2, 3), value)}, "c": jnp.arange(4.0) * value}
    optimizer = optax.adamw(1e-3).init(params)
    return {"params": params, "optimizer": optimizer, "step": jnp.int32(value)}


def test_round_trip_and_retention(tmp_path):
    with Checkpoints(tmp_path, keep=2) as store:
        assert store.latest() is None
        for step in (1, 2, 3):
            store.save(step, state(step), {"data": {"next_index": 7 * step}, "best": None})
    with Checkpoints(tmp_path, keep=2) as store:
        assert store.steps() == [2, 3]
        assert store.progress(3) == {"data": {"next_index": 21}, "best": None}
        restored = store.state(3, state(0))
    assert jax.tree.structure(restored) == jax.tree.structure(state(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(1, state(1), {"n": 1})
        store.save(1, state(2), {"n": 2})
        assert store.progress(1) == {"n": 1}


def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path):
    with Checkpoints(tmp_path) as store:
        store.save(1, state(1), {})
        store.save(2, state(2), {})
    shutil.rmtree(tmp_path / "2" / "state")
    with Checkpoints(tmp_path) as store, pytest.raises(RunError, match="2 cannot be read .*resume from step 1"):
        store.state(2, state(0))


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
