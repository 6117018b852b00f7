"""Results for people: a table and a plot, from the numbers that `results.json` holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.evals import heatmap, spoken
from jax_ccm.evals.cells import (
    CONTROL,
    DASHES,
    SHARES,
    STYLE,
    cell_share,
    control_of,
    discriminates,
    draw_intervals,
    estimate_of,
    interval,
    name_of,
    name_of_steps,
    unit_of,
    value,
)
from jax_ccm.records import figures, output

# Those that numbers depend on.
PACKAGES = ("jax_ccm", "jax", "jaxlib", "flax", "numpy", "transformers")


def table_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a row for each time step.

    Args:
      results: the content of ``results.json``.

    Returns:
      Column names, and as many texts for each row.
    """
    steps, kind = results["steps"], quality(results)
    names = [name for name in STYLE if name in steps[0]["systems"]]

    def cells(name):
        return [row["systems"][name] for row in steps]

    columns: dict[str, list[str]] = {
        name_of_steps(results)[0]: [f"{name_of(row)}{_mark(row, kind)}" for row in steps],
        "examples": [f"{row['examples']:,}" for row in steps],
        "tokens": [f"{row['tokens']:,}" for row in steps],
    }
    shown = {"perplexity": ("", _perplexity)}
    if kind != "perplexity":
        shown[kind] = (" right", lambda value: f"{value:.3f}")
    for key, (suffix, text) in shown.items():
        for name in names:

            def told(cell, key=key, text=text):
                return "-" if (found := value(cell, key)) is None else text(found)

            values = [told(cell) for cell in cells(name)]
            wrong = [f" ({told(cell['wrong'])})" if "wrong" in cell else "" for cell in cells(name)]
            columns[STYLE[name][1] + suffix] = [a + b for a, b in zip(values, wrong, strict=True)]
    for name, column in SHARES.items():
        if any(name in row for row in steps):
            columns[column] = [cell_share(row.get(name)) for row in steps]
    for name in cells("memory")[0].get("minus", {}) if "memory" in names else ():
        columns[f"- {STYLE[name][1]}"] = [interval(cell["minus"][name], digits=3) for cell in cells("memory")]
    if "memory" in names and "repetition" in cells("memory")[0]:
        said = [cell["repetition"] for cell in cells("memory")]
        columns["repeated"] = [f"{cell_share(cell['token'])}, {cell_share(cell['exact'])}" for cell in said]
    unit, name_of_unit = unit_of(max(cell["kv_bytes"] for name in names for cell in cells(name)))
    for name in names:
        if name not in ("none", "full_lora", "uncompressed"):
            sizes = [f"{cell['kv_bytes'] / unit:,.3g}" for cell in cells(name)]
            columns[f"{STYLE[name][1]} {name_of_unit}"] = sizes
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def print_table(results: Mapping[str, Any]) -> None:
    """Prints the tables, and what their columns mean."""
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width to respect, and a table that is cut off is of no use.
    console = Console(width=None if sys.stdout.isatty() else 200)
    what = name_of(results["steps"][0]) if _of_texts(results) else f"the target by {name_of_steps(results)[2]}"
    for title, (header, rows) in {
        f"Perplexity of {what}": table_rows(results),
        f"Generated replies by {name_of_steps(results)[2]}": spoken.reply_rows(results),
        "Continuations": spoken.continuation_rows(results),
    }.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, justify="right", no_wrap=False)
        # A line in front of the row of all time steps together.
        for row, below in zip(rows, [*rows[1:], None], strict=True):
            table.add_row(*row, end_section=below is not None and below[0][:3] == "all" != row[0][:3])
        console.print(table)
    for line in legend(results):
        print(line)


