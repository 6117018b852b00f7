"""The numbers of a run, and where they go: JSONL always, TensorBoard, a terminal, Weights & Biases if asked for."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from jax_ccm.distributed import processes
from jax_ccm.records import paths
from jax_ccm.records.parsing import read_json

# Names the run of Weights & Biases.
WANDB = "wandb.json"
# Between copies to a bucket, whose objects are written as a whole.
COPY_SECONDS = 30.0


@dataclasses.dataclass
class Progress:
    """Where a run stands, besides its arrays; JSON values, stored with each checkpoint.

    Attributes:
      step: optimizer steps done.
      tokens: tokens that were run, compression tokens included and padding not.
      scored: tokens that were scored.
      seconds: time in training steps, without compilation, validation and checkpoints.
      loss: of the latest interval between records.
      validation_loss: latest.
      best: lowest validation loss.
      best_step: where that was.
      unvalidated: a validation of this step was left out, because the run had to stop.
      window: sums over the steps since the latest record: loss, grad_norm, steps, tokens, scored, seconds.
    """

    step: int = 0
    tokens: int = 0
    scored: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation_loss: float | None = None
    best: float | None = None
    best_step: int | None = None
    unvalidated: bool = False
    window: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, loss: float, grad_norm: float, scored: int, tokens: int) -> None:
        """Counts a step."""
        self.tokens += tokens
        self.scored += scored
        # Sums, not means: a checkpoint within an interval holds them, and the resumed run adds to them.
        for name, value in dict(loss=loss, grad_norm=grad_norm, steps=1, tokens=tokens, scored=scored).items():
            self.window[name] = self.window.get(name, 0) + value

    def add_seconds(self, seconds: float) -> None:
        """Counts time in training steps."""
        self.seconds += seconds
        self.window["seconds"] = self.window.get("seconds", 0.0) + seconds


class Metrics:
    """Writes records of one run to every sink. Use as a context manager, or call `close`."""

    def __init__(self, workdir: Path, *, start: int, steps: int, wandb: str = "", config: dict[str, Any] | None = None):
        """Opens the sinks.

        Args:
          workdir: gets ``metrics.jsonl`` and ``tensorboard/``.
          start: the step that the run resumes from; records of later steps are removed, since they come again.
          steps: the last step, for the progress line.
          wandb: Weights & Biases project, or empty.
          config: shown with the run by Weights & Biases.
        """
        from tensorboardX import SummaryWriter

        self._workdir, self._folder, self._copied = workdir, workdir, time.monotonic()
        if paths.is_remote(workdir):
            # Nothing grows in a bucket: these files grow here, and are copied there.
            self._folder = Path(tempfile.mkdtemp(prefix="jax_ccm-metrics-"))
            for name in ("metrics.jsonl", WANDB):
                if (workdir / name).exists():
                    (self._folder / name).write_bytes((workdir / name).read_bytes())
        self._wandb = _open_wandb(wandb, self._folder, workdir.name, config, start) if wandb else None
        path = self._folder / "metrics.jsonl"
        removed = cut(path, start)
        self._file = path.open("a", encoding="utf-8")
        # TensorBoard forgets what it was told from this step on: those steps are run again.
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start + 1 if start else None)
        self._progress = _Line(start, steps) if sys.stdout.isatty() else None
        if removed:
            self.say(
                f"removed {removed} records after step {start} from {workdir / path.name}; those steps are run again"
            )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Prints a line, above the progress line if there is one."""
        if self._progress is None:
            print(text, flush=True)
        else:
            self._progress.print(text)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records numbers of a step; in the file when this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            # TensorBoard groups curves by what stands before a slash.
            self._board.add_scalar(name.replace("validation_", "validation/"), value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._folder != self._workdir and time.monotonic() - self._copied > COPY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Puts what was written where it stays when the machine stops: on disk, or into the bucket.

        To be called before a checkpoint: the run that goes on from that writes no earlier records again.
        """
        self._copied = time.monotonic()
        self._board.flush()
        if self._folder == self._workdir:
            for path in (*(self._folder / "tensorboard").iterdir(), self._folder / "metrics.jsonl", self._folder):
                paths.settle(path)
            return
        for name in ("metrics.jsonl", WANDB):
            if (self._folder / name).exists():
                (self._workdir / name).write_bytes((self._folder / name).read_bytes())
        paths.upload(self._folder / "tensorboard", self._workdir / "tensorboard")

    def advance(self, step: int, loss: float) -> None:
        """Moves the progress line on."""
        if self._progress is not None:
            self._progress.update(step, loss=f"{loss:.4f}")

    def report(self, step: int, steps: int, values: dict[str, float], remaining: float) -> None:
        """Shows a recorded stretch of steps: in the progress line, or as a line of its own."""
        speed = f"{values['tokens_per_second']:,.0f}"
        if self._progress is not None:
            self._progress.update(step, loss=f"{values['loss']:.4f}", speed=speed)
            return
        self.say(
            f"step {step}/{steps}  loss {values['loss']:.4f}  grad {values['grad_norm']:.3g}  "
            f"lr {values['learning_rate']:.3g}  {speed} tokens/s  {clock(remaining)} left"
        )

    def close(self) -> None:
        """Closes every sink."""
        # Closed before the last copy to a bucket, so that the copy holds everything.
        self._file.close()
        self._board.close()
        self.flush()
        if self._wandb is not None:
            self._wandb.finish()
        if self._progress is not None:
            self._progress.close()
        if self._folder != self._workdir:
            shutil.rmtree(self._folder, ignore_errors=True)


class NoMetrics(Metrics):
    """Writes and shows nothing: for all processes of a run but the first."""

    def __init__(self):
        pass

    def say(self, text: str) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def advance(self, step: int, loss: float) -> None:
        pass

    def report(self, step: int, steps: int, values: dict[str, float], remaining: float) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_metrics(workdir: Path, **options: Any) -> Metrics:
    """`Metrics` in the first process, `NoMetrics` in the others."""
    return Metrics(workdir, **options) if processes.is_first() else NoMetrics()


class _Line:
    """A line of `rich` on a terminal: step, loss, tokens/s, time left."""

    def __init__(self, start: int, steps: int):
        from rich import progress as rich

        self._bar = rich.Progress(
            rich.TextColumn("training"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("ETA"),
            rich.TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("training", total=steps, completed=start, loss="-", speed="-")
        self._bar.start()

    def update(self, step: int, **shown: Any) -> None:
        self._bar.update(self._task, completed=step, **shown)

    def print(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def cut(path: Path, last: int) -> int:
    """Removes the records after step ``last`` from a JSONL file, and lines that are none, as a kill or a crash of the
    machine leaves them; a last line without its end gets one.

    Returns:
      The number of lines removed.
    """
    if not path.exists():
        return 0
    # Records are ASCII; what a crash of the machine leaves need not be text.
    content = path.read_text(encoding="utf-8", errors="replace")
    lines = content.splitlines()
    kept = [line for line in lines if _step(line) <= last]
    whole = "".join(f"{line}\n" for line in kept)
    if whole != content:
        # As a whole or not at all: a kill in between leaves the old records or the new ones.
        paths.write(path, whole.encode())
    return len(lines) - len(kept)


def _step(line: str) -> float:
    """The step of a record; later than any for what is none, such as a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _open_wandb(project: str, folder: Path, name: str, config: dict[str, Any] | None, start: int) -> Any:
    """The run of Weights & Biases that belongs to the folder: the same one when it is resumed, else a new one."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        from jax_ccm.errors import UserError

        raise UserError(
            f"train.wandb is {project!r}, but wandb is not installed; pip install 'jax_ccm[wandb]', or leave the key "
            "empty"
        ) from None
    path = folder / WANDB
    known = read_json(path) if start and path.exists() else {}
    if known.get("project") != project:
        known = {"project": project, "id": uuid.uuid4().hex[:8]}
        paths.write(path, f"{json.dumps(known)}\n".encode())
    return wandb.init(**known, dir=str(folder), config=config, name=name, resume="allow")


def clock(seconds: float) -> str:
    """A duration, as ``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
