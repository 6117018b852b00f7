"""The JSON file of a part, and how its rows come about: what goes wrong in one of them ends no other."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jax_ccm.benchmarks import report
from jax_ccm.records import output, paths

ROOT = Path(__file__).parents[2]
PACKAGES = ("flax", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")

# A row: what it is of, and what measures it.
Rows = Iterable[tuple[dict[str, Any], Callable[[], Mapping[str, Any]]]]


class Unavailable(Exception):
    """What this device, or its software, has not. The message says why."""


class DoesNotFit(Exception):
    """What needs more memory than there is, and was therefore not tried."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX says that memory was not enough."""
    text = str(error)
    return isinstance(error, DoesNotFit) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def folder_of(out: Path | None) -> Path:
    """Where results of the device at hand go: what was asked for, or ``results/PLATFORM/DEVICE``."""
    kind = re.sub(r"[^A-Za-z0-9.]+", "-", jax.devices()[0].device_kind).strip("-")
    return paths.usable(out or Path("results", jax.default_backend(), kind), "--out")


def fill(path: Path, part: str, size: str, rows: Rows, *, limit: float, command: str) -> dict[str, Any]:
    """Measures the rows of a part one after the other, and writes the file anew with each.

    Args:
      path: the file.
      part: its name.
      size: "tiny" or "full".
      rows: what is measured.
      limit: seconds after which no further row is begun.
      command: the command line, for the record.

    Returns:
      What was written. Its "status" is "finished", "failed" if a row failed or did not pass, or "out of time"; a file
      whose process was ended still says "running".
    """
    begin = time.perf_counter()
    found: dict[str, Any] = {
        "schema": output.SCHEMA, "part": part, "status": "running", "size": size, "command": command, **environment(),
        "rows": [],
    }  # fmt: skip
    output.write_json(path, found)
    for labels, measure in rows:
        if time.perf_counter() - begin > limit:
            row = labels | {"outcome": "out of time", "why": f"not begun within {limit:g} s"}
        else:
            row = labels | _measured(measure)
        found["rows"].append(row)
        found["seconds"] = round(time.perf_counter() - begin, 1)
        output.write_json(path, found)
        told = row["outcome"] + (f": {row['why']}" if "why" in row else "")
        print(f"{part}: {', '.join(f'{key} {value}' for key, value in labels.items())}: {told}", flush=True)
        gc.collect()  # arrays of the row before are freed
    outcomes = {row["outcome"] for row in found["rows"]}
    # A failure says more than a time limit.
    found["status"] = next((name for name in ("failed", "out of time") if name in outcomes), "finished")
    output.write_json(path, found)
    return found


def _measured(measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What was found, with "outcome", and "why" unless that is "measured"."""
    begin = time.perf_counter()
    try:
        row = {"outcome": "measured"} | dict(measure())
    except Unavailable as e:
        # A result: the other rows are measured all the same.
        row = {"outcome": "not there", "why": _line(e)}
    except Exception as e:
        if is_out_of_memory(e):
            row = {"outcome": "out of memory", "why": _line(e)}
        else:
            traceback.print_exc()
            row = {"outcome": "failed", "why": f"{type(e).__name__}: {_line(e)}"}
    return row | {"took": round(time.perf_counter() - begin, 2)}


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def environment() -> dict[str, Any]:
    """When, of which commit, and on what: device, driver, versions, and settings that change the numbers."""
    device, versions = jax.devices()[0], output.versions(("jax", "jaxlib"))
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    stats = device.memory_stats() or {}
    names = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Where the code was copied without its history, the environment says the commit.
        "commit": os.environ.get("COMMIT") or _said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "platform": jax.default_backend(),
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "bytes_limit": stats.get("bytes_limit"),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"),
        "processor": report.processor(),
        "cores": report.core_count(),
        "versions": versions,
        "settings": {name: os.environ[name] for name in names if name in os.environ},
    }


def _said(*command: str) -> str | None:
    """The first line that a program prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else None
