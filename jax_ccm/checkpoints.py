"""Checkpoints of a run: what is trained, the optimizer, and where the data stood. The frozen base is not in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_ccm.config import differences
from jax_ccm.errors import RunError, UserError

# Keys that a resumed run may change: how long it runs, and what it reports when.
FREE = (
    "train.steps", "train.log_every", "train.eval_every", "train.eval_examples", "train.checkpoint_every", "train.keep",
    "train.wandb", "train.remat", "data.test", "eval", "cache", "mesh",
)  # fmt: skip


class Checkpoints:
    """The newest checkpoints of a run, through Orbax. A checkpoint that was not completed does not count.

    Use as a context manager, or call `close`.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = Path(os.path.abspath(folder))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "progress"))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()

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
          progress: JSON values: the state of the data iterator, the config, and so on.
        """
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        self._manager.save(
            step, args=args.Composite(state=args.StandardSave(state), progress=args.JsonSave(dict(progress)))
        )

    def progress(self, step: int) -> dict[str, Any]:
        """The JSON values of a checkpoint."""
        args = self._ocp.args
        return self._read(step, args.Composite(progress=args.JsonRestore())).progress

    def state(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint.

        Args:
          step: one of `steps`.
          like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the structure, shapes, dtypes and shardings to restore.
        """
        args = self._ocp.args
        return self._read(step, args.Composite(state=args.StandardRestore(jax.tree.map(_abstract, like)))).state

    def _read(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as e:  # Orbax raises many kinds for a damaged folder.
            older = [other for other in self.steps() if other < step]
            remedy = f"remove that folder to resume from step {older[-1]}" if older else "remove it to start over"
            why = f"{type(e).__name__}: {_first_line(e)}"
            raise RunError(f"the checkpoint {self.folder / str(step)} cannot be read ({why}); {remedy}") from e


def require_same(
    stored: Mapping[str, Any], current: Mapping[str, Any], where: str | Path
) -> dict[str, tuple[Any, Any]]:
    """Refuses to resume a run under another config.

    Args:
      stored, current: configs as nested dicts (`config.to_mapping`).
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


def _is_under(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
