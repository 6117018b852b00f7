"""Tables of what the check of a device found, and when it last ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_ccm.benchmarks import report as speed
from jax_ccm.records import output
from jax_ccm.records.parsing import read_json

# How a part ended that did not finish.
ENDED = {"running": "its process was ended before it was done", "out of time": "its time was up before it was done"}
Table = tuple[Sequence[str], list[list[str]], int]
TITLES = {
    "numbers": "Attention against its definition in float64",
    "attention": "Times of attention",
    "training": "Training",
    "turns": "One turn of a conversation, by the turns before it",
    "throughput": "Samples/s at the largest batch that fits",
}
NOTES = {
    "numbers": "the largest gap of an array, in parts of its largest number (at least 1); inputs are those of the type",
    "attention": "one row, bfloat16; pallas and xla: CCM-concat, 8 slots for each 50 tokens; cudnn: causal, since it "
    "takes no rule; TFLOP/s count visible pairs",
    "training": "forward, backward and update of the adapter; FLOPs are what the method needs; MFU: of the maker's "
    "peak; of the matrix rate: of large products of that type, measured between the steps",
    "turns": "arbitrary weights; as in `python -m jax_ccm.bench`",
    "throughput": "a sample: one more demonstration is read and written into memory, and a question is read up to the "
    "first token of its answer; batches were found by doubling",
}


def numbers(found: Mapping[str, Any]) -> Table:
    """A row for each method and type."""
    header = ["method", "type", "kernel", "forward", "gradients", "allowed", ""]

    def cells(row):
        return [f"{row[key]:.1e}" for key in ("forward", "gradients", "allowed")]

    return header, [_row(row, ("method", "dtype", "kernel"), cells, 3) for row in found["rows"]], 3


def attention(found: Mapping[str, Any]) -> Table:
    """A row for each length, implementation and pass, by length."""
    header = ["T", "attention", "pass", "visible pairs", "ms", "TFLOP/s", "MiB of temporaries", ""]

    def cells(row):
        return [
            f"{row['pairs']:,}", speed.number(1e3 * row["seconds"]), speed.number(row["flops_per_second"] / 1e12),
            f"{row['temporaries'] / 2**20:,.1f}",
        ]  # fmt: skip

    order = sorted(found["rows"], key=lambda row: row["length"])
    return header, [_row(row, ("length", "implementation", "pass"), cells, 4) for row in order], 3


def training(found: Mapping[str, Any]) -> Table:
    """A row for each decoder and attention."""
    header = ["model", "attention", "rows x tokens", "seconds", "tokens/s", "MFU", "of the matrix rate", ""]

    def cells(row):
        return [
            f"{row['rows']} x {row['tokens'] // row['rows']:,}", speed.number(row["seconds"]),
            speed.number(row["tokens_per_second"]), "-" if row["mfu"] is None else f"{row['mfu']:.0%}",
            f"{row['of_matrix_rate']:.0%}",
        ]  # fmt: skip

    return header, [_row(row, ("model", "attention"), cells, 5) for row in found["rows"]], 2


def turns(found: Mapping[str, Any]) -> Table:
    """The table of `bench`, of the rows that were measured; the others behind it."""
    measured = [row for row in found["rows"] if row["outcome"] == "measured"]
    steps = next((row for row in measured if "steps" in row), None)
    after = sorted((row for row in measured if "systems" in row), key=lambda row: row["turns"])
    if steps is None or not after:
        return ["measured", ""], [[row["measured"], _said(row)] for row in found["rows"]], 2
    header, rows = speed.turns_table(steps | {"turns": after})
    others = [row for row in found["rows"] if row["outcome"] != "measured"]
    rows += [[row["measured"], _said(row), *[""] * (len(header) - 2)] for row in others]
    return header, rows, 2


def throughput(found: Mapping[str, Any]) -> Table:
    """A row for each system: its largest batch that fits, and what became of the others."""
    header = ["model", "memory", "slots", "batch", "samples/s", "questions alone/s", "GiB", ""]

    def cells(row):
        return [
            f"{row['slots']:,}", f"{row['batch']:,}", speed.number(row["samples_per_second"]),
            speed.number(row["questions_per_second"]), f"{row['bytes'] / 2**30:.1f}",
        ]  # fmt: skip

    rows = []
    for system in dict.fromkeys(row["system"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["system"] == system]
        best = max(own, key=lambda row: (_has_numbers(row), row["batch"]))
        others = [f"batch {row['batch']:,}: {_said(row)}" for row in own if not _has_numbers(row)]
        numbers = cells(best) if _has_numbers(best) else [""] * 5
        rows.append([best["model"], system, *numbers, "; ".join(others)])
    return header, rows, 2


TABLES = {
    "numbers": numbers, "attention": attention, "training": training, "turns": turns, "throughput": throughput,
}  # fmt: skip


def _row(row: Mapping[str, Any], labels: Sequence[str], cells: Any, count: int) -> list[str]:
    """Labels, cells where there are numbers, and what is to be said."""
    named = [f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in labels]
    return [*named, *(cells(row) if _has_numbers(row) else [""] * count), _said(row)]


def _has_numbers(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "measured" or "passed" in row


def _said(row: Mapping[str, Any]) -> str:
    """Nothing where a row was measured and passed."""
    if row["outcome"] == "measured":
        return ""
    return f"{row['outcome']}: {row['why']}".replace("|", "\\|")


def found_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What the parts wrote, by name, in their order."""
    return {part: read_json(folder / f"{part}.json") for part in TABLES if (folder / f"{part}.json").exists()}


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A page of all parts that there are."""
    lines: list[str] = []
    for part, record in found.items():
        header, rows, left = TABLES[part](record)
        lines += [
            f"## {TITLES[part]}",
            "",
            output.table(header, rows, left=left),
            "",
            f"- {NOTES[part]}",
            f"- {_of(record)}",
        ]
        if record["status"] != "finished":
            lines.append(f"- **{ENDED.get(record['status'], record['status'])}**")
        lines += ["", f"`{record['command']}`", ""]
    return "\n".join(lines)


def _of(record: Mapping[str, Any]) -> str:
    """On what, when, and of which commit."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    driver = f"; driver {record['driver']}" if record["driver"] else ""
    return (
        f"{record['device']}, {record['date']}, commit {record['commit']}, {record['size']} sizes; {versions}{driver}"
    )


def status(results: Path, platform: str) -> str:
    """When the check last ran on devices of a platform: "last run on DEVICE at DATE", or "never run".

    Args:
      results: the folder of results.
      platform: "gpu" or "tpu".
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (results / platform).glob("*/*.json")]
    if not records:
        return "never run"
    last = max(records, key=lambda record: record["date"])
    return f"last run on {last['device']} at {last['date'][:10]}"
