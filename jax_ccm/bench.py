"""``python -m jax_ccm.bench CONFIG.yaml --workdir DIR``: speed and memory side by side, against the machine's rates."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ccm.benchmarks import rivals
from jax_ccm.benchmarks import turns as measured
from jax_ccm.benchmarks.rivals import Rival
from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, load_experiment
from jax_ccm.config.schema import Config, save_config, to_mapping
from jax_ccm.distributed import processes, sharding
from jax_ccm.errors import UserError
from jax_ccm.memory import steps
from jax_ccm.memory.generation import pays_apart
from jax_ccm.methods import build
from jax_ccm.nn import Transformer
from jax_ccm.records.parsing import parse_json
from jax_ccm.records.paths import Folder
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.rows import batch, measure
from jax_ccm.rules.types import Batch, Chunk, Kind, MemoryCache, Method
from jax_ccm.training.step import init_state, make_optimizer, make_schedule, make_step, split

COMMAND = "jax_ccm.bench"


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures on this machine: a turn of a conversation after many others, compression, and training.

    Full context, a window, and the config's method keep the same conversation: a memory that grows with and without
    forgetting, and beside CCM's own methods both ways to write, concatenated and merged. Each number is the median of
    repeated runs after a warm-up; within a round everything is run once, one after the other, so that what disturbs one
    disturbs all. A conversation of 1,000 turns is not talked through: the cache is put into the state in which it would
    be, and one turn is run. Weights do not matter, so no adapter is asked for; the method with its options, the memory
    capacity and the mesh are those of the config.
    Writes bench.json, turns.md, steps.md, sessions.md, plot.png, summary.json and config.yaml into the working
    directory.
    """

    workdir: Folder
    """Where all output goes."""
    turns: tuple[int, ...] = (1, 10, 30, 100, 300, 1000)
    """Closed turns before the one that is measured."""
    prompt: int = 16
    """Tokens of a question."""
    reply: int = 16
    """Tokens of an answer."""
    window: int = 256
    """Newest text tokens that the sliding window keeps; a config whose method is a window has its own."""
    chunk: int = 128
    """Tokens of the chunk that is compressed at once (a method that cuts text itself has its own), and of a row in
    training."""
    prefill: int = 512
    """Tokens of the text that is read at once."""
    rounds: int = 5
    """How often everything is measured; single steps, which are short, three times as often."""
    train_rounds: int = 3
    """How often a training step is measured; 0 for no training."""
    clock: measured.Clock = "wall"
    """What a second is: of the clock on the wall, or of processor time ("cpu"), which does not count waiting for a
    machine that others use too. On one core (taskset -c 0, XLA_FLAGS=--xla_cpu_multi_thread_eigen=false) of an idle
    machine they are the same."""
    memory_gib: float = 16.0
    """Memory of each device that weights, sessions and temporaries may take, for the number of sessions that fit; 0
    leaves it out."""
    reference: Folder | None = None
    """A JSON file with figures of another implementation, which the table then shows beside ours."""


def main() -> None:
    options, config, _ = cli.parse(Options, command=COMMAND)
    bench(config, options, command=shlex.join(["python", "-m", COMMAND, *sys.argv[1:]]))


def bench(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the measurements and writes their files.

    Args:
      config: the config.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``bench.json``.

    Raises:
      UserError: for sizes that cannot be, or a working directory or reference that cannot be used.
    """
    from jax_ccm.benchmarks import report

    start = time.perf_counter()
    reference = _check(options)
    processes.refuse_several(devices=True)
    ways = rivals.rivals(
        config.method.name, config.method.options(), capacity=config.cache.memory_capacity, window=options.window
    )
    experiment = load_experiment(config)
    if experiment.method.recurrent_only and options.train_rounds:
        print(f"note: training is left out; method {experiment.method.name!r} runs only as a recurrence")
        options = dataclasses.replace(options, train_rounds=0)
    if options.train_rounds:
        sharding.check_rows(experiment.mesh, "data.batch_size", config.data.batch_size)
    with sharding.use(experiment.mesh):
        results = _measure(experiment, ways, options, command)
    if reference is not None:
        results["reference"] = reference
    results["seconds"] = round(time.perf_counter() - start, 1)
    _write(config, options.workdir, results)
    report.print_tables(results)
    print(f"results in {options.workdir / 'bench.json'}, picture in plot.png; {results['seconds']:.0f} s")
    return results


def _measure(experiment: Experiment, ways: list[Rival], options: Options, command: str) -> dict[str, Any]:
    """All that is measured, and of what."""
    config, device = experiment.config, jax.devices()[0]
    results: dict[str, Any] = {
        "command": command,
        "title": f"{experiment.base_name.rsplit('/', 1)[-1]}, {config.model.dtype}, {_machine(experiment)}",
        "config": to_mapping(config),
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
        },
        "device": f"{device.platform} ({device.device_kind})",
        "cores": _cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "how": "each number is the median of repeated runs after warm-up; rivals take turns within a round. Turns: the "
        "cache is put into the state after so many turns and one turn is run; no 1,000 turns were talked through",
        "rivals": {rival.name: rival.note for rival in ways},
        "mesh": dict(experiment.mesh.shape),
        "weights_bytes": measured.weights_bytes(experiment.model),
        "kv_bytes_per_slot": experiment.model_config.kv_bytes_per_slot(jnp.dtype(config.model.dtype).itemsize),
    }
    apart = functools.cache(experiment.model.apart)
    results["turns"] = [_turns(experiment, apart, ways, options, turns) for turns in options.turns]
    results |= _steps(experiment, apart, ways, options)
    if options.memory_gib:
        results["sessions"] = _sessions(experiment, ways, options)
    return results


def _check(options: Options) -> dict[str, Any] | None:
    """The reference figures, if asked for."""
    least = {"prompt": 1, "reply": 1, "window": 1, "chunk": 1, "prefill": 1, "rounds": 1, "train_rounds": 0}
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least {smallest}")
    if not options.turns or min(options.turns) < 1 or sorted(set(options.turns)) != list(options.turns):
        raise UserError(f"--turns is {list(options.turns)}; give different numbers from 1, in order, such as 1 10 100")
    if options.memory_gib < 0:
        raise UserError(f"--memory_gib is {options.memory_gib}; it must be at least 0")
    try:
        options.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir {options.workdir} cannot be used: {e}") from e
    if options.reference is None:
        return None
    try:
        found = parse_json(options.reference.read_bytes(), str(options.reference))
        seconds = {name: [float(x) for x in span] for name, span in found["seconds"].items()}
        return {"source": str(found["source"]), "seconds": seconds}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f'--reference {options.reference} cannot be used ({e}); it must be JSON like {{"source": "what and where", '
            '"seconds": {"decode": [0.08, 0.12]}}'
        ) from e


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine(experiment: Experiment) -> str:
    cores = f", {_cores()} CPU cores" if jax.default_backend() == "cpu" else ""
    one = jax.default_backend() == "cpu" and experiment.mesh.size == 1
    return cores.removeprefix(", ") if one else sharding.describe(experiment.mesh) + cores


def _turns(
    experiment: Experiment,
    apart: Callable[[], Transformer],
    ways: list[Rival],
    options: Options,
    turns: int,
) -> dict[str, Any]:
    """A turn after so many, for each rival."""
    found: dict[str, dict[str, list[measured.Sample]]] = {rival.name: {} for rival in ways}
    conversations = [
        measured.Conversation(experiment.model, apart, rival, turns=turns, prompt=options.prompt, reply=options.reply)
        for rival in ways
    ]
    for _ in range(options.rounds):
        for conversation in conversations:
            for part, sample in conversation.run().items():
                found[conversation.rival.name].setdefault(part, []).append(sample)
    row: dict[str, Any] = {"turns": turns, "tokens": turns * (options.prompt + options.reply), "systems": {}}
    for conversation in conversations:
        name = conversation.rival.name
        parts = {part: measured.summary(samples, options.clock) for part, samples in found[name].items()}
        whole = parts["first token"]["seconds"] + options.reply * parts["token"]["seconds"] + parts["close"]["seconds"]
        row["systems"][name] = parts | {
            "turn": whole, "state_bytes": conversation.bytes, "live_slots": conversation.slots,
            "compile_seconds": round(conversation.compile_seconds, 2),
        }  # fmt: skip
    for cell in row["systems"].values():
        cell["to_full"] = cell["turn"] / row["systems"]["full"]["turn"]
    told = ", ".join(f"{name} {cell['turn']:.2f} s" for name, cell in row["systems"].items())
    print(f"a turn after {turns:,}: {told}", flush=True)
    return row


def _steps(
    experiment: Experiment, apart: Callable[[], Transformer], ways: list[Rival], options: Options
) -> dict[str, Any]:
    """The machine's rates, and single steps of the config's method measured against them."""
    model, shape, devices = experiment.model, experiment.model_config, experiment.mesh.size
    dtype = jnp.dtype(experiment.config.model.dtype)
    product, product_flops = measured.matrix_product(dtype)
    read, read_bytes = measured.reading()
    # With the capacity of the config, if its memory grows.
    own = rivals.of(ways, experiment.method)
    method = own.method
    chunk, count = method.chunk or options.chunk, options.prefill
    calls: dict[str, Callable[[], Any]] = {"matrix product": product, "reading": read}
    work = {"matrix product": product_flops}
    tokens = {"prefill": count}

    row = _example(shape.vocab_size, [count])
    text = batch(build("full"), [row], measure(build("full"), row), shape.vocab_size)
    full = dataclasses.replace(build("full"), gate=())
    forward = jax.jit(lambda model, made: model.logits(steps.parallel_forward(model, made, method=full)[:, -1]))
    calls["prefill"] = lambda: forward(model, text)
    work["prefill"] = measured.forward_flops(shape, count, count * (count + 1) // 2, 1)

    # As many turns as fill the memory; without one, as many as are read at once.
    written, recent = method.memory_slots(1, chunk), rivals.kept_text(method, 99, chunk) // chunk if own.memory else 0
    past = (own.memory or written) // written + recent if written else max(count // chunk, 1)
    cache = own.cache(model, 1, turns=past, turn=max(chunk, options.reply))
    state = dict(turns=past, turn=chunk, capacity=cache.memory_capacity)
    live = rivals.slots_after(method, past, chunk, cache.memory_capacity).kind
    slots = int((live == Kind.MEMORY).sum()) if method.remembers else len(live)
    states = {}

    def kept(name: str, call: Callable[[MemoryCache], MemoryCache]) -> None:
        """A call that is given the state which it left, set back to so many turns, for good, as in a server."""
        states[name] = jax.tree.map(jnp.copy, cache)

        def run() -> MemoryCache:
            states[name] = call(rivals.fill(states[name], method, turns=past, turn=chunk))
            return states[name]

        calls[name] = run

    if method.remembers:
        piece = Chunk(np.ones((1, chunk), np.int32), np.ones((1, chunk), bool))
        compress = measured.read_and_close
        kept("compress_step", lambda cache: compress(model, cache, piece, method=method))
        seen = measured.seen_pairs(method, **state, text=chunk, kind=Kind.TEXT, closing=True)
        work["compress_step"] = measured.forward_flops(shape, chunk + len(method.closes), seen, 1)
        tokens["compress_step"] = chunk

    first = jnp.ones((1,), jnp.int32)
    decoder = apart() if pays_apart(model, cache) else model
    answer = lambda cache: measured.answer(decoder, cache, first, length=options.reply, method=method)[0]
    kept("decode", answer)
    seen = measured.seen_pairs(method, **state, text=options.reply, kind=Kind.QUERY, closing=False)
    work["decode"] = measured.forward_flops(shape, options.reply, seen, options.reply)
    tokens["decode"] = options.reply

    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds[name] = round(time.perf_counter() - start, 2)
    samples = measured.interleaved(calls, 3 * options.rounds)
    found = {name: measured.summary(those, options.clock) for name, those in samples.items()}
    beside = dict.fromkeys(tokens, found["matrix product"])
    if options.train_rounds:
        start = time.perf_counter()
        step, sizes, work["train"] = _training(experiment, options.chunk)
        step()
        seconds["train"] = round(time.perf_counter() - start, 2)
        samples = measured.interleaved({"matrix product": product, "train": step}, options.train_rounds)
        found["train"] = measured.summary(samples["train"], options.clock)
        beside["train"] = measured.summary(samples["matrix product"], options.clock)
        tokens["train"] = sizes["tokens"]
    machine = {
        "flops_per_second": devices * product_flops / found["matrix product"]["seconds"],
        "read_bytes_per_second": devices * read_bytes / found["reading"]["seconds"],
    }
    rows: dict[str, Any] = {}
    for name, count in tokens.items():
        taken = found[name]["seconds"]
        # Of the rate that the matrix product reached in the same rounds, on one device, times their number.
        share = work[name] / (devices * product_flops) * beside[name]["seconds"] / taken
        rows[name] = found[name] | {
            "tokens": count, "tokens_per_second": count / taken, "flops": work[name], "of_matrix_rate": share,
            "compile_seconds": seconds[name],
        }  # fmt: skip
    reading = _read_bytes(experiment) / machine["read_bytes_per_second"]
    rows["decode"]["times_reading_weights"] = rows["decode"]["seconds"] / options.reply / reading
    for name in {"compress_step", "decode"} & set(rows):
        rows[name]["memory_slots"] = slots
    if options.train_rounds:
        rows["train"] |= sizes
    return {"machine": machine, "steps": rows}


def _read_bytes(experiment: Experiment) -> int:
    """Bytes of the weights that one decoded token must read: all of the layers, and the head."""
    shape = experiment.model_config
    head = shape.vocab_size * shape.hidden_size
    itemsize = jnp.dtype(experiment.config.model.dtype).itemsize
    return (measured.linear_parameters(shape) + head) * itemsize


def _example(vocab: int, lengths: list[int]) -> Example:
    """A session of random text."""
    rng = np.random.default_rng(0)
    nothing = np.zeros(0, np.int32)
    text = lambda size: Segment(rng.integers(0, vocab, size).astype(np.int32), np.ones(size, bool))
    return Example(nothing, nothing, tuple(text(size) for size in lengths))


def _training(experiment: Experiment, length: int) -> tuple[Callable[[], Any], dict[str, int], float]:
    """A training step of the config on rows of about ``length`` tokens: the call, its sizes, and the FLOPs it needs."""
    config, method, shape = experiment.config, experiment.method, experiment.model_config
    turn = max(min(16, length // 4), 1)
    chunks = max(length // (turn + len(method.closes)) - 1, 1)
    row = _example(shape.vocab_size, [turn] * (chunks + 1))
    sizes = measure(method, row)
    made = batch(method, [row] * config.data.batch_size, sizes, shape.vocab_size)
    graphdef, params, frozen = split(experiment.model, config.train.trainable)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 100))
    init = lambda params: init_state(params, optimizer)
    places = sharding.parameter_shardings(experiment.mesh, jax.eval_shape(init, params), shape)
    step = make_step(config, graphdef, method, optimizer, (places, sharding.replicated(experiment.mesh)))
    batches: Batch = sharding.place(experiment.mesh, jax.tree.map(lambda x: np.asarray(x)[None], made), leading=1)
    # A copy: the step is given its state for good, and the model's arrays are still needed.
    state = [jax.tree.map(jnp.copy, jax.jit(init, out_shardings=places)(params))]
    key = jax.random.key(0)
    # Ahead of time, as in training: an executable cannot be compiled again while it is measured.
    compiled = step.lower(state[0], frozen, batches, key).compile()

    def run() -> Any:
        state[0], metrics = compiled(state[0], frozen, batches, key)
        return jax.block_until_ready(metrics)

    tokens = config.data.batch_size * sizes.tokens
    pairs = config.data.batch_size * _pairs(method, made)
    forward = measured.forward_flops(shape, tokens, 0, config.data.batch_size * sizes.scored)
    attention = measured.forward_flops(shape, 0, pairs, 0)
    # Backward through a frozen base: one product for each one forward, two in attention; another where it is trained.
    backward = forward * (2 if config.train.trainable == "all" else 1) + 2 * attention
    counts = {"rows": config.data.batch_size, "tokens": tokens, "scored": config.data.batch_size * sizes.scored}
    return run, counts, forward + attention + backward


def _pairs(method: Method, made: Batch) -> int:
    """Pairs of query and key that one row's attention needs."""
    from jax_ccm.rules.rows import visible

    first = lambda slots: slots.map(lambda x: np.asarray(x)[:1])
    own = visible(method.rule, first(made.slots), first(made.slots)).sum()
    if made.memory is None:
        return int(own)
    return int(own + visible(method.rule, first(made.slots), first(made.memory.slots)).sum())


def _sessions(experiment: Experiment, ways: list[Rival], options: Options) -> dict[str, Any]:
    """How many sessions fit, for each rival."""
    budget = int(options.memory_gib * 2**30)
    turn = options.prompt + options.reply
    sizes = dict(turns=options.turns[-1], turn=turn, prompt=options.prompt, mesh=experiment.mesh)
    found = {rival.name: measured.most_sessions(experiment.model, rival, budget, **sizes) for rival in ways}
    return {"budget_bytes": budget, "turns": options.turns[-1], "systems": found}


def _write(config: Config, workdir: Path, results: dict[str, Any]) -> None:
    from jax_ccm.benchmarks import report

    save_config(config, workdir / "config.yaml")
    write = lambda name, text: (workdir / name).write_text(text, encoding="utf-8")
    write("bench.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    for name in report.TABLES:
        write(f"{name}.md", report.markdown(results, name))
    report.plot(results, workdir / "plot.png")
    last = results["turns"][-1]
    summary = {
        "status": "finished", "command": results["command"], "turns": last["turns"],
        "seconds_of_a_turn": {name: cell["turn"] for name, cell in last["systems"].items()},
        "tokens_per_second": {name: cell["tokens_per_second"] for name, cell in results["steps"].items()},
        "seconds": results["seconds"],
    }  # fmt: skip
    write("summary.json", json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
