"""Checkpoints of a run: what is trained, the optimizer, and where the data stood. The frozen base is not in them."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.distributed import processes
from jax_ccm.errors import RunError, UserError
from jax_ccm.records import folders, paths

T = TypeVar("T")

# In the name of a folder that Orbax is writing; the name changes when all is written.
UNFINISHED = ".orbax-checkpoint-tmp"

# What remat, the attention and the mesh change is rounding.
# Keys that a resumed run may change: how long it runs, and what it reports when.
FREE = (
    "train.steps", "train.log_every", "train.eval_every", "train.eval_examples", "train.checkpoint_every", "train.keep",
    "train.grace", "train.heartbeat", "train.wandb", "train.remat", "train.attention",
    "data.test", "eval", "cache", "mesh", "card",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read, and those that could not be.

    Attributes:
      step: optimizer steps done.
      state: a pytree of arrays.
      progress: JSON values.
      damaged: newer checkpoints that were set aside: where each is now, and what is wrong with it.
    """

    step: int
    state: Any
    progress: dict[str, Any]
    damaged: dict[Path, str]


class Checkpoints:
    """The newest checkpoints of a run, through Orbax. A checkpoint that was not completed does not count.

    Orbax reads back whatever a damaged file decodes to, so each checkpoint carries a `fingerprint` of its arrays. With
    several processes all of them write, and all of them must call every method. The folder is locked until it is
    closed: two runs in one folder would remove what the other is writing.

    Use as a context manager, or call `close`.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        """Opens a folder, which is made if there is none.

        Args:
          folder: where the checkpoints are.
          keep: how many stay.

        Raises:
          UserError: if another run uses the folder.
        """
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = paths.of(folder)
        self._unlock = lambda: None
        if paths.is_remote(self.folder):
            print(f"{self.folder} is in a bucket, which cannot be locked: see that no other run uses it")
        else:
            # Orbax takes absolute paths only.
            self.folder = self.folder.absolute()
            if processes.is_first():
                # Given back by `close`, or when the object is collected; to call it again does nothing.
                self._unlock = weakref.finalize(self, os.close, _hold(self.folder))
        # Not asynchronous: when `save` returns the checkpoint is whole, and an error of writing is raised there.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._remove_unfinished()
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "progress"))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()
        self._unlock()

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps, from old to new."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Writes a checkpoint, and removes those beyond the newest `keep`; nothing if there is one of that step.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays.
          progress: JSON values: the state of the data iterator, the config, and so on. Those of the first process are
            written.

        Raises:
          RunError: if it cannot be written. Older ones are as they were.
        """
        if step in self._manager.all_steps():
            return
        make = self._ocp.args
        # Of what is in memory, before anything is written: what is read back is held against that.
        record: dict[str, Any] = {"progress": dict(progress), "fingerprint": fingerprint(state)}
        record["checksum"] = _checksum(record)
        args = make.Composite(state=make.StandardSave(state), progress=make.JsonSave(record))
        before = set(threading.enumerate())
        _, why = _attempt(lambda: self._manager.save(step, args=args))
        if why:
            # Orbax raises the first error of a write while its other threads still make files.
            _outlast(before)
            self._remove_unfinished()
            last = self.latest()
            kept = "there is none before it" if last is None else f"the one of step {last} is kept"
            raise RunError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({why}); {kept}. See that the disk "
                "has room and can be written, and run the same command again to go on"
            )

    def progress(self) -> dict[str, Any] | None:
        """The JSON values of the newest checkpoint that has readable ones; None without one."""
        for step in reversed(self.steps()):
            record, _ = _attempt(functools.partial(self._record, step))
            if record is not None:  # `restore` says what is wrong with the others.
                return record["progress"]
        return None

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole; None if there are none at all.

        Newer ones that are not are renamed to ``STEP.damaged``, so that their step can be saved again.

        Args:
          like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the structure, shapes, dtypes and shardings to restore.

        Raises:
          RunError: if there are checkpoints, and none of them is whole.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            found, why = self._read(step, like)
            if found is not None:
                state, progress = found
                aside = {self._set_aside(number): text for number, text in damaged.items()}
                return Restored(step, state, progress, aside)
            damaged[step] = why
        if not damaged:
            return None
        listed = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        raise RunError(
            f"no checkpoint in {self.folder} can be read ({listed}). Put a good copy there, or remove the folder to "
            "start over"
        )

    def _read(self, step: int, like: Any) -> tuple[tuple[Any, dict[str, Any]] | None, str]:
        """State and progress of a checkpoint; or None, and what is wrong with it."""
        like = jax.tree.map(_abstract, like)

        def read() -> tuple[Any, dict[str, Any]]:
            # Orbax' handlers read without waiting for other processes: one that fails leaves nobody behind.
            record = self._record(step)
            restore = self._ocp.args.StandardRestore(like)
            return self._ocp.StandardCheckpointHandler().restore(self._epath(step, "state"), args=restore), record

        result, why = _attempt(read)
        # All processes go on from the same checkpoint, or none of them from this one.
        if not processes.agree(result is not None) or result is None:
            return None, why or "another process cannot read its part"
        state, record = result
        found, wanted = fingerprint(state), record["fingerprint"]
        bad = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
        if bad:
            return None, f"{len(bad)} of {len(wanted)} arrays are not what was saved, {bad[0]} for one"
        return (state, record["progress"]), ""

    def _record(self, step: int) -> dict[str, Any]:
        record = dict(self._ocp.JsonCheckpointHandler().restore(self._epath(step, "progress")))
        # JSON in which a bit was flipped may still be JSON.
        if record.pop("checksum", None) != _checksum(record):
            raise ValueError("its progress is not what was saved")
        return record

    def _epath(self, step: int, item: str) -> Any:
        return self._manager.directory / str(step) / item

    def _remove_unfinished(self) -> None:
        """Removes what writes that failed or were killed have left, to give the room back."""
        # In a bucket Orbax marks what is finished, and sees to the rest.
        if processes.is_first() and not paths.is_remote(self.folder):
            for path in self.folder.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, step: int) -> Path:
        """Renames a checkpoint, so that it does not count."""
        bad = self.folder / f"{step}.damaged"
        if processes.is_first():
            if bad.exists():
                shutil.rmtree(bad) if isinstance(bad, Path) else bad.rmtree()
            (self.folder / str(step)).rename(bad)
        processes.wait(f"set aside {step}")
        # The manager remembers which steps there are.
        self._manager.reload()
        return bad