def legend(results: Mapping[str, Any]) -> list[str]:
    """What the columns of the table mean, a line each."""
    systems = results["systems"]
    lines = [f"{STYLE[name][1]}: {systems[name]}" for name in STYLE if name in systems]
    if any("wrong" in cell for row in results["steps"] for cell in row["systems"].values()):
        lines.append(f"in brackets: the same turn after {control_of(results)} (control)")
    if any("gap_closed" in row for row in results["steps"]):
        lines.append("gap closed: (none - memory) / (none - full), nats a token; ± bootstrap error over dialogues")
    if any("content_share" in row for row in results["steps"]):
        lines.append("content share: (wrong - right) of the memory / (wrong - right) of full context, nats a token")
    if "repetition" in results["steps"][0]["systems"].get("memory", {}):
        lines.append("repeated: tokens of closed chunks that memory still says right; and chunks right from end to end")
    kind = quality(results)
    if kind != "perplexity":
        what = "questions whose right choice is the most likely, by its mean over tokens"
        if kind == "token_accuracy":
            what = "target tokens that are the most likely"
        lines.append(f"right: share of {what}")
    lines += spoken.legend(results)
    if results["steps"][-1]["step"] == "all":
        lines.append(f"all: every {name_of_steps(results)[2]} together")
    held = (
        f"holds at the end of its {name_of_steps(results)[2]}"
        if _of_texts(results)
        else "carries from its context to the next turn"
    )
    if results["config"]["eval"].get("by") == "stream":
        held = "holds at most"
        lines.append("length: text tokens read; perplexity is that of all of them so far")
    if any("minus" in row["systems"].get("memory", {}) for row in results["steps"]):
        lines.append(
            "- …: nats a token that the memory loses more, on the same tokens; 95 % interval over blocks of text"
        )
    if any(_mark(row, kind) for row in results["steps"]):
        why = "full context does no better behind the right context than behind a wrong one"
        why += ", or than none where there is no control" * any("note" in row for row in results["steps"])
        lines.append(f"†: cannot tell memories apart: {why} (the 95 % interval of the difference reaches 0)")
    lines.append(f"KiB, MiB, bytes: keys and values that a session {held}")
    missing: dict[str, list[str]] = {}
    for row in results["steps"]:
        if "note" in row and row["step"] != "all":
            missing.setdefault(row["note"], []).append(str(row["step"]))
    for note, steps in missing.items():
        lines.append(f"no control at {name_of_steps(results)[0]} {', '.join(steps)}: {note}")
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    header, rows = table_rows(results)
    body = output.table(header, rows, left=0)
    for (header, rows), left in ((spoken.reply_rows(results), 2), (spoken.continuation_rows(results), 1)):
        if rows:
            body += "\n\n" + output.table(header, rows, left=left)
    return "\n".join([body, "", *(f"- {text}" for text in legend(results)), "", f"`{results['command']}`", ""])


