"""Several evaluations of the same questions side by side: quality against the bytes of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.evals import spoken, stored
from jax_ccm.evals.cells import SHARES, STYLE, WRONG_CONTEXTS, cell_share, control_of
from jax_ccm.evals.report import tradeoff
from jax_ccm.records import figures, output, paths

# What all share, taken from the first evaluation; and their names.
SHARED = {"none": "no context", "full": "full context", "full_lora": "full context, LoRA"}
COLOURS = ("#d1495b", "#8457a8", "#e08e2b", "#00798c", "#5f7a1f", "#b0588d", "#6b4f3a", "#222222")


def load(path: str | Path) -> dict[str, Any]:
    """The content of ``results.json`` in a folder that `evaluate` wrote.

    Raises:
      UserError: for a folder without one, or a damaged file.
    """
    file = paths.of(path) / "results.json"
    try:
        results = stored.read(file)
        results["steps"][0]["systems"]["memory"]
    except UserError as e:
        raise UserError(f"{file} cannot be read ({e}); give folders that jax_ccm.evaluate wrote") from e
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{file} holds no results of a memory; give folders that jax_ccm.evaluate wrote") from None
    return results


def side_by_side(named: Mapping[str, Sequence[dict[str, Any]]], command: str = "") -> dict[str, Any]:
    """Joins evaluations of the same questions.

    Args:
      named: for each system its evaluations, one for each size that it was evaluated at.
      command: the command line, for the record.

    Returns:
      What goes into ``comparison.json``: ``{"schema", "command", "base", "data", "steps", "systems": {name:
      [{"command", "memory", "steps": [cell, ...]}, ...]}}``; a cell is that of ``results.json``, with its shares.

    Raises:
      UserError: if they are not of the same base model, data and questions.
    """
    runs = [(name, run) for name, several in named.items() for run in several]
    first_name, first = runs[0]
    for name, run in runs[1:]:
        for what, key in {
            "base model": lambda r: r["base"],
            "data": lambda r: (r["data"]["split"], r["data"]["sources"]),
            # Numbers of examples and tokens by step: other questions, or other ways to cut them, hardly give the same
            # ones.
            "questions": lambda r: [(row["step"], row["examples"], row["tokens"]) for row in r["steps"]],
            "control": control_of,
            "continuations": _continued,
        }.items():
            if key(run) != key(first):
                raise UserError(
                    f"{name} and {first_name} were evaluated on different {what}: {key(run)} and {key(first)}; "
                    "evaluate both with the same data and eval options"
                )
    shared = {}
    for key, title in SHARED.items():
        # Baselines depend on base, data and questions, which are the same: one measurement serves all.
        if found := next((run for _, run in runs if key in run["steps"][0]["systems"]), None):
            shared[title] = [_cells(found, key)]
    systems = shared | {name: [_cells(run, "memory") for run in several] for name, several in named.items()}
    return {
        "schema": output.SCHEMA,
        "command": command,
        "base": first["base"],
        "data": {"split": first["data"]["split"], "sources": first["data"]["sources"]},
        "kv_bytes_per_slot": first["kv_bytes_per_slot"],
        "steps": [{key: row[key] for key in ("step", "examples", "tokens")} for row in first["steps"]],
        "control": control_of(first),
        "systems": systems,
    } | ({"reference": first["reference"], "continued": _continued(first)} if "reference" in first else {})


# What continuations depend on beside what goes on; the judge is that of what really comes.
CONTINUED = ("reply_tokens", "samples", "top_p", "seed", "embedder")


def _continued(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """How continuations were drawn and judged; None where there are none."""
    if "reference" not in results:
        return None
    asked = results["config"]["eval"]
    return {key: asked.get(key) for key in CONTINUED} | {"judge": results["reference"]["judge"]}


def _cells(results: Mapping[str, Any], system: str) -> dict[str, Any]:
    cells = []
    for row in results["steps"]:
        cell = dict(row["systems"][system])
        if system == "memory":
            cell |= {name: row[name] for name in SHARES if name in row}
            if "uncompressed" in row["systems"]:
                # The adapter on all text with nothing compressed, under its own name: it differs from adapter to
                # adapter.
                cell["off"] = row["systems"]["uncompressed"]["perplexity"]
        cells.append(cell)
    memory = results["memory"] if system == "memory" else results["systems"][system]
    return {"command": results["command"], "memory": memory, "steps": cells}


def markdown(comparison: Mapping[str, Any]) -> str:
    """A row for each system and size: bytes, perplexity by step, and the shares of the last."""
    steps = [row["step"] for row in comparison["steps"]]
    whole = steps == [None]
    every = [(name, run["steps"]) for name, several in comparison["systems"].items() for run in several]
    shares = [name for name in ("gap_closed", "content_share") if any(name in cells[-1] for _, cells in every)]
    repeats = any("repetition" in cells[-1] for _, cells in every)
    off = any("off" in cells[-1] for _, cells in every)
    full = next((cells[-1]["kv_slots"] for name, cells in every if name == SHARED["full"]), None)
    header = ["system", "slots", "KiB"] + (["of full"] if full else [])
    header += ["perplexity"] if whole else [f"t={s}" if isinstance(s, int) else s for s in steps]
    header += (["compression off"] if off else []) + [SHARES[name] for name in shares]
    header += ["tokens repeated", "chunks repeated"] if repeats else []
    body = []
    for name, cells in every:
        size = cells[-1]
        row = [name, f"{size['kv_slots']:.1f}", f"{size['kv_bytes'] / 1024:,.0f}"]
        row += [f"{size['kv_slots'] / full:.2f}"] if full else []
        for cell in cells:
            wrong = f" ({cell['wrong']['perplexity']['value']:.2f})" if "wrong" in cell else ""
            row.append(f"{cell['perplexity']['value']:.2f}{wrong}")
        row += ([f"{size['off']['value']:.2f}"] if "off" in size else ["-"]) if off else []
        row += [cell_share(size.get(key)) for key in shares]
        if repeats:
            said = size.get("repetition", {})
            row += [cell_share(said.get("token")), cell_share(said.get("exact"))]
        body.append(row)
    of, end = ("whole texts", "its end") if whole else ("the target", steps[-1])
    notes = [f"perplexity of {of}; slots and KiB of a session, mean at {end}"]
    if off:
        notes.append("compression off: full context, the adapter on all text")
    if repeats:
        notes.append("repeated: what memory still says right of closed chunks, tokens and whole chunks")
    if any("wrong" in cells[-1] for _, cells in every):
        notes.append(f"in brackets: the same turn after {_control(comparison)} (control)")
    tables = [output.table(header, body, left=1)]
    said = [(name, cells[-1]["continuations"]) for name, cells in every if "continuations" in cells[-1]]
    if said:
        tables += ["", output.table(*spoken.continued_by(said, comparison["reference"]), left=1)]
        notes += spoken.continuation_legend(comparison["continued"], comparison["reference"])
    return "\n".join([*tables, "", *(f"- {note}" for note in notes), "", f"`{comparison['command']}`", ""])


def _control(comparison: Mapping[str, Any]) -> str:
    # Older comparisons knew one kind.
    return comparison.get("control", WRONG_CONTEXTS["another"])


def plot(comparison: Mapping[str, Any], path: str | Path) -> None:
    """Draws `figure_of` as PNG."""
    figures.save(figure_of(comparison), path, dpi=150)


def figure_of(comparison: Mapping[str, Any]) -> Any:
    """A figure of matplotlib with perplexity against bytes at the last step.

    Args:
      comparison: of `side_by_side`.
    """
    last = comparison["steps"][-1]["step"]
    titles = {title: STYLE[key][0] for key, title in SHARED.items()}
    colours = iter(COLOURS * 9)
    points = [
        (name, titles.get(name) or next(colours), sorted((r["steps"][-1] for r in runs), key=lambda c: c["kv_bytes"]))
        for name, runs in comparison["systems"].items()
    ]
    where = {None: "whole texts", "all": "all time steps"}.get(last, f"t = {last}")
    title = f"Quality against the memory of a session, {where}"
    return tradeoff(points, title=title, control=_control(comparison))
