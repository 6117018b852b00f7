"""The cells of ``results.json``: what they hold, and how they are shown everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DASHES = (0, (4, 2))
# How matplotlib is to draw a control.
CONTROL: dict[str, Any] = {"linewidth": 1.2, "marker": "o", "markersize": 8, "fillstyle": "none"}
# Colours and short names of the systems, in the order in which they are shown.
STYLE = {
    "none": ("#8c8c8c", "none"),
    "full": ("#2f6db3", "full"),
    "full_lora": ("#2a9d6f", "full + LoRA"),
    "uncompressed": ("#8457a8", "uncompressed"),
    "window": ("#8c8c8c", "window"),
    "streaming_llm": ("#e08e2b", "StreamingLLM"),
    "memory": ("#d1495b", "memory"),
}
SHARES = {
    "gap_closed": "gap closed",
    "content_share": "content share",
    "gap_closed_to_full_lora": "gap closed (LoRA)",
    "content_share_to_full_lora": "content share (LoRA)",
}
# What the rows are, by ``eval.by``.
ROWS = {
    "step": ("t", "time step: chunks of context before the question", "time step"),
    "age": ("age", "age of what is asked for: exchanges since it was told", "age"),
    "task": ("task", "task, each question behind its whole context", "task"),
    "text": ("of", "", "text"),
    "continuation": ("of", "", "prompt"),
    "stream": ("length", "text tokens read", "length"),
}


def name_of_steps(results: Mapping[str, Any]) -> tuple[str, str, str]:
    """What the rows of the table are: as a column, as an axis, and as a word."""
    return ROWS.get(results["config"]["eval"].get("by"), ROWS["step"])


def name_of(row: Mapping[str, Any]) -> str:
    """What a row of ``results.json`` is of, as its first cell says."""
    if row["step"] is not None:
        return str(row["step"])
    return "continued texts" if "continuations" in next(iter(row["systems"].values())) else "whole texts"


def estimate_of(cell: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """What a cell has of a kind: "perplexity", "token_accuracy", "accuracy", "exact", "f1" or "contains", or None."""
    if kind == "accuracy":
        return cell["accuracy"]["mean"] if "accuracy" in cell else None
    of = cell if kind in ("perplexity", "token_accuracy") else cell.get("replies", {})
    return of.get(kind)


def value(cell: Mapping[str, Any], kind: str) -> float | None:
    """The number of `estimate_of`."""
    found = estimate_of(cell, kind)
    return None if found is None else found["value"]


def draw_intervals(
    axes: Any, times: Sequence[Any], found: Sequence[Mapping[str, Any] | None], colour: str, aside: float = 0
) -> None:
    """Draws 95 % intervals as thin bars, where there are any: a single conversation has none.

    Args:
      axes: of matplotlib.
      times: where they stand.
      found: what `estimate_of` gave.
      colour: of the bars.
      aside: points to the right of where they stand, so that those of several systems are told apart.
    """
    from matplotlib.transforms import offset_copy

    moved = offset_copy(axes.transData, axes.figure, x=aside, units="points")
    for time, estimate in zip(times, found, strict=True):
        if estimate is not None and estimate["ci95"][0] is not None:
            axes.vlines(time, *estimate["ci95"], color=colour, linewidth=1.2, alpha=0.5, zorder=1, transform=moved)
            # What is moved aside does not count for the limits by itself.
            axes.update_datalim([(time, end) for end in estimate["ci95"]])
    axes.autoscale_view()


# What stands in brackets, behind "the same turn after".
WRONG_CONTEXTS = {
    "another": "the context of another conversation",
    "exchanged": "its own context with what is asked for told otherwise",
}


def control_of(results: Mapping[str, Any]) -> str:
    """What a wrong context is in an evaluation, in words; older ones knew one kind."""
    return WRONG_CONTEXTS[results["config"]["eval"].get("control", "another")]


def discriminates(row: Mapping[str, Any], kind: str) -> bool | None:
    """Whether a row can tell memories apart: whether full context does better behind the right context than not.

    Args:
      row: of a time step, an age, or an age and a length.
      kind: "perplexity", "token_accuracy", "accuracy", "exact", "f1" or "contains".

    Returns:
      Whether the 95 % interval of the paired difference to a wrong context (or to none, where there is no control) lies
      above 0; False for a single conversation, and None if the row does not say.
    """
    full = row["systems"].get("full")
    if full is None:
        return None
    if kind in ("perplexity", "token_accuracy"):
        found = full.get("wrong", {}).get("minus_right")
    else:
        differences = full.get("differences", {}).get(kind, {})
        found = differences.get("minus_wrong") or differences.get("minus_none")
    if found is None:
        return None
    # A bootstrap over one conversation has no spread: its interval says nothing.
    return row["dialogues"] > 1 and found["ci95"][0] is not None and found["ci95"][0] > 0


def cell_share(value: Mapping[str, Any] | None) -> str:
    """A share with its error, for a cell of a table."""
    if value is None:
        return "-"
    if value["value"] is None:
        return "no gap"
    error = "" if value["error"] is None else f" ± {value['error'] * 100:.0f}"
    return f"{value['value'] * 100:.0f}{error} %"


def interval(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A difference with its 95 % interval, for a cell of a table."""
    if value is None or value["value"] is None:
        return "-"
    low, high = value["ci95"]
    return f"{value['value']:+.{digits}f}" + ("" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def unit_of(largest: float) -> tuple[int, str]:
    """The unit of bytes in which the largest number reads well."""
    return (2**20, "MiB") if largest >= 2**21 else (2**10, "KiB") if largest >= 2**11 else (1, "bytes")
