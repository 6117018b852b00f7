"""The pictures of a report: figures of matplotlib, as SVG that takes the colours of its page, and as PNG."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.evals import report
from jax_ccm.evals.cells import STYLE, control_of
from jax_ccm.evals.comparison import COLOURS, SHARED
from jax_ccm.records import figures
from jax_ccm.reports.folders import Found

# Stands for the colour of the page's text until it is known.
INK = "#010203"
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.titlecolor": INK, "grid.color": INK, "svg.fonttype": "none",
    "font.family": "sans-serif", "figure.facecolor": "white", "axes.facecolor": "none",
}  # fmt: skip


def drawn(make: Callable[[], Any], name: str, title: str, folder: Path) -> str:
    """A figure as inline SVG; as PNG it is written into a folder.

    Args:
      make: makes the figure.
      name: of the PNG, without its ending.
      title: what it shows, for those who cannot see it.
      folder: where the PNG goes.
    """
    import io

    import matplotlib

    # The salt of ids: the same figure gives the same file each time.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = make()
        figures.save(figure, folder / f"{name}.png", dpi=150)
        held = io.StringIO()
        # No dates in the file, for the same reason.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(held, format="svg", metadata=nothing, transparent=True)
    text = held.getvalue()
    # The page is light or dark as its reader likes it, and black lines would vanish on a dark one.
    text = text[text.index("<svg") :].replace(INK, "var(--ink)").replace("#222222", "var(--ink)")
    # As large as letters of the page's size allow, and smaller where the page is narrow.
    size = r'(<svg\b[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"'
    text = re.sub(size, lambda m: f'{m[1]} style="max-width: {float(m[2]) * 1.3:.0f}px"', text, count=1)
    # Several pictures stand on one page: what each refers to is its own.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def training(runs: Sequence[Found]) -> Any:
    """Losses of training, as thin lines, and of validation, as points, by step."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    handles = []
    for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):

        def points(key, run=run):
            return [
                (line["step"], line[key]) for line in run.content["lines"] if isinstance(line.get(key), (int, float))
            ]

        if losses := points("loss"):
            axes.plot(*zip(*losses, strict=True), color=colour, linewidth=1.1, alpha=0.55)
        if checked := points("validation_loss"):
            axes.plot(*zip(*checked, strict=True), color=colour, marker="o", markersize=4.5, linewidth=1.8)
        handles.append(Line2D([], [], color=colour, linewidth=1.8, label=run.name))
    handles += [
        Line2D([], [], color="#777777", linewidth=1.1, alpha=0.55, label="thin: training"),
        Line2D([], [], color="#777777", marker="o", markersize=4.5, label="with points: validation"),
    ]
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a scored token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)
    figures.legend_below(figure, most=4, handles=handles, fontsize=9)
    return figure


def against_bytes(runs: Sequence[Found]) -> Any:
    """Perplexity against the bytes of a conversation, of all systems of evaluations that asked the same."""
    shared: dict[str, tuple[str, str, list]] = {}
    own: list[tuple[str, str, list]] = []
    colours = itertools.cycle(COLOURS)
    for run in runs:
        systems = run.content["steps"][-1]["systems"]
        for key, cell in systems.items():
            if key == "memory":
                own.append((run.name, next(colours), [cell]))
            else:
                shared.setdefault(key, (SHARED.get(key, STYLE[key][1]), STYLE[key][0], [cell]))
    last = runs[0].content["steps"][-1]["step"]
    where = {None: "whole texts", "all": "all questions"}.get(last, f"step {last}")
    title = f"Quality against the memory of a conversation, {where}"
    return report.tradeoff([*shared.values(), *own], title=title, control=control_of(runs[0].content))


def alike(runs: Sequence[Found]) -> list[list[Found]]:
    """Evaluations by what they asked: those of one base, data, questions and control together."""
    groups: dict[str, list[Found]] = {}
    for run in runs:
        groups.setdefault(repr(_asked(run.content)), []).append(run)
    return list(groups.values())


def _asked(results: Mapping[str, Any]) -> Any:
    rows = [(row["step"], row["examples"], row["tokens"]) for row in results["steps"]]
    data, control = results["data"], control_of(results)
    return results["base"].get("fingerprint"), data["split"], data["sources"], rows, control
