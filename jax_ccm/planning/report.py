"""A plan as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_ccm.errors import UserError
from jax_ccm.records import figures, output
from jax_ccm.records.parsing import parse_json

GIB = 2**30
KINDS = ("weights", "adapter", "optimizer", "cache", "batch", "temporaries", "other")


def markdown(plan: dict[str, Any]) -> str:
    """The plan's tables; nothing in them was run."""
    chip = plan["chip"]["hbm_bytes"] / GIB
    lines = [
        f"Compiled, not run: {plan['model']} for {plan['topology']} ({plan['devices']} chips of {chip:.0f} GiB).",
        "",
    ]
    if "training" in plan:
        header = ["compiled, not run", "rows x micro-batches", "HBM a chip", "fits", "roofline"]
        steps = [_step(name, entry) for name, entry in plan["training"].items() if entry]
        lines += [output.table(header, steps), ""]
    if "sessions" in plan:
        names = _systems([plan])
        header = ["compiled, not run: conversation", "raw tokens", *map(_label, names)]
        lines += [output.table(header, [_sessions(row, names) for row in plan["sessions"]]), ""]
        steps = [cells for row in plan["sessions"] for cells in _serving(row)]
        if steps:
            lines += [output.table(["compiled, not run", "sessions", "HBM a chip", "roofline"], steps), ""]
    return "\n".join(lines)


def _step(name: str, entry: dict[str, Any]) -> list[str]:
    fits = "yes" if entry["fits"] else "no"
    time = f"{entry['seconds']['roofline']:.2f} s" if entry["fits"] else ""
    size = f"{entry['hbm_bytes'] / GIB:.2f} GiB"
    return [name.replace("_", " "), f"{entry['rows']} x {entry['accumulation']}", size, fits, time]


def _systems(plans: Sequence[dict[str, Any]]) -> list[str]:
    """What sessions are kept as in any of the plans, full context first."""
    named = (name for plan in plans for row in plan.get("sessions", ()) for name in row["systems"])
    return list(dict.fromkeys(["full", *named]))


def _label(system: str) -> str:
    return "full context" if system == "full" else system


