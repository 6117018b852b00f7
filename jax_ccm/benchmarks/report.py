"""Speed and memory for people: tables and a plot, from the numbers that ``bench.json`` holds."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_ccm.distributed import sharding
from jax_ccm.numerics.precision import processor_flags
from jax_ccm.records import figures, output

COLOURS = {
    "full": "#2f6db3",
    "window": "#8c8c8c",
    "concat": "#e08e45",
    "concat, evicting": "#d1495b",
    "merge": "#2a9d6f",
    "llama.cpp": "#7b5ea7",
}
# Of methods that have no colour of their own, in order.
OTHERS = ("#d1495b", "#7b5ea7", "#5a9bd4")
STEPS = {
    "prefill": "read {tokens} tokens",
    "compress_step": "compress_step: {tokens} tokens onto {memory_slots} slots",
    "decode": "{tokens} tokens one by one on {memory_slots} slots",
    "train": "training step: {rows} rows, {tokens} tokens, {scored} scored",
}


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of some baselines, always the same for those that have one."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | dict(zip(others, OTHERS, strict=False))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def turns_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each baseline after each number of turns."""
    header = ["turns before", "kept as", "first token, ms", "each further, ms", "x reading", "close, ms", "turn, ms"]
    header += ["to full", "MiB"]
    rows, decode, rate = [], results["steps"]["decode"], results["machine"]["read_bytes_per_second"]
    # Seconds of reading the weights once, got back from how many times that a token took.
    weights = decode["seconds"] / decode["tokens"] / decode["times_reading_weights"]
    for row in results["turns"]:
        for name, cell in row["systems"].items():
            seconds = [*(cell[part]["seconds"] for part in ("first token", "token", "close")), cell["turn"]]
            times = [number(1e3 * x) for x in seconds]
            times.insert(2, f"{seconds[1] / (weights + cell['state_bytes'] / rate):.1f}")
            sizes = [f"{cell['to_full']:.2f}", number(cell["state_bytes"] / 2**20)]
            rows.append([f"{row['turns']:,}", name, *times, *sizes])
    return header, rows


def steps_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each single step."""
    reference = results.get("reference", {}).get("seconds", {})
    header = ["step", "seconds", "tokens/s", "of the matrix rate"] + ["reference, s"] * bool(reference)
    rows = []
    for name, cell in results["steps"].items():
        values = [number(cell["seconds"]), number(cell["tokens_per_second"]), f"{cell['of_matrix_rate']:.0%}"]
        if "times_reading_weights" in cell:
            values[2] = f"{cell['times_reading_weights']:.2f} x reading the weights"
        if reference:
            values.append(" to ".join(f"{x:g}" for x in reference[name]) if name in reference else "-")
        rows.append([STEPS[name].format(**cell), *values])
    return header, rows


def sessions_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how many sessions fit, for each baseline."""
    found = results["sessions"]
    rows = [
        [name, f"{cell['sessions']:,}", number(cell["bytes_per_session"] / 2**20)]
        for name, cell in found["systems"].items()
    ]
    return ["kept as", f"sessions in {found['budget_bytes'] / 2**30:g} GiB", "MiB for one more"], rows


TABLES = {"turns": turns_table, "steps": steps_table, "sessions": sessions_table}
CLOCKS = {"wall": "", "cpu": "; seconds are processor time of all threads, since the machine was busy with other work"}
TITLES = {
    "turns": "One turn of a conversation, by the turns before it",
    "steps": "Single steps",
    "sessions": "Sessions that fit, as compiled",
}


def _notes(results: Mapping[str, Any]) -> Mapping[str, str]:
    """What each baseline keeps, by its name; files of an earlier version call them rivals."""
    return results["baselines"] if "baselines" in results else results["rivals"]


def legend(results: Mapping[str, Any]) -> list[str]:
    """What was run and what the columns mean, a line each."""
    machine, options = results["machine"], results["options"]
    lines = [f"{name}: {note}" for name, note in _notes(results).items()]
    lines += [
        f"a turn: a question of {options['prompt']} tokens, an answer of {options['reply']}, and closing it; MiB: the "
        "whole state of a session; x reading: a further token, in times of reading the weights and that state once",
        f"machine: {results['title']}; a matrix product reaches {machine['flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"reading {machine['read_bytes_per_second'] / 1e9:,.1f} GB/s; load average {results['load_average']} at the "
        "beginning",
        results["how"] + CLOCKS[options["clock"]],
    ]
    if "reference" in results:
        lines.append(f"reference: {results['reference']['source']}")
    return lines


