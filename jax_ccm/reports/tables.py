"""The tables of a report: each number with its interval, each system with its control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_ccm.evals import report, spoken
from jax_ccm.evals.cells import SHARES, STYLE, cell_share, discriminates, interval, name_of, name_of_steps, unit_of
from jax_ccm.reports.folders import Found

# Header, rows, and which columns are text.
Table = tuple[list[str], list[list[str]], int]
# What rows may have besides perplexity.
MEASURES = {"token_accuracy": "tokens right", "accuracy": "accuracy"}


OVERVIEW = ["name", "what", "of", "size"]


def overview(one: Found) -> list[str]:
    """What there is in a file, under `OVERVIEW`."""
    content = one.content
    if one.kind == "evaluation":
        row = content["steps"][-1]
        about = str(content["memory"]), f"{row['examples']:,} questions, {row['tokens']:,} tokens"
    elif one.kind == "comparison":
        about = ", ".join(content["systems"]), f"{content['steps'][-1]['examples']:,} questions"
    elif one.kind == "training":
        status = content["summary"].get("status", "no summary.json: still going on, or killed")
        about = str(status), f"{content['lines'][-1]['step']:,} steps"
    else:
        about = str(content["title"]), f"{len(content['turns'])} lengths"
    return [one.name, one.kind, *about]


def quality(results: Mapping[str, Any]) -> Table:
    """A row for each step and system: likelihoods with 95 % intervals, behind the right context and a wrong one."""
    steps, kind = results["steps"], report.quality(results)
    every = [cell for row in steps for cell in row["systems"].values()]
    more = [kind] if kind in MEASURES else []
    paired = any("minus_wrong" in cell.get("differences", {}).get(kind, {}) for cell in every)
    unit, name_of_unit = unit_of(max(cell["kv_bytes"] for cell in every))
    header = [name_of_steps(results)[0], "system", "n", "perplexity", "wrong context"]
    header += [title for kind in more for title in (MEASURES[kind], "wrong context")] + ["right - wrong"] * paired
    shares = [key for key in SHARES if any(key in row for row in steps)]
    header += [SHARES[key] for key in shares] + [name_of_unit]
    rows = []
    for row, name, cell in _cells(results):
        made = [f"{name_of(row)}{mark(row, kind)}", STYLE[name][1], f"{row['examples']:,}"]
        for key in ("perplexity", *more):
            made += [_shown(_estimate(cell, key)), _shown(_estimate(cell.get("wrong", {}), key))]
        made += [interval(cell.get("differences", {}).get(kind, {}).get("minus_wrong"))] * paired
        # Shares are those of the memory alone.
        made += [cell_share(row.get(key)) if name == "memory" else "" for key in shares]
        rows.append([*made, f"{cell['kv_bytes'] / unit:,.3g}"])
    return header, rows, 2


def continuations(results: Mapping[str, Any]) -> Table:
    """What is measured of continued texts; no rows where none were."""
    return *spoken.continuation_rows(results), 1


def replies(results: Mapping[str, Any]) -> Table:
    """The same of generated replies; no rows where none were asked for."""
    header, rows = [name_of_steps(results)[0], "system", "n"], []
    header += [title for key in spoken.REPLIES.values() for title in (key, "wrong context")] + [
        "contains: right - wrong"
    ]
    for row, name, cell in _cells(results):
        if "replies" not in cell:
            continue
        made = [f"{row['step']}{mark(row, 'contains')}", STYLE[name][1], f"{row['examples']:,}"]
        for key in spoken.REPLIES:
            made += [_shown(_estimate(cell, key)), _shown(_estimate(cell.get("wrong", {}), key))]
        rows.append([*made, interval(cell.get("differences", {}).get("contains", {}).get("minus_wrong"))])
    return header, rows, 2


def _cells(results: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Row, system and cell, in the order in which they are shown."""
    for row in results["steps"]:
        for name in STYLE:
            if name in row["systems"]:
                yield row, name, row["systems"][name]


def training(runs: Sequence[Found]) -> Table:
    """How each run ended."""
    rows = []
    for run in runs:
        lines, summary = run.content["lines"], run.content["summary"]
        checked = [(line["validation_loss"], line["step"]) for line in lines if line.get("validation_loss") is not None]
        losses = [line["loss"] for line in lines if line.get("loss") is not None]
        # A run that was killed, or goes on, has no summary: its last line says how far it came.
        last = next((line for line in lines[::-1] if "tokens" in line), {})
        best, step = min(checked, default=(None, None))

        def number(value, how):
            return "-" if value is None else format(value, how)

        rows.append(
            [
                run.name,
                str(summary.get("status", "-")),
                f"{lines[-1]['step']:,}",
                number(losses[-1] if losses else None, ".3f"),
                number(checked[-1][0] if checked else None, ".3f"),
                number(best, ".3f") + (f" at {step:,}" if step is not None else ""),
                number(summary.get("tokens", last.get("tokens")), ",d"),
                number(summary.get("scored_tokens", last.get("scored_tokens")), ",d"),
            ]
        )
    return ["run", "status", "steps", "loss", "validation", "best validation", "tokens", "scored"], rows, 2


def comparison(content: Mapping[str, Any]) -> Table:
    """A row for each system and size, at the last step."""
    rows = []
    for name, several in content["systems"].items():
        for run in several:
            cell = run["steps"][-1]
            wrong = cell.get("wrong", {}).get("perplexity")
            made = [name, f"{cell['kv_slots']:.1f}", f"{cell['kv_bytes'] / 1024:,.0f}"]
            made += [_shown(cell["perplexity"]), _shown(wrong)]
            rows.append([*made, *(cell_share(cell.get(key)) for key in ("gap_closed", "content_share"))])
    return ["system", "slots", "KiB", "perplexity", "wrong context", "gap closed", "content share"], rows, 1


def mark(row: Mapping[str, Any], kind: str) -> str:
    """A dagger for a row that cannot tell memories apart."""
    found = discriminates(row, kind)
    return " †" if (discriminates(row, "perplexity") if found is None else found) is False else ""


def _estimate(cell: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    if kind == "accuracy":
        return cell.get("accuracy", {}).get("mean")
    return (cell.get("replies", {}) if kind in spoken.REPLIES else cell).get(kind)


def _shown(estimate: Mapping[str, Any] | None) -> str:
    """A number with its interval."""
    if estimate is None or estimate["value"] is None:
        return "-"
    low, high = estimate.get("ci95") or (None, None)

    def write(value):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"

    return write(estimate["value"]) + ("" if low is None else f" [{write(low)}, {write(high)}]")
