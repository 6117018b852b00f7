"""One training run in a working directory: it goes on where it stopped, and stops where it can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_ccm.config.loading import Experiment, build_method, load_experiment
from jax_ccm.config.schema import Config, from_mapping, save_config, to_mapping
from jax_ccm.data.batches import TrainingSet, prepare
from jax_ccm.distributed import processes, sharding
from jax_ccm.errors import RunError, UserError
from jax_ccm.records import output, paths
from jax_ccm.rules.batch import Batch
from jax_ccm.rules.rows import require_parallel
from jax_ccm.training import inputs
from jax_ccm.training.checkpoints import Checkpoints, require_same
from jax_ccm.training.exports import export
from jax_ccm.training.metrics import Metrics, Progress, clock, open_metrics
from jax_ccm.training.preemption import StopRequest
from jax_ccm.training.programs import grouped, out_of_memory_as_error
from jax_ccm.training.step import (
    check_spread,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    make_validation,
    split,
)


class Run:
    """A training run: `Run(config, workdir).train()`.

    It holds its folder from the start until `train` has ended. One that is not trained gives it back by `close`, or at
    the end of ``with Run(config, workdir) as run:``.
    """

    def __init__(self, config: Config, workdir: str | Path, *, accept_changes: bool = False):
        """Loads the model and the data, and the newest checkpoint if there is one.

        Args:
          config: the config.
          workdir: where all output goes, and where a stopped run is found again.
          accept_changes: resume even if base, adapters, tokenizer or data are not what the run began with.

        Raises:
          UserError: for a bad config, missing files, or a checkpoint of another config, another base or other data.
          RunError: if there are checkpoints, and none of them can be read.
        """
        method = build_method(config)
        require_parallel(method)
        config.objective.require(method, trains_base=config.train.trainable == "all")
        self.config, self.workdir = config, paths.of(workdir)
        self.progress = Progress()
        self._accepted: list[dict[str, Any]] = []
        self._stop = StopRequest(config.train.grace, self._last_good)
        self._warned = False
        folder = paths.usable(self.workdir / "checkpoints")
        processes.require_shared(folder)
        # Whatever fails below gives the folder back to other runs; from `pop_all` on that is for `train` or `close` to
        # do.
        with contextlib.ExitStack() as stack:
            self.checkpoints = stack.enter_context(Checkpoints(folder, config.train.keep))
            # Configs are compared before anything large is loaded.
            stored = self.checkpoints.progress()
            if stored is not None:
                # Read through the dataclasses: keys that an older version did not have yet get their defaults.
                before = to_mapping(from_mapping(stored["config"]))
                if config.model.precision == "auto":  # what it became holds for the whole run
                    model = dataclasses.replace(config.model, precision=before["model"]["precision"])
                    self.config = config = dataclasses.replace(config, model=model)
                self._announce_changes(require_same(before, to_mapping(config), self.workdir))
            self.experiment = load_experiment(config)
            # The precision is resolved in it: config.yaml and checkpoints hold what "auto" became.
            self.config = self.experiment.config
            with sharding.use(self.experiment.mesh):
                self._prepare(stored, accept_changes)
            stack.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder back to other runs. To close twice, or after `train`, does no harm."""
        self.checkpoints.close()

    def _prepare(self, stored: dict[str, Any] | None, accept_changes: bool) -> None:
        """Opens the data, and places what is trained: fresh, or from the newest checkpoint."""
        config = self.config
        check_spread(config.data, self.experiment.mesh)
        self._describe()
        train, self.validation = self._open_data(self.experiment)
        changed: list[str] = []
        if stored is not None:
            changed = inputs.require_same(stored.get("inputs"), self._inputs, self.workdir, accept=accept_changes)
        self.batches = train.iterator(seed=config.train.seed, rows=self._rows())
        self.graphdef, params, self.frozen = split(self.experiment.model, config.train.trainable)
        if not jax.tree.leaves(params):
            raise UserError(
                f"there is nothing to train: adapter.rank is {config.adapter.rank} and method "
                f"{config.method.name!r} adds no tokens; raise adapter.rank, or set train.trainable: all"
            )
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        optimizer = make_optimizer(config.optimizer, self.schedule)
        method = self.experiment.method
        init = functools.partial(init_state, optimizer=optimizer)
        mesh, shape = self.experiment.mesh, self.experiment.model_config
        state_shardings = sharding.parameter_shardings(mesh, jax.eval_shape(init, params), shape)
        # The model's own arrays become those of the state.
        self.state = jax.jit(init, donate_argnums=0, out_shardings=state_shardings)(params)
        dropout, out = config.adapter.dropout > 0, (state_shardings, sharding.replicated(mesh))
        self._step = make_step(
            self.graphdef, method, optimizer, config.train, objective=config.objective, dropout=dropout, shardings=out
        )
        self._validation_loss = make_validation(self.graphdef, method, config.train)
        # Donated above, but shapes are still known.
        self._count(params)
        restored = self.checkpoints.restore(self.state)
        if restored is None:
            return
        for path, why in restored.damaged.items():
            print(f"the checkpoint {path.stem} in {path.parent} is damaged ({why}); it is now {path.name}")
        self.state = restored.state
        self.batches.set_state(restored.progress["data"])
        self.progress = Progress(**restored.progress["progress"])
        self._accepted = restored.progress.get("accepted", [])
        if changed:
            self._accepted.append({"step": restored.step, "changes": changed})
        if restored.step > config.train.steps:
            raise UserError(
                f"the checkpoint in {self.workdir} is at step {restored.step}, beyond train.steps = "
                f"{config.train.steps}; raise train.steps, or use another --workdir"
            )
        print(f"resuming from the checkpoint of step {restored.step} in {self.workdir}")

    def train(self) -> dict[str, Any]:
        """Trains to the last step, or until SIGTERM or Ctrl-C, and exports what was learned.

        Returns:
          What was written to ``summary.json``.

        Raises:
          RunError: when the loss is no longer a number, or something cannot be written; the last good checkpoint stays.
        """
        try:
            return self._train()
        except (jax.errors.JaxRuntimeError, ValueError) as e:
            if not processes.is_lost_connection(e):
                raise
            raise RunError(
                f"process {jax.process_index()} stops at step {self.progress.step}: another one is gone, or the "
                f"connection to it ({str(e).splitlines()[0]}); {self._last_good()}. Start all processes again to go on"
            ) from e
        except OSError as e:
            raise RunError(
                f"at step {self.progress.step} the output in {self.workdir} could not be written ({e}); "
                f"{self._last_good()}. Mend that, and run the same command again to go on"
            ) from e

    def _train(self) -> dict[str, Any]:
        began = time.perf_counter()
        config, progress = self.config, self.progress
        last = config.train.steps
        if processes.is_first():
            save_config(config, self.workdir / "config.yaml")
        metrics = open_metrics(
            self.workdir, start=progress.step, steps=last, wandb=config.train.wandb, config=to_mapping(self.config)
        )
        compile_seconds = 0.0
        with self.checkpoints, metrics, self._stop, sharding.use(self.experiment.mesh):
            if progress.step < last:
                compile_seconds = self._loop(metrics)
            else:
                metrics.say(f"all {last} steps are done already")
            finished = progress.step == last
            # Within the block: SIGTERM then waits for the export, as it does for a step.
            if finished:
                self._export(metrics, "")
        summary = self._summary(finished, compile_seconds, time.perf_counter() - began)
        if processes.is_first():
            output.write_json(self.workdir / "summary.json", summary)
        processes.wait("summary")
        if finished:
            print(f"done: {self._report()}; summary in {self.workdir / 'summary.json'}")
        else:
            print(
                f"stopped by {self._stop.name} at step {progress.step} of {last}; the checkpoint is saved. Run the "
                "same command again to go on"
            )
        return summary

    def _loop(self, metrics: Metrics) -> float:
        """Runs the steps that remain; returns the seconds that compilation took."""
        train, progress = self.config.train, self.progress
        # The seed's own key makes fresh weights (`load_experiment`); dropout has another.
        key = jax.random.fold_in(jax.random.key(train.seed), 1)
        groups = grouped(self.batches, self.config.optimizer.accumulation)
        # Compiled ahead of time, once for each size of batch (one, unless the data have buckets): an executable cannot
        # be traced again behind our back.
        executables: dict[tuple[int, ...], Any] = {}
        compile_seconds = 0.0
        # The step whose numbers were not looked at yet: its number, and its metrics on the device.
        pending: tuple[int, Any] | None = None
        vote = processes.Vote(lambda: self._stop.name is not None)
        if progress.unvalidated:
            self._validate(metrics, vote)
        began = time.perf_counter()
        while progress.step < train.steps and not progress.unvalidated:
            batch = next(groups)
            # [A, B, ...]: micro-batches in front of the rows, which are spread.
            batch = sharding.place(self.experiment.mesh, batch, leading=1)
            if batch.tokens.shape not in executables:
                self._settle(pending, metrics)
                pending = None
                progress.add_seconds(time.perf_counter() - began)
                began = time.perf_counter()
                compiled = out_of_memory_as_error(self._step.lower(self.state, self.frozen, batch, key).compile)()
                executables[batch.tokens.shape] = out_of_memory_as_error(compiled)
                seconds = time.perf_counter() - began
                compile_seconds += seconds
                rows, length = batch.tokens.shape[1:]
                metrics.say(f"compiled the training step for {rows} x {length} tokens in {seconds:.1f} s")
                began = time.perf_counter()
            # Given to the devices before the step, so that the answer does not wait for it.
            asked = vote.ask()
            # Returns before the step is done. The state is donated: only the new one exists from here on.
            self.state, found = executables[batch.tokens.shape](self.state, self.frozen, batch, key)
            # The step before is looked at while this one runs.
            self._settle(pending, metrics)
            progress.step += 1
            pending = (progress.step, found)
            now, final = progress.step, progress.step == train.steps
            log = final or now % train.log_every == 0
            validate = bool(train.eval_every) and (final or now % train.eval_every == 0)
            stopping = asked()
            save = final or now % train.checkpoint_every == 0 or stopping
            # Otherwise the loop stays one step ahead of the devices.
            if not (log or validate or save):
                continue
            self._settle(pending, metrics)
            pending = None
            progress.add_seconds(time.perf_counter() - began)
            # Before the checkpoint, which then holds the record and the validation: a resumed run repeats neither.
            if log:
                self._record(metrics)
            if validate:
                stopping = self._validate(metrics, vote, final)
            if save or stopping:
                self._save(metrics)
            if stopping and not final:
                break
            began = time.perf_counter()
        return compile_seconds

    def _settle(self, pending: tuple[int, Any] | None, metrics: Metrics) -> None:
        """Waits for a step's numbers, and counts them.

        Raises:
          RunError: if they are not finite.
        """
        if pending is None:
            return
        step, found = pending
        # float() waits for the device.
        loss, norm = float(found["loss"]), float(found["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"at step {step} the loss is {loss} and the norm of its gradient {norm}; {self._last_good()}. Lower "
                f"optimizer.learning_rate ({self.config.optimizer.learning_rate:g}), or set optimizer.clip_norm"
            )
        self.progress.add(loss, norm, int(found["scored"]), int(found["tokens"]))
        window = self.progress.window
        metrics.advance(step, window["loss"] / window["steps"])

    def _record(self, metrics: Metrics) -> None:
        """Writes what the steps since the latest record came to."""
        progress, last = self.progress, self.config.train.steps
        window, progress.window = progress.window, {}
        seconds = max(window["seconds"], 1e-9)
        progress.loss = window["loss"] / window["steps"]
        values = {
            "loss": progress.loss,
            "grad_norm": window["grad_norm"] / window["steps"],
            # The schedule counts steps from 0; this is the rate of the step that was just done.
            "learning_rate": float(np.asarray(self.schedule(progress.step - 1))),
            "tokens_per_second": window["tokens"] / seconds,
            "tokens": progress.tokens,
            "scored_tokens": progress.scored,
        }
        metrics.write(progress.step, values)
        remaining = (last - progress.step) * progress.seconds / progress.step
        metrics.report(progress.step, last, values, remaining)

    def _validate(self, metrics: Metrics, vote: processes.Vote, final: bool = False) -> bool:
        """Validates, and says whether a stop is asked for; unless ``final``, the resumed run then begins with it."""
        progress, stop = self.progress, lambda: vote.ask()()
        progress.unvalidated = False
        if not self.validation:
            return stop()
        batches = (sharding.place(self.experiment.mesh, batch) for batch in self.validation)
        # It may take longer than the grace.
        loss = self._validation_loss(self.state["params"], self.frozen, batches, (lambda: False) if final else stop)
        if loss is None:
            progress.unvalidated = True
            return True
        progress.validation_loss = loss
        metrics.write(progress.step, {"validation_loss": loss})
        better = math.isfinite(loss) and (progress.best is None or loss < progress.best)
        metrics.say(f"step {progress.step}  validation loss {loss:.4f}{'  (best so far)' if better else ''}")
        if better:
            progress.best, progress.best_step = loss, progress.step
            # The loss is the same number in all processes, so that all of them take part in the export.
            self._export(metrics, "_best")
        return stop()

    def _last_good(self) -> str:
        # Also asked by the thread that watches for signals (`StopRequest`).
        good = self.checkpoints.latest()
        return f"the checkpoint of step {good} is kept" if good else "there is no checkpoint yet"

    def _save(self, metrics: Metrics) -> None:
        began = time.perf_counter()
        progress = {
            "config": to_mapping(self.config),
            # No batch is read ahead, so that the iterator stands just behind this step.
            "data": self.batches.get_state(),
            "progress": dataclasses.asdict(self.progress),
            "inputs": self._inputs,
            "accepted": self._accepted,
        }
        # First: the run that goes on from the checkpoint does not write the records up to it again.
        metrics.flush()
        self.checkpoints.save(self.progress.step, self.state, progress)
        grace, a_step = self.config.train.grace, self.progress.seconds / self.progress.step
        # SIGTERM may come just when a step begins: that step is done first, then the checkpoint.
        needed = a_step + time.perf_counter() - began
        if grace and needed > grace and not self._warned:
            self._warned = True
            metrics.say(
                f"a step ({a_step:.1f} s) and a checkpoint ({needed - a_step:.1f} s) take longer than train.grace = "
                f"{grace:g} s: SIGTERM would lose the steps since the last checkpoint. Lower train.checkpoint_every, "
                "or make the step shorter"
            )

    def _export(self, metrics: Metrics, suffix: str) -> None:
        # By all processes: each waits for the others' pieces.
        params = jax.tree.map(processes.whole, self.state["params"])
        model = nnx.merge(self.graphdef, params, self.frozen)
        progress = self.progress
        run: dict[str, float] = {"steps": progress.step, "tokens": progress.tokens, "scored_tokens": progress.scored}
        run["seconds"] = round(progress.seconds, 1)
        path = export(self.workdir, model, self.experiment, run=run, suffix=suffix)
        if path is not None and not suffix:
            metrics.say(f"wrote the adapter to {path}")

    def _open_data(self, experiment: Experiment) -> tuple[TrainingSet, list[Batch]]:
        """The training data, and the fixed batches of the validation."""
        config, vocab = self.config, experiment.model_config.vocab_size
        if not config.data.train:
            raise UserError("data.train is empty; name at least one source to train on")
        train = prepare(config.data, experiment.method, experiment.tokenizer, vocab)
        self._inputs = inputs.of_files(config, experiment.source) | {"data.train": inputs.of_data(train)}
        print(f"training data: {train.report}")
        if not (config.data.validation and config.train.eval_every):
            why = "train.eval_every is 0" if config.data.validation else "data.validation is empty"
            print(f"no validation ({why}): only the last adapter is kept")
            return train, []
        # The same objective, without random joining: what is measured is the method itself.
        data = dataclasses.replace(
            config.data, train=config.data.validation, weights=(), tokenized=None, join=0.0, uncompressed=0.0
        )
        held_out = prepare(data, experiment.method, experiment.tokenizer, vocab)
        self._inputs["data.validation"] = inputs.of_data(held_out)
        count = math.ceil(min(config.train.eval_examples, len(held_out.units)) / data.batch_size)
        print(f"validation data: {held_out.report}; {count * data.batch_size:,} examples are scored each time")
        # Drawn once, so that the same examples are scored each time; the last batch is filled from a second round.
        return train, list(itertools.islice(held_out.iterator(seed=config.train.seed, rows=self._rows()), count))

    def _rows(self) -> list[int]:
        """The rows of each global batch that this process reads."""
        return sharding.process_rows(self.experiment.mesh, self.config.data.batch_size).tolist()

    def _describe(self) -> None:
        config, experiment = self.config, self.experiment
        print(
            f"training {config.method.name} on {experiment.base_name} for {config.train.steps} steps of "
            f"{config.optimizer.accumulation} x {config.data.batch_size} rows; {sharding.describe(experiment.mesh)}, "
            f"{config.model.precision}; output in {self.workdir}"
        )

    def _count(self, params: Any) -> None:
        trees = {"trained": params, "frozen": self.frozen}
        self.parameters = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}
        print(f"parameters: {self.parameters['trained']:,} trained, {self.parameters['frozen']:,} frozen")

    def _announce_changes(self, changes: dict[str, tuple[Any, Any]]) -> None:
        for path, (old, new) in changes.items():
            effect = ""
            if path == "train.steps" and self.config.optimizer.schedule == "cosine":
                effect = "; the learning rate now falls over that many steps"
            print(f"{path} was {old!r} when this run was saved, and is {new!r} now{effect}")

    def _report(self) -> str:
        progress = self.progress

        def loss(x):
            return "not measured" if x is None else f"{x:.4f}"

        text = f"step {progress.step}, loss {loss(progress.loss)}"
        if progress.best is not None:
            text += f", validation loss {loss(progress.validation_loss)} (best {loss(progress.best)} at step "
            text += f"{progress.best_step})"
        return f"{text}, {progress.tokens:,} tokens in {clock(progress.seconds)}"

    def _summary(self, finished: bool, compile_seconds: float, wall_seconds: float) -> dict[str, Any]:
        progress = self.progress
        return {
            "status": "finished" if finished else "interrupted",
            "step": progress.step,
            "steps": self.config.train.steps,
            "loss": progress.loss,
            "validation_loss": progress.validation_loss,
            "best_validation_loss": progress.best,
            "best_step": progress.best_step,
            "tokens": progress.tokens,
            "scored_tokens": progress.scored,
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
            "train_seconds": progress.seconds,
            "wall_seconds": wall_seconds,
            "compile_seconds": compile_seconds,
            "parameters": self.parameters,
            "accepted_changes": self._accepted,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