def shown(results: Mapping[str, Any]) -> list[str]:
    """Names of the tables that there are numbers for."""
    return [name for name in TABLES if name != "sessions" or name in results]


def named(header: Sequence[str]) -> int:
    """Which column says what a row is of."""
    return next(number for number, title in enumerate(header) if title in ("kept as", "step"))


def markdown(results: Mapping[str, Any], name: str) -> str:
    """A table in Markdown; nothing but the legend where its numbers were not asked for."""
    lines = []
    if name in shown(results):
        header, rows = TABLES[name](results)
        lines = [output.table(header, rows, left=1 + named(header)), ""]
    return "\n".join([*lines, *(f"- {text}" for text in legend(results)), "", f"`{results['command']}`", ""])


def print_tables(results: Mapping[str, Any]) -> None:
    """Prints all tables, and what their columns mean."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    for name in shown(results):
        header, rows = TABLES[name](results)
        table = Table(title=TITLES[name], title_justify="left")
        for number, column in enumerate(header):
            table.add_column(column, justify="left" if number == named(header) else "right")
        for row, after in zip(rows, [*rows[1:], None], strict=True):
            table.add_row(*row, end_section=name == "turns" and after is not None and after[0] != row[0])
        console.print(table)
    for text in legend(results):
        print(text)


def plot(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws time and memory of a turn as PNG."""
    figures.save(figure_of(results), path, dpi=150)


def figure_of(results: Mapping[str, Any]) -> Any:
    """A figure of matplotlib with time and memory of a turn as the conversation grows.

    Args:
      results: the content of ``bench.json``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    times = [row["turns"] for row in results["turns"]]
    colours = colours_of(_notes(results))
    for axes, title, value in (
        (left, "Seconds for a turn", lambda cell: cell["turn"]),
        (right, "State of a session, MiB", lambda cell: cell["state_bytes"] / 2**20),
    ):
        for name in _notes(results):
            heights = [value(row["systems"][name]) for row in results["turns"]]
            axes.plot(times, heights, color=colours[name], marker="o", markersize=4, linewidth=1.8, label=name)
            axes.annotate(f"{heights[-1]:,.3g}", (times[-1], heights[-1]), xytext=(5, 3), textcoords="offset points",
                          color=colours[name], fontsize=8)  # fmt: skip
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("turns before")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    labels = [f"{name} ({_notes(results)[name]})" for name in labels]
    figure.suptitle(results["title"], fontsize=11, x=0.01, ha="left", wrap=True)
    figures.legend_below(figure, most=3, handles=handles, labels=labels, fontsize=9)
    return figure


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, where Linux says it, and what it is able to do with bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    able = sorted(processor_flags() & {"avx512f", "avx512_bf16", "amx_bf16", "bf16"})
    return ", ".join([name or platform.processor() or platform.machine(), *able])


def environment() -> dict[str, Any]:
    """Versions, device, and what else runs on the machine."""
    return output.environment(("jax", "jaxlib")) | {
        "cores": core_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine(mesh: jax.sharding.Mesh) -> str:
    cores = f", {core_count()} CPU cores" if jax.default_backend() == "cpu" else ""
    one = jax.default_backend() == "cpu" and mesh.size == 1
    return cores.removeprefix(", ") if one else sharding.describe(mesh) + cores


def write(workdir: Path, results: dict[str, Any]) -> None:

    output.write_json(workdir / "bench.json", results)
    for name in TABLES:
        (workdir / f"{name}.md").write_text(markdown(results, name), encoding="utf-8")
    plot(results, workdir / "plot.png")
    last = results["turns"][-1]
    summary = {
        "status": "finished", "command": results["command"], "turns": last["turns"],
        "seconds_of_a_turn": {name: cell["turn"] for name, cell in last["systems"].items()},
        "tokens_per_second": {name: cell["tokens_per_second"] for name, cell in results["steps"].items()},
        "seconds": results["seconds"],
    }  # fmt: skip
    output.write_json(workdir / "summary.json", summary)
