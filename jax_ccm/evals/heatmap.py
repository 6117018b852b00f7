"""Grids of `jax_ccm.evals.recall`, and attention of `jax_ccm.evals.attended`, in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_ccm.evals.cells import STYLE, discriminates, value
from jax_ccm.records import figures

# What is drawn, the first that was measured: where a cell has it, and what it is called.
SHOWN = {
    "contains": "share of replies that contain the answer",
    "accuracy": "accuracy by likelihood of the choices (mean over tokens)",
}

# What the attention of a layer is paid to, in the order in which it is drawn.
PARTS = {"sink": "sink", "memory": "memory", "text": "question and other text"}


def kind_of(cells: Sequence[Mapping[str, Any]]) -> str | None:
    """The first kind of `SHOWN` that was measured in all of some cells; None for no cells."""
    if not cells:
        return None
    every = [system for cell in cells for system in cell["systems"].values()]
    return next((kind for kind in SHOWN if all(value(system, kind) is not None for system in every)), None)


def figure_of(cells: Sequence[Mapping[str, Any]]) -> Any:
    """A figure of matplotlib with a grid for each system, and for the memory behind a wrong context.

    Args:
      cells: of `recall.grid`.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    kind = kind_of(cells)
    assert kind is not None
    ages, lengths = sorted({cell["age"] for cell in cells}), sorted({tuple(cell["chunks"]) for cell in cells})
    names = [name for name in STYLE if name in cells[0]["systems"]]
    panels: list[tuple[str, Any]] = [(STYLE[name][1], lambda row, name=name: row["systems"][name]) for name in names]
    if "memory" in names and any("wrong" in cell["systems"]["memory"] for cell in cells):
        panels.append(("wrong memory (control)", lambda row: row["systems"]["memory"].get("wrong")))
    width = min(max(len(panels) * (0.55 * len(ages) + 0.7), 7), 16)
    figure = Figure(figsize=(width, min(max(0.45 * len(lengths) + 1.5, 2.6), 9)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    shades = ScalarMappable(Normalize(0, 1), "viridis")
    for place, (title, of) in zip(axes, panels, strict=True):
        # [lengths, ages]; NaN where no question is of that age and length.
        heights = np.full((len(lengths), len(ages)), np.nan)
        for cell in cells:
            system, at = of(cell), (lengths.index(tuple(cell["chunks"])), ages.index(cell["age"]))
            if system is None:
                continue
            heights[at] = value(system, kind)
            mark = "" if discriminates(cell, kind) is not False else "†"
            place.text(
                at[1], at[0], f"{heights[at]:.2f}{mark}\n", ha="center", va="center", fontsize=9,
                # Viridis is dark below, so that letters are white there.
                color="white" if heights[at] < 0.55 else "black",
            )  # fmt: skip
            place.text(
                at[1], at[0], f"\nn={cell['examples']}", ha="center", va="center", fontsize=6.5,
                color="white" if heights[at] < 0.55 else "black",
            )  # fmt: skip
        edges = np.arange(len(ages) + 1) - 0.5, np.arange(len(lengths) + 1) - 0.5
        place.pcolormesh(*edges, np.ma.masked_invalid(heights), norm=shades.norm, cmap=shades.cmap, edgecolors="white")
        place.set_title(title, fontsize=10)
        place.set_xticks(range(len(ages)), ages)
        place.set_yticks(range(len(lengths)), [f"{a}" if a == b else f"{a}-{b}" for a, b in lengths])
        place.spines[:].set_visible(False)
        place.tick_params(length=0)
    axes[0].set_ylabel("chunks of the conversation")
    figure.colorbar(shades, ax=list(axes), shrink=0.9, pad=0.01).outline.set_visible(False)
    # Once for all: under each, neighbours would run into each other.
    figure.supxlabel("age of what is asked for, exchanges since it was told", fontsize=10)
    figure.suptitle(SHOWN[kind][0].upper() + SHOWN[kind][1:], fontsize=10, x=0.01, ha="left")
    return figure


def plot(cells: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the grids as PNG."""
    figures.save(figure_of(cells), path, dpi=150)


def attention_of(found: Mapping[str, Any]) -> Any:
    """A figure of matplotlib: shares by layer, and the slots of memory in colour.

    Args:
      found: of `attended.shares`.
    """
    from matplotlib.figure import Figure

    slots = np.asarray(found["slots"], np.float64)
    layers = np.arange(len(slots))
    figure = Figure(figsize=(9, 0.1 * len(layers) + 2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    before = np.zeros(len(layers))
    for (name, label), colour in zip(PARTS.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        share = np.asarray(found[name], np.float64)
        left.barh(layers, share, left=before, color=colour, label=label, height=0.9)
        before += share
    left.set(xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5), xlabel="share of attention", ylabel="layer")
    if slots.shape[1]:
        # Oldest on the left, as a conversation is read.
        picture = right.imshow(slots[:, ::-1], aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        count = slots.shape[1]
        ticks = np.unique(np.linspace(0, count - 1, min(count, 9)).round().astype(int))
        right.set_xticks(ticks, [str(count - tick) for tick in ticks])
        figure.colorbar(picture, ax=right, label="share of attention")
    right.set(xlabel="slot of memory, counted from the newest", yticks=left.get_yticks()[:0])
    figures.legend_below(figure, most=3, loc="outside lower left", fontsize=8)
    return figure
