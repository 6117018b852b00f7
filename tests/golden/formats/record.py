"""Writes one small file of each kind that users keep: ``python tests/golden/formats/record.py FOLDER``.

For two methods an archive: the working directory of a run of two steps (config, checkpoint, adapter), sessions in a
memory file, and what the version that wrote them computes from them. ``before_move`` is from before the library's
modules went into rooms (memory files of the first format), ``memory_2`` has memory files of the second;
`tests.test_formats` loads both.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np

from jax_ccm.config.loading import Experiment, load_experiment
from jax_ccm.config.schema import Config, from_mapping, load_config
from jax_ccm.memory import files, steps
from jax_ccm.memory.cache import init_cache
from jax_ccm.rules.types import Chunk
from jax_ccm.training.run import Run

METHODS = ("ccm_concat", "ccm_merge")
# Steps of the recorded run, and of the one that goes on from it.
STEPS, MORE = 2, 4
FINGERPRINTS = {"base": "tiny"}
CONFIG = {
    "model": {
        "scratch": {"layers": 2, "hidden": 8, "intermediate": 8, "heads": 2, "kv_heads": 1, "vocab_size": 21},
        "precision": "float32",
    },
    "adapter": {"rank": 2, "dropout": 0.0},
    "data": {
        "format": "recall",
        "train": ["generated:recall?split=train&facts=3&names=10&things=10&size=8"],
        "batch_size": 2,
        "tokens": 20,
        "max_chunks": 3,
        "scored": 3,
    },
    "optimizer": {"learning_rate": 3e-2},
    "train": {"steps": STEPS, "log_every": 1, "eval_every": 0, "checkpoint_every": 2},
}


def chunk(seed: int) -> Chunk:
    """Two rows of four tokens."""
    rng = np.random.default_rng(seed)
    return Chunk(rng.integers(5, 20, (2, 4)).astype(np.int32), np.ones((2, 4), bool))


def sessions(experiment: Experiment):
    """A cache with two sessions of three closed chunks and an open one."""
    model, method = experiment.model, experiment.method
    cache = init_cache(experiment.model, method, 2, memory_capacity=6, raw_capacity=8)
    for number in range(3):
        cache = steps.compress_step(model, cache, chunk(number), method=method)
    return steps.read(model, cache, chunk(3), method=method)[0]


def answer(experiment: Experiment, cache) -> np.ndarray:
    """Logits ``[B, C, V]`` of what is asked next."""
    read = jax.jit(steps.read, static_argnames=("method", "query"))
    return np.asarray(read(experiment.model, cache, chunk(4), method=experiment.method, query=True)[1])


def go_on(folder: Path, workdir: Path) -> float:
    """The loss of the last step of a run that goes on, in ``workdir``, from the checkpoint in ``folder``."""
    shutil.copytree(folder, workdir, dirs_exist_ok=True)
    return Run(longer(load_config(folder / "config.yaml")), workdir).train()["loss"]


def longer(config: Config) -> Config:
    """The config of the run that goes on."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=MORE))


def main(root: Path) -> None:
    for name in METHODS:
        config = from_mapping(CONFIG | {"method": {"name": name, "comp_tokens": 2, "sink": True}})
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        Run(config, folder).train()
        for path in folder.iterdir():
            if path.name not in ("config.yaml", "checkpoints", "adapter"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        experiment = load_experiment(config, adapter=folder / "adapter")
        cache = sessions(experiment)
        files.save(cache, folder / "memory.ccm", experiment.model, fingerprints=FINGERPRINTS, method=experiment.method)
        further = root / ".further"
        expected = {"loss": go_on(folder, further), "logits": answer(experiment, cache).tolist()}
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")
        for path in folder.rglob("commit_success.txt"):
            path.write_text("")  # it would name a folder of the machine that wrote it
        with tarfile.open(root / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(folder, name)
        for path in (further, folder):
            shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