def _hold(folder: Path) -> int:
    """`folders.hold`, in words; the folder is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return folders.hold(folder)
    except BlockingIOError:
        raise UserError(
            f"{folder} is in use by another run; wait until that ends, or use another --workdir for this one"
        ) from None


def _outlast(before: set[threading.Thread], seconds: float = 10.0) -> None:
    """Waits until there are no threads but those of ``before``, and not longer than ``seconds``."""
    end = time.monotonic() + seconds
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.02)


def fingerprint(tree: Any) -> dict[str, int]:
    """A number for each array, by path, of 32 bits, or of 64 if its elements are: any one changed element changes it.

    It is the sum of the elements' bits, each times an odd number that depends on its place, modulo 2^32; of elements of
    64 bits that of their upper halves, and behind it that of their lower ones. Whole numbers have no rounding, so the
    result is the same for every sharding; no array is gathered to compute it.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = _sums([_on_host(x) for _, x in leaves])
    return {
        jax.tree_util.keystr(path): sum(int(x) << 32 * number for number, x in enumerate(halves))
        for (path, _), halves in zip(leaves, sums, strict=True)
    }


def _on_host(x: Any) -> list[Any]:
    """An array; of one of 64 bits on the host its lower and its upper halves, for JAX would take the lower alone."""
    if not isinstance(x, np.ndarray | np.generic) or x.dtype.itemsize != 8:
        return [x]
    bits = np.ascontiguousarray(x).view(np.uint64)
    return [bits.astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32)]


@jax.jit
def _sums(arrays: list[list[Any]]) -> list[list[jax.Array]]:
    def halves(x: jax.Array) -> list[jax.Array]:
        if x.dtype.itemsize != 8:
            return [x]
        # The lower one is first.
        both = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return [both[..., 0], both[..., 1]]

    def of(x: jax.Array) -> jax.Array:
        bits = x.astype(jnp.uint8) if x.dtype == bool else x
        # 8 and 16 bits are widened: every element is one number of 32 bits.
        bits = jax.lax.bitcast_convert_type(bits, f"uint{8 * bits.dtype.itemsize}").astype(jnp.uint32)
        # The weight of an element is 1 + 2 i, i its place in row-major order. Odd numbers have inverses modulo 2^32, so
        # that no change of a single element is multiplied away. An iota for each axis needs no reshape of an array that
        # is spread.
        weights = jnp.ones(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            stride = jnp.uint32(2 * math.prod(x.shape[axis + 1 :]) % 2**32)
            weights += stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        # Overflow is meant: it is the modulus.
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return [[of(half) for x in parts for half in halves(x)] for parts in arrays]


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def require_same(
    stored: Mapping[str, Any], current: Mapping[str, Any], where: str | Path
) -> dict[str, tuple[Any, Any]]:
    """Refuses to resume a run under another config.

    Args:
      stored, current: configs as nested dicts (`schema.to_mapping`).
      where: the folder, for the message.

    Returns:
      The differences that do no harm, ``{path: (stored, current)}``.

    Raises:
      UserError: naming every key that changes the mathematics of the run.
    """
    found = differences(stored, current)
    free = {path: values for path, values in found.items() if _is_under(path, FREE)}
    bad = [path for path in found if path not in free]
    if bad:
        listed = "; ".join(f"{path} was {found[path][0]!r}, now {found[path][1]!r}" for path in bad)
        raise UserError(
            f"the checkpoint in {where} belongs to another config: {listed}. Use the same config, or another --workdir "
            "for the new run"
        )
    return free


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Paths of the keys in which two nested dicts differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[f"{prefix}{name}"] = (a, b)
    return found


def _is_under(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """What a call to Orbax returns, or None and why it failed, in one line.

    Orbax raises many kinds of errors for a full disk or a damaged file, logs the tracebacks of all its threads, and
    leaves readers behind that complain when they are collected; those that can be are collected here.
    """
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level
    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that were never awaited
            try:
                return call(), ""
            except Exception as e:
                why = f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"
            gc.collect()
            return None, why
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook
