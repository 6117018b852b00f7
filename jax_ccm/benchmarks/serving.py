"""``python -m jax_ccm.benchmarks.serving CONFIG.yaml --workdir DIR [--peer PYTHON]``: many sessions, turn by turn."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jax_ccm.benchmarks import baselines, llama_cpp_peer, report
from jax_ccm.benchmarks import peer as peers
from jax_ccm.benchmarks.baselines import Baseline, fill
from jax_ccm.benchmarks.settings import require_in_order
from jax_ccm.benchmarks.sides import Side, started
from jax_ccm.config import cli
from jax_ccm.config.loading import Experiment, base_source, open_experiment
from jax_ccm.config.schema import Config, to_mapping
from jax_ccm.errors import UserError, require_least
from jax_ccm.memory.cache import init_cache
from jax_ccm.records import figures, output, paths
from jax_ccm.records.paths import Folder
from jax_ccm.sessions.conversations import Conversations
from jax_ccm.sessions.engine import NOTHING, Answering
from jax_ccm.sessions.state import State
from jax_ccm.weights.sources import locate

COMMAND = "jax_ccm.benchmarks.serving"
REMEDY = "give --peer a Python that has llama-cpp-python (pip install llama-cpp-python), or leave it out"
PEER = "llama.cpp"  # has a colour of its own, in `report`


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures turns of many sessions at once, in the engine that `serve` stands on.

    All sessions of a cell ask something at the same moment, each is answered with the same number of tokens, and what
    was said becomes memory. Full context, and the config's method with a memory that grows, one that forgets and one
    that is written over, keep the same conversations. 1,000 turns are not talked through: the sessions are put into the
    state in which they would be. Weights do not matter, so no adapter is asked for. A peer is llama.cpp by
    llama-cpp-python with the same GGUF file: full context, one session after the other, whose state is loaded before
    its turn and saved behind it; a single session stays where it is. Writes serving.json, serving.md and plot.png into
    the working directory.
    """

    workdir: Folder
    """Where all output goes."""
    sessions: tuple[int, ...] = (1, 16, 64, 256)
    """Sessions that ask at the same moment."""
    turns: tuple[int, ...] = (10, 100, 1000)
    """Closed turns of each before."""
    prompt: int = 16
    """Tokens of what is asked, beside those of the template."""
    reply: int = 16
    """Tokens of an answer."""
    least: int = 32
    """Turns that are measured of each, at the least."""
    memory_gib: float = 16.0
    """Memory that the sessions of a cell may take; one that needs more is left out, and says so."""
    peer: str = ""
    """A Python that has llama-cpp-python, for a base that is a GGUF file; empty for none."""
    peer_most_turns: int = 300
    """Turns up to which the peer is measured: it reads all of them first, which takes it minutes."""
    threads: int = 2
    """Threads of the peer."""


def main() -> None:
    options, config = cli.parse(Options, command=COMMAND)
    benchmark(config, options, command=output.command_line(COMMAND))


def benchmark(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the measurements and writes their files.

    Args:
      config: the config; its base and method are used.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``serving.json``.

    Raises:
      UserError: for options that cannot be, a config that cannot chat, or a peer without llama-cpp-python.
    """
    _check(options)
    ways = baselines.compared(
        config.method.name, config.method.options(), capacity=config.cache.memory_capacity, window=1
    )
    ways = [baseline for baseline in ways if baseline.name != "window"]
    with contextlib.ExitStack() as stack:
        experiment = stack.enter_context(open_experiment(config))
        bench = Bench(experiment, options)
        side = stack.enter_context(_peer(base_source(config), bench, options)) if options.peer else None
        results: dict[str, Any] = {
            "schema": output.SCHEMA,
            "command": command,
            "title": f"{experiment.base_name.rsplit('/', 1)[-1]}, {experiment.config.model.precision}, "
            f"{report.machine(experiment.mesh)}",
            "config": to_mapping(experiment.config),
            "options": dataclasses.asdict(options),
            "how": "medians; what has room at once takes turns, a round after the other; seconds are wall time",
            "baselines": {baseline.name: baseline.note for baseline in ways},
            "tokens": {"read": bench.read, "made": options.reply, "turn": bench.turn},
            "processor": report.processor(),
        } | report.environment()
        if side is not None:
            results["peer"] = side.about
            results["baselines"][PEER] = "all text, of one session after the other"
        results["cells"] = [
            _cell(bench, ways, side, sessions, turns) for turns in options.turns for sessions in options.sessions
        ]
    output.write_json(options.workdir / "serving.json", results)
    (options.workdir / "serving.md").write_text(table(results), encoding="utf-8")
    figures.save(figure_of(results), options.workdir / "plot.png", dpi=150)
    print(table(results))
    return results


def _check(options: Options) -> None:
    require_least(options, "--", prompt=1, reply=1, least=1, peer_most_turns=1, threads=1)
    require_in_order(options, "sessions", "turns")
    if options.memory_gib <= 0:
        raise UserError(f"--memory_gib is {options.memory_gib}; it must be more than 0")
    paths.usable(options.workdir)


class Bench:
    """A turn as it is laid out, and the room that sessions need for so many.

    Attributes:
      read: tokens that are read for an answer, with those of the template.
      turn: tokens that become memory of a turn.
      chunks: in how many chunks.
    """

    def __init__(self, experiment: Experiment, options: Options):
        """Lays a turn out.

        Args:
          experiment: model, method and tokenizer.
          options: of the command.

        Raises:
          UserError: for a model of other data.
        """
        self.experiment, self.options = experiment, options
        self.text = " ".join(["the"] * options.prompt)
        engine = Conversations(experiment).engine
        question = engine.question(self.text, first=False)
        laid = engine.chunks(question, np.ones(options.reply, np.int32))
        self.read, self.turn, self.chunks = (
            len(question) + len(engine.template.answer), sum(map(len, laid)), len(laid)
        )  # fmt: skip

    def within(self, baseline: Baseline, turns: int) -> Experiment:
        """The experiment with a baseline's method and room for one turn more than so many."""
        slots, raw = baseline.room(turns * self.chunks, -(-self.turn // self.chunks))
        room = raw + self.turn - self.turn // self.chunks  # an open turn is there as a whole, in however many chunks
        cache = dataclasses.replace(
            self.experiment.config.cache, memory_capacity=slots, raw_capacity=room, overflow="evict"
        )
        config = dataclasses.replace(self.experiment.config, cache=cache)
        return dataclasses.replace(self.experiment, method=baseline.method, config=config)

    def bytes_of(self, baseline: Baseline, turns: int) -> int:
        """Bytes of a session's cache."""
        experiment = self.within(baseline, turns)
        sizes = dataclasses.asdict(experiment.config.cache)
        shapes = jax.eval_shape(lambda: init_cache(experiment.model, experiment.method, 1, **sizes))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


class Live:
    """Sessions of a baseline, set back to the same number of turns before each turn that is run."""

    def __init__(self, bench: Bench, baseline: Baseline, sessions: int, turns: int):
        """Makes them, and compiles what they need by a turn of one of them."""
        self.bench, self.baseline, self.turns = bench, baseline, turns
        self.talk = Conversations(bench.within(baseline, turns), sessions)
        self.talk.engine.stops = ()  # all answers are of one length
        self.run(1)

    def run(self, asking: int | None = None) -> dict[str, Any]:
        """A turn of all, or of so many: seconds of the clock and of the processor, and to the first token of each."""
        talk, bench, turns = self.talk, self.bench, self.turns
        count, size = talk.engine.rows, -(-bench.turn // bench.chunks)
        cache = fill(talk.state.cache, self.baseline.method, turns=turns * bench.chunks, turn=size)
        ends = tuple((n * bench.chunks, (n + 1) * bench.chunks) for n in range(turns))
        # Chunks, turns and tokens as that many turns would have left them.
        talk.state = State(cache, (ends,) * count, (turns * bench.turn,) * count, (NOTHING,) * count)
        jax.block_until_ready(cache)
        how = Answering(max_tokens=bench.options.reply)
        asked = {row: bench.text for row in range(count if asking is None else asking)}
        first: dict[int, float] = {}
        wall, cpu = time.perf_counter(), time.process_time()
        for replies in talk.replies(asked, dict.fromkeys(asked, how)):
            now = time.perf_counter() - wall
            for row, reply in replies.items():
                if reply.tokens:
                    first.setdefault(row, now)
        jax.block_until_ready(talk.state.cache)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        # Rates of turns are those of answers of one length.
        assert all(reply.tokens == bench.options.reply for reply in replies.values())
        return {"seconds": wall, "cpu_seconds": cpu, "first": list(first.values())}


def _peer(source: str, bench: Bench, options: Options) -> contextlib.AbstractContextManager[Side]:
    """llama.cpp in a process of its own."""
    path = locate(source)
    if path.suffix != ".gguf":
        raise UserError(f"the base {source} is no GGUF file, which llama.cpp needs; leave --peer out")
    settings = {
        "model": str(path), "turns": [turns for turns in options.turns if turns <= options.peer_most_turns],
        "turn": bench.turn, "prompt": bench.read, "reply": options.reply, "threads": options.threads,
    }  # fmt: skip
    return started([options.peer, "-P", peers.__file__, llama_cpp_peer.__file__], settings, REMEDY)


def _cell(bench: Bench, ways: list[Baseline], side: Side | None, sessions: int, turns: int) -> dict[str, Any]:
    """All that keep so many sessions behind so many turns; they take turns where there is room for all at once."""
    options, systems = bench.options, dict[str, Any]()
    budget, needed = options.memory_gib * 2**30, dict[str, float]()
    for baseline in ways:
        each = bench.bytes_of(baseline, turns)
        # What they have come to, and where turns are worked on.
        needed[baseline.name] = 2 * each * sessions
        systems[baseline.name] = {"bytes": each}
        if needed[baseline.name] > budget:
            systems[baseline.name]["needs_bytes"] = needed.pop(baseline.name)
    fitting = [baseline for baseline in ways if baseline.name in needed]
    # All at once where there is room, so that what disturbs one disturbs all.
    together = [fitting] if sum(needed.values()) <= budget else [[baseline] for baseline in fitting]
    samples = {baseline.name: [] for baseline in fitting}
    if side is not None and turns <= options.peer_most_turns:
        samples[PEER] = []
    for group in together:
        # The peer is measured once, beside the first group.
        _rounds(bench, group, side if PEER in samples and group is together[0] else None, sessions, turns, samples)
    for name, found in samples.items():
        errors = [sample["error"] for sample in found if "error" in sample]
        if errors:
            systems[name] = {"error": errors[0]}
        else:
            systems[name] = systems.get(name, {}) | _summary(found, 1 if name == PEER else sessions)
    if "rounds" in systems.get(PEER, {}):
        cell = systems[PEER] | {"bytes": samples[PEER][-1]["bytes"]}
        # A server would have to hold the states of all of them.
        held = cell["bytes"] * sessions
        systems[PEER] = {"bytes": cell["bytes"], "needs_bytes": held} if held > budget else cell
    told = ", ".join(f"{name} {cell['turns_per_second']:.2f}/s" for name, cell in systems.items() if "rounds" in cell)
    print(f"{sessions} sessions behind {turns:,} turns: {told}", flush=True)
    return {"sessions": sessions, "turns": turns, "systems": systems, "load_average": round(os.getloadavg()[0], 2)}


def _rounds(
    bench: Bench, group: list[Baseline], side: Side | None, sessions: int, turns: int, samples: dict[str, list]
) -> None:
    """Measures what has room at once, into ``samples``; the sessions are gone when it returns."""
    live = {baseline.name: Live(bench, baseline, sessions, turns) for baseline in group}
    steps: dict[str, Callable[[], dict[str, Any]]] = {name: each.run for name, each in live.items()}
    if side is not None:
        # A single session stays where it is. The first turn comes behind all that is read before it.
        steps[PEER] = lambda: _asked(side, f"{turns}{', carried' * (sessions > 1)}")
        steps[PEER]()
    for _ in range(math.ceil(bench.options.least / sessions)):
        for name, step in steps.items():
            samples[name].append(step())


def _asked(side: Side, step: str) -> dict[str, Any]:
    found = side.ask(step)
    time.sleep(0.05)  # threads that still wait for more work go to sleep
    return found if "error" in found else found | {"cpu_seconds": found["cpu"], "first": [found["first"]]}


def _summary(samples: list[dict[str, Any]], turns: int) -> dict[str, Any]:
    """Of rounds of so many turns each."""

    def median(key):
        return statistics.median(sample[key] for sample in samples)

    first = [seconds for sample in samples for seconds in sample["first"]]
    return {
        "turns_per_second": turns / median("seconds"),
        "cpu_seconds_per_turn": median("cpu_seconds") / turns,
        "first_token_seconds": statistics.median(first),
        "last_first_token_seconds": max(first),
        "rounds": len(samples),
        "all_seconds": [round(sample["seconds"], 4) for sample in samples],
    }


def table(results: Mapping[str, Any]) -> str:
    """The measurements in Markdown."""
    rows, number = [], report.number
    for cell in results["cells"]:
        full = cell["systems"]["full"].get("turns_per_second")
        for name, found in cell["systems"].items():
            row = [f"{cell['turns']:,}", str(cell["sessions"]), name]
            size = number(found["bytes"] / 2**20) if "bytes" in found else "-"
            if "rounds" not in found:
                why = found.get("error") or f"needs {number(found['needs_bytes'] / 2**30)} GiB"
                rows.append([*row, why, "-", "-", "-", size])
                continue
            rate = found["turns_per_second"]
            seconds = [number(found[key]) for key in ("first_token_seconds", "last_first_token_seconds")]
            rows.append([*row, number(rate), f"{rate / full:.2f}" if full else "-", *seconds, size])
    header = ["turns before", "sessions", "kept as", "turns/s", "to full", "first token, s", "the last, s", "MiB each"]
    options, tokens = results["options"], results["tokens"]
    lines = [output.table(header, rows, left=3), ""]
    lines += [f"- {name}: {note}" for name, note in results["baselines"].items()]
    lines += [
        f"- a turn: {tokens['read']} tokens are read, {tokens['made']} made, and {tokens['turn']} become memory; all "
        f"sessions ask at the same moment; {PEER}: a single session stays where it is, of several each is loaded "
        "before its turn and saved behind it, and its first token does not count the wait for those before it",
        f"- a cell may take {options['memory_gib']:g} GiB: what the sessions have come to, and as much again where "
        "turns are worked on",
        f"- {results['title']}, {results['processor']}; {results['how']}",
    ]
    return "\n".join([*lines, "", f"`{results['command']}`", ""])


def figure_of(results: Mapping[str, Any]) -> Any:
    """A figure of matplotlib with the rate of turns as conversations grow, for each number of sessions.

    Args:
      results: the content of ``serving.json``.
    """
    from matplotlib.figure import Figure

    counts = results["options"]["sessions"]
    figure = Figure(figsize=(3.2 * len(counts) + 0.9, 3.9), layout="constrained")
    colours = report.colours_of(results["baselines"])
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        cells = [cell for cell in results["cells"] if cell["sessions"] == count]
        for name in results["baselines"]:
            rates = [(cell["turns"], cell["systems"].get(name, {}).get("turns_per_second")) for cell in cells]
            measured = [(turns, rate) for turns, rate in rates if rate]
            axes.plot(
                [turns for turns, _ in measured],
                [rate for _, rate in measured],
                color=colours[name], marker="o", markersize=4, label=name,
            )  # fmt: skip
        axes.set_title(f"{count} session{'s' * (count != 1)}", fontsize=10, loc="left")
        axes.set_xlabel("turns before")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("turns a second, all sessions together")
    handles, labels = panels[0].get_legend_handles_labels()
    labels = [f"{name} ({results['baselines'][name]})" for name in labels]
    figure.suptitle(results["title"], fontsize=11, x=0.01, ha="left", wrap=True)
    figures.legend_below(figure, most=2, handles=handles, labels=labels, fontsize=9)
    return figure


if __name__ == "__main__":
    cli.run(main)