def plot(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws quality and memory by time step as PNG."""
    figures.save(figure_of(results), path, dpi=150)


def figure_of(results: Mapping[str, Any]) -> Any:
    """A figure of matplotlib with quality and memory by time step, or of whole texts with one against the other.

    Args:
      results: the content of ``results.json``.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if _of_texts(results):
        compared = {name: results["steps"][0]["systems"][name] for name in STYLE if name in results["systems"]}
        points = [(_label(name, results), STYLE[name][0], [cell]) for name, cell in compared.items()]
        return tradeoff(points, title=results["title"], control=control_of(results))
    steps = [row for row in results["steps"] if row["step"] != "all"]
    names = [name for name in STYLE if name in steps[0]["systems"]]
    # Tasks have no order: they stand side by side, and no line joins them.
    ordered = not any(isinstance(row["step"], str) for row in steps)
    times = [row["step"] if ordered else place for place, row in enumerate(steps)]
    line = "-" if ordered else ""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_quality(left, steps, times, names, quality(results), line)
    _draw_memory(right, steps, times, names, line)
    for axes in (left, right):
        axes.set_xlabel(name_of_steps(results)[1])
        if results["config"]["eval"].get("by") == "stream":
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        labels = [f"{row['step']:,}" if ordered else row["step"] for row in steps]
        axes.set_xticks(times, labels, **({} if ordered else {"rotation": 30, "ha": "right", "fontsize": 8}))
        axes.margins(x=0.07)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    handles = [
        Line2D([], [], color=STYLE[name][0], label=_label(name, results), marker="o", markersize=4) for name in names
    ]
    if any("wrong" in row["systems"][name] for row in steps for name in names):
        dashed = f"the same turn after {control_of(results)}"
        handles.append(Line2D([], [], color="#555555", linestyle=DASHES, **CONTROL, label=dashed))
    if any(axes.collections for axes in figure.axes):
        handles.append(Line2D([], [], color="#555555", linewidth=1, alpha=0.45, label="95 % interval"))
    figure.suptitle(results["title"], fontsize=11, x=0.01, ha="left", wrap=True)
    figures.legend_below(figure, most=len(handles), handles=handles, fontsize=9)
    return figure


def tradeoff(points: Sequence[tuple[str, str, Sequence]], *, title: str, control: str) -> Any:
    """A figure of matplotlib with quality against the bytes of a session.

    Args:
      points: name, colour, and the cells ("perplexity", "kv_bytes", "wrong" if there is a control) of a system, in
        the order in which they are joined by a line.
      title: of the picture.
      control: what a wrong context is, of `control_of`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    unit, name_of_unit = unit_of(max(cell["kv_bytes"] for _, _, cells in points for cell in cells))
    controlled = False
    for name, colour, cells in points:
        sizes = [cell["kv_bytes"] / unit for cell in cells]
        heights = [cell["perplexity"]["value"] for cell in cells]
        axes.plot(sizes, heights, color=colour, marker="o", markersize=5, linewidth=1.5, label=name, zorder=3)
        for size, height, cell in zip(sizes, heights, cells, strict=True):
            if "wrong" in cell:
                controlled = True
                wrong = cell["wrong"]["perplexity"]["value"]
                axes.plot([size, size], [height, wrong], color=colour, linestyle=DASHES, linewidth=1, zorder=2)
                axes.plot([size], [wrong], color=colour, marker="o", markersize=5, fillstyle="none", zorder=2)
    _scale_heights(axes)
    axes.set_xlabel(f"keys and values of a session, {name_of_unit}")
    axes.set_ylabel("perplexity (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(0.08)
    note = f"open circles: after {control}" if controlled else None
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", wrap=True)
    figures.legend_below(figure, most=3, fontsize=8, title=note, title_fontsize=8)
    return figure


def _of_texts(results: Mapping[str, Any]) -> bool:
    return results["steps"][0]["step"] is None


def quality(results: Mapping[str, Any]) -> str:
    """What the plot shows: "accuracy" where there are choices, "token_accuracy" for recall, or "perplexity"."""
    systems = results["steps"][0]["systems"].values()
    if all("accuracy" in cell for cell in systems):
        return "accuracy"
    return "token_accuracy" if results["config"]["data"]["format"] == "recall" else "perplexity"


def _draw_quality(axes: Any, steps: Sequence, times: list, names: list[str], kind: str, line: str) -> None:
    def own(cell):
        return value(cell, kind)

    for number, name in enumerate(names):
        colour, _ = STYLE[name]
        cells = [row["systems"][name] for row in steps]
        heights = [own(cell) for cell in cells]
        side = number - (len(names) - 1) / 2
        # Where no line tells which point is whose, those of several systems stand side by side.
        places = times if line else [time + 0.12 * side for time in times]
        axes.plot(places, heights, color=colour, marker="o", markersize=4, linewidth=1.8, linestyle=line, zorder=3)
        found = [estimate_of(cell, kind) for cell in cells]
        draw_intervals(axes, places, found, colour, 3 * side if line else 0)
        wrong = [(place, own(cell["wrong"])) for place, cell in zip(places, cells, strict=True) if "wrong" in cell]
        if wrong:
            # Open circles, so that a single time step is seen, too.
            dashes = DASHES if line else ""
            axes.plot(*zip(*wrong, strict=True), color=colour, linestyle=dashes, **CONTROL, zorder=2)
    titles = {
        "perplexity": "Perplexity of the target (lower is better)",
        "accuracy": "Accuracy by likelihood of the choices (mean over tokens)",
        "token_accuracy": "Share of target tokens that are the most likely one",
    }
    axes.set_title(titles[kind], fontsize=10, loc="left")
    if kind == "perplexity":
        _scale_heights(axes)
    else:
        axes.set_ylim(-0.02, 1.04)


def _scale_heights(axes: Any) -> None:
    """Has the scale be logarithmic where heights are far apart; those that are undefined have none."""
    heights = [y for line in axes.lines for y in np.asarray(line.get_ydata(), float) if np.isfinite(y)]
    if heights and max(heights) > 8 * min(heights):
        axes.set_yscale("log")


def _draw_memory(axes: Any, steps: Sequence, times: list, names: list[str], line: str) -> None:
    unit, name_of_unit = unit_of(max(row["systems"][name]["kv_bytes"] for row in steps for name in names))
    for name in names:
        colour, _ = STYLE[name]
        heights = [row["systems"][name]["kv_bytes"] / unit for row in steps]
        axes.plot(times, heights, color=colour, marker="o", markersize=4, linewidth=1.8, linestyle=line)
        # Two systems with full context hold the same.
        if name != "full_lora":
            axes.annotate(f"{heights[-1]:,.3g}", (times[-1], heights[-1]), xytext=(5, 3), textcoords="offset points",
                          color=colour, fontsize=8)  # fmt: skip
    axes.set_title(f"Keys and values kept for a session, {name_of_unit}", fontsize=10, loc="left")
    axes.set_ylim(bottom=0)


def _label(name: str, results: Mapping[str, Any]) -> str:
    """The name of a system in the picture."""
    known = {"none": "no context", "full": "full context", "full_lora": "full context, LoRA"}
    known |= {"uncompressed": "full context, adapter on all text", "window": "window", "streaming_llm": "StreamingLLM"}
    return known.get(name) or results["memory"]


def _mark(row: Mapping[str, Any], kind: str) -> str:
    """A dagger for a row that cannot tell memories apart."""
    found = discriminates(row, kind)
    if found is None:
        found = discriminates(row, "perplexity")
    return " †" if found is False else ""


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def about(
    config: Mapping[str, Any],
    command: str,
    *,
    base: Mapping[str, Any],
    memory: str,
    split: str,
    adapter: Mapping[str, Any] | None,
    full_adapter: str | Path | None,
    systems: Mapping[str, str],
) -> dict[str, Any]:
    """What is known besides the numbers."""
    return {
        "schema": output.SCHEMA,
        "command": command,
        "title": f"{base['name'].rsplit('/', 1)[-1]}: {memory}",
        "config": config,
        **output.environment(PACKAGES),
        "base": {"name": base["name"], "fingerprint": base["fingerprint"], "precision": config["model"]["precision"]},
        "adapter": adapter,
        "full_adapter": str(full_adapter) if full_adapter else None,
        "data": {"split": split, "sources": list(config["data"][split])},
        "systems": dict(systems),
        "memory": memory,
        "units": {
            "nll": "nats a token",
            "kv_bytes": "bytes of a session between context and tail, mean",
            "ci95": "bootstrap over dialogues",
            "error": "bootstrap standard error",
        },
    }


def write(workdir: Path, results: dict[str, Any], said: Iterable[Any] | None = None) -> None:
    """Writes and prints what was found.

    Args:
      workdir: the folder.
      results: the content of ``results.json``.
      said: lines of ``replies.jsonl``, or of ``continuations.jsonl``; None if none were asked for.
    """
    lines = []
    for row in results["steps"]:
        for name, cell in row["systems"].items():
            line = {"step": row["step"], "system": name, "nll": cell["nll"]["value"], "kv_bytes": cell["kv_bytes"]}
            line["perplexity"] = cell["perplexity"]["value"]
            if "wrong" in cell:
                line["wrong_nll"] = cell["wrong"]["nll"]["value"]
            lines.append(line)
    output.write_lines(workdir / "metrics.jsonl", lines)
    # Of an earlier evaluation in the same folder: it would be taken for this one's.
    files = {False: workdir / "replies.jsonl", True: workdir / "continuations.jsonl"}
    for file in files.values():
        file.unlink(missing_ok=True)
    if said is not None:
        output.write_lines(files["reference" in results], said)
    output.write_json(workdir / "results.json", results)
    (workdir / "table.md").write_text(markdown(results), encoding="utf-8")
    plot(results, workdir / "plot.png")
    (workdir / "recall.png").unlink(missing_ok=True)
    if heatmap.kind_of(results.get("recall", ())):
        heatmap.plot(results["recall"], workdir / "recall.png")
    last = results["steps"][-1]
    summary = {
        "status": "finished",
        "command": results["command"],
        "step": last["step"],
        "perplexity": {name: cell["perplexity"]["value"] for name, cell in last["systems"].items()},
        "shares": {name: last[name]["value"] for name in SHARES if name in last},
        "seconds": results["seconds"],
    }
    output.write_json(workdir / "summary.json", summary)
    print_table(results)
    print(f"results in {workdir / 'results.json'}, table in table.md, picture in plot.png; {results['seconds']:.0f} s")


def say(line: str) -> None:
    print(line, flush=True)