def _sessions(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    setting, full = row["setting"], row["systems"]["full"]["sessions"]
    cells = []
    for name in names:
        most = row["systems"][name]["sessions"] if name in row["systems"] else None
        # To full context, which may not fit even once.
        share = f" ({most / full:.1f} x)" if most is not None and full and name != "full" else ""
        cells.append("-" if most is None else f"{most:,}{share}")
    talk = f"{setting['chunks']:,} chunks of {setting['chunk_tokens']}"
    return [talk, str(setting["raw"]), *cells]


def _serving(row: dict[str, Any]) -> list[list[str]]:
    """A row for each step of each system with all the sessions that fit."""
    setting = row["setting"]
    talk = f"{setting['chunks']:,} chunks of {setting['chunk_tokens']}, {setting['raw']} raw"
    names = {"decode_step": "a token", "compress_step": "closing a chunk"}
    return [
        [f"{system}, {names[name]}, after {talk}", f"{found['sessions']:,}", f"{step['hbm_bytes'] / GIB:.2f} GiB",
         f"{1e3 * step['seconds']['roofline']:.1f} ms"]
        for system, found in row["systems"].items()
        for name, step in found["steps"].items()
    ]  # fmt: skip


def overview(plans: Sequence[dict[str, Any]]) -> str:
    """One table of many plans, those of a model and a topology together; nothing in it was run.

    What none of them has, training or sessions, has no columns.
    """
    names, rows = _systems(plans), []
    training = ["training step, HBM a chip", "roofline"] * any("training" in plan for plan in plans)
    serving = ["conversation", *map(_label, names)] * any("sessions" in plan for plan in plans)
    together: dict[str, list[dict[str, Any]]] = {}
    for plan in plans:
        together.setdefault(f"{plan['model'].rsplit('/', 1)[-1]}, {plan['topology']}", []).append(plan)
    for name, group in together.items():
        trained = [(plan, entry) for plan in group for entry in list(plan.get("training", {}).values())[-1:]]
        steps = [_trained(*pair) for pair in sorted(trained, key=lambda pair: pair[1]["tokens"])]
        talks = [_talk(row, names) for plan in group for row in plan.get("sessions", ())]
        for number in range(max(len(steps), len(talks))):
            step = steps[number] if number < len(steps) else [""] * len(training)
            talk = talks[number] if number < len(talks) else [""] * len(serving)
            rows.append([name if not number else "", *step, *talk])
    return output.table(["compiled, not run", *training, *serving], rows) + "\n"


def _trained(plan: dict[str, Any], step: dict[str, Any]) -> list[str]:
    size = (
        f"{step['rows']} rows x {step['accumulation']} of {step['tokens']:,} tokens: {step['hbm_bytes'] / GIB:.1f} of "
    )
    size += f"{plan['chip']['hbm_bytes'] / GIB:.0f} GiB"
    return [size, f"{step['seconds']['roofline']:.1f} s"] if step["fits"] else [f"{size}, too much", ""]


def _talk(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    talk, raw, *counts = _sessions(row, names)
    return [f"{talk}, {raw} raw", *counts]


def write_overview(folder: Path) -> Path:
    """Writes ``overview.md`` of all plans (``*.json``) of a folder, and returns its path.

    Raises:
      UserError: for a folder without plans, a file that is none, or one that cannot be read or written.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder} holds no plans (*.json); give a folder with the plan.json of each, under any name")
    plans = []
    for path in files:
        try:
            plans.append(parse_json(path.read_bytes(), str(path)))
            # By itself, so that the file that is no plan is named.
            overview(plans[-1:])
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e}") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{path} is not a plan that jax_ccm.plan wrote ({type(e).__name__}: {e}); keep only plans in the folder"
            ) from e
    try:
        (folder / "overview.md").write_text(overview(plans), encoding="utf-8")
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e}") from e
    return folder / "overview.md"


def plot(plan: dict[str, Any], path: Path) -> None:
    """Memory of each step by kind, and sessions side by side."""
    from matplotlib.figure import Figure

    steps = {f"training\n{name}": entry for name, entry in plan.get("training", {}).items() if entry}
    for row in plan.get("sessions", [])[:1]:
        for system, found in row["systems"].items():
            steps |= {f"{system}\n{name.removesuffix('_step')}": entry for name, entry in found["steps"].items()}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    below = [0.0] * len(steps)
    for kind in KINDS:
        sizes = [entry["hbm_bytes_by_kind"].get(kind, 0) / GIB for entry in steps.values()]
        left.bar(list(steps), sizes, bottom=below, label=kind)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    left.axhline(plan["chip"]["hbm_bytes"] / GIB, color="black", linewidth=1)
    left.set_ylabel("GiB a chip")
    left.tick_params(axis="x", labelsize=7)
    left.legend(fontsize=8)
    rows = plan.get("sessions", [])
    names = _systems([plan])
    width = 0.8 / len(names)
    for offset, system in enumerate(names):
        right.bar(
            [number + width * (offset - (len(names) - 1) / 2) for number in range(len(rows))],
            [row["systems"][system]["sessions"] for row in rows],
            width=0.95 * width,
            label=system,
        )

    def label(s):
        return f"{s['chunks']} x {s['chunk_tokens']}\n{s['raw']} raw"

    right.set_xticks(range(len(rows)), [label(row["setting"]) for row in rows])
    right.set_ylabel("live sessions that fit")
    if rows:
        right.set_yscale("log")
        right.legend(fontsize=8)
    figure.suptitle(f"{plan['model']} on {plan['topology']}: compiled, not run")
    figures.save(figure, path, dpi=120)


def say(line: str) -> None:
    print(line, flush=True)
