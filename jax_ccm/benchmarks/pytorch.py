"""``python -m jax_ccm.benchmarks.pytorch CONFIG.yaml --workdir DIR [--peer PYTHON]``: training beside PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jax_ccm.benchmarks import peer as peers
from jax_ccm.benchmarks import pytorch_ours, pytorch_peer, report
from jax_ccm.benchmarks.sides import Side, started
from jax_ccm.config import cli
from jax_ccm.config.loading import base_source, build_method
from jax_ccm.config.schema import Config, to_mapping
from jax_ccm.errors import UserError, require_least
from jax_ccm.methods import build
from jax_ccm.records import output, paths
from jax_ccm.records.paths import Folder
from jax_ccm.rules.types import Method

COMMAND = "jax_ccm.benchmarks.pytorch"
REMEDY = "pip install 'jax_ccm[pytorch]', or give --peer a Python that has torch, transformers and peft"
Kind = Literal["full", "memory"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures forward and backward of training beside PyTorch, twice, on the base of the config.

    full: full context through the bare base, gradients reach the embeddings of all tokens. memory: the config's method
    with its adapter, beside PEFT's LoRA with the method's mask; gradients reach the adapter and the embeddings of
    compression tokens. The same weights, the same rows of random text, the same scored tokens, so the same loss, which
    is compared. PyTorch runs transformers with `sdpa`, eager and compiled. Both sides run in processes of their own,
    which take turns step by step. Writes pytorch.json and pytorch.md.
    """

    workdir: Folder
    """Where all output goes."""
    peer: str = sys.executable
    """The Python that has torch, transformers and peft, if not this one (pip install 'jax_ccm[pytorch]')."""
    comparisons: tuple[Kind, ...] = ("full", "memory")
    """What is compared."""
    precisions: tuple[str, ...] = ("float32", "mixed", "bfloat16")
    """Ours, as `model.precision` names them."""
    peer_precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """PyTorch's."""
    compiled: bool = True
    """Whether PyTorch also runs compiled, for which it needs a C++ compiler."""
    rows: int = 2
    """Rows of a step."""
    tokens: int = 376
    """Tokens of a row, those that close a chunk included."""
    chunk: int = 30
    """Text tokens of a chunk."""
    steps: int = 10
    """How often each is measured; the median counts."""
    warm_up: int = 2
    """Steps before that."""
    threads: int = 2
    """Threads of each side."""


def main() -> None:
    options, config = cli.parse(Options, command=COMMAND)
    benchmark(config, options, command=output.command_line(COMMAND))


def benchmark(config: Config, options: Options, *, command: str = "") -> dict[str, Any]:
    """Runs the comparisons and writes their files.

    Args:
      config: the config; its base, method and adapter are used.
      options: of the command.
      command: the command line, for the record.

    Returns:
      What was written to ``pytorch.json``.

    Raises:
      UserError: for options that cannot be, a method whose memory no mask describes, or a peer without torch.
      RunError: if a side ends before it is told to.
    """
    method = build_method(config)
    _check(config, options, method)
    results: dict[str, Any] = {
        "command": command,
        "how": "forward and backward; medians of steps that all took turns, after warm-up; seconds are wall time",
        "model": base_source(config) or "from scratch",
        "config": to_mapping(config),
        "options": dataclasses.asdict(options),
    } | report.environment()
    results["processor"] = report.processor()
    with tempfile.TemporaryDirectory() as folder:
        comp = _write_model(config, Path(folder))
        results["comparisons"] = {
            kind: _compared(kind, config, method, options, Path(folder), comp) for kind in options.comparisons
        }
    output.write_json(options.workdir / "pytorch.json", results)
    (options.workdir / "pytorch.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return results


def _check(config: Config, options: Options, method: Method) -> None:
    require_least(options, "--", rows=1, chunk=1, steps=1, threads=1, warm_up=0)
    least = options.chunk + len(method.closes) + 1
    if options.tokens < least:
        raise UserError(f"--tokens is {options.tokens}; a chunk that is closed and text behind it take {least}")
    if "memory" in options.comparisons and (not method.closes or method.mix is not None or method.pool is not None):
        raise UserError(
            f"method {method.name!r} keeps no copies of keys and values, which a mask over one row of tokens could "
            "show to PyTorch; take one that does (ccm_concat), or --comparisons full"
        )
    paths.usable(options.workdir)


def _write_model(config: Config, folder: Path) -> np.ndarray:
    """Writes the base, in float32, for both sides; the initial embeddings of compression tokens."""
    from jax_ccm.config.loading import load_experiment
    from jax_ccm.weights import save_hf

    # In float32, from which each side makes its own types.
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, precision="float32"))
    model = load_experiment(plain).model
    save_hf(model, folder / "model")
    comp = model.embed_tokens.comp
    return np.zeros((0, model.config.hidden_size)) if comp is None else np.asarray(comp[...])


def _compared(
    kind: Kind, config: Config, method: Method, options: Options, folder: Path, comp: np.ndarray
) -> dict[str, Any]:
    """One comparison: what each step of each side took."""
    from jax_ccm.weights import read_config

    # The other process builds the method again, by its name and options.
    known = {"name": method.name, **config.method.options()} if kind == "memory" else {"name": "full"}
    sizes = {"count": options.rows, "tokens": options.tokens, "chunk": options.chunk}
    method = build(**known)
    made = pytorch_ours.rows(method, read_config(folder / "model").vocab_size, **sizes)
    arrays = pytorch_ours.for_peer(made, method) | ({"comp": comp.astype(np.float32)} if kind == "memory" else {})
    # In a file, which any Python can read that has numpy.
    np.savez(folder / "rows.npz", **arrays)
    shared = {"model": str(folder / "model"), "threads": options.threads}
    adapter = config.adapter
    ours = {
        "method": known, "rows": sizes, "precisions": options.precisions, "comp": comp.tolist(),
        "adapter": None if kind == "full" else {"rank": adapter.rank, "alpha": adapter.alpha, "dropout": 0.0,
                                                "targets": adapter.targets, "tokens": len(comp)},
    }  # fmt: skip
    peer = {
        "arrays": str(folder / "rows.npz"), "precisions": options.peer_precisions, "compiled": options.compiled,
        "adapter": None if kind == "full" else {"r": adapter.rank, "lora_alpha": adapter.alpha,
                                                "target_modules": list(adapter.targets)},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:

        def start(*command, **settings):
            return stack.enter_context(started([*command], shared | settings, REMEDY))

        sides = {
            "jax_ccm": start(sys.executable, "-m", pytorch_ours.__name__, **ours),
            "pytorch": start(options.peer, "-P", peers.__file__, pytorch_peer.__file__, **peer),
        }
        found = _rounds(kind, sides, options)
    sides_found = {name: {"about": side.about, "steps": found[name]} for name, side in sides.items()}

    # What both call float32, and the fastest of each.
    def fastest(name, key=""):
        return min(
            (cell["seconds"] for step, cell in found[name].items() if "seconds" in cell and step.startswith(key)),
            default=None,
        )

    ratios = {}
    for name, key in (("float32", "float32"), ("fastest", "")):
        own, other = fastest("jax_ccm", key), fastest("pytorch", key)
        if own and other:
            ratios[name] = other / own
    tokens = {"tokens": options.rows * options.tokens, "scored": int(made.weights.sum())}
    # The loss of both is in the file: if it differs, what was compared is not the same.
    return tokens | {"sides": sides_found, "ours_to_pytorch": ratios, "load_average": round(os.getloadavg()[0], 2)}


def _rounds(kind: Kind, sides: Mapping[str, Side], options: Options) -> dict[str, dict[str, Any]]:
    """Warms all steps up and measures them; those that fail are left out, with the reason."""
    steps = [(name, step) for name, side in sides.items() for step in side.steps]
    # Ours and PyTorch's alternate.
    steps.sort(key=lambda pair: (sides[pair[0]].steps.index(pair[1]), pair[0]))
    found: dict[str, dict[str, Any]] = {name: {} for name in sides}
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in steps}
    for number in range(options.warm_up + options.steps):
        for name, step in list(samples):
            sample = sides[name].ask(step)
            if "error" in sample:
                found[name][step] = {"error": sample["error"]}
                # A step that fails once (no memory, no compiler) is not asked again.
                del samples[name, step]
                print(f"{kind}: {name}, {step}: {sample['error']}", flush=True)
            elif number >= options.warm_up:
                samples[name, step].append(sample)
            # Threads that still wait for more work of the step before go to sleep.
            time.sleep(0.05)
        if number == options.warm_up - 1:
            print(f"{kind}: measuring", flush=True)
    for (name, step), taken in samples.items():

        def median(key, taken=taken):
            return statistics.median(sample[key] for sample in taken)

        found[name][step] = {
            "seconds": median("wall"), "cpu_seconds": median("cpu"), "loss": taken[-1]["loss"],
            "gradient": taken[-1]["gradient"], "tokens_per_second": options.rows * options.tokens / median("wall"),
            "all_seconds": [round(sample["wall"], 4) for sample in taken],
        }  # fmt: skip
    return found


def table(results: Mapping[str, Any]) -> str:
    """The comparisons in Markdown."""
    rows = []
    for kind, compared in results["comparisons"].items():
        for name, side in compared["sides"].items():
            for step, cell in side["steps"].items():
                if "error" in cell:
                    rows.append([kind, f"{name}, {step}", cell["error"], "", ""])
                    continue
                rates = (compared["tokens"] / cell[key] for key in ("seconds", "cpu_seconds"))
                rows.append([kind, f"{name}, {step}", *(f"{rate:,.0f}" for rate in rates), f"{cell['loss']:.4f}"])
    header = ["", "", "tokens/s", "tokens per second of processor time", "loss"]
    lines = [output.table(header, rows, left=2), ""]
    for kind, compared in results["comparisons"].items():
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in compared["ours_to_pytorch"].items())
        lines.append(f"- {kind}: ours to PyTorch, tokens/s: {told}; load average {compared['load_average']} at the end")
    options = results["options"]
    lines.append(
        f"- {results['model']}, {options['rows']} rows of {options['tokens']} tokens, {options['threads']} threads, "
        f"{results['processor']}; {results['how']}"
    )
    return "\n".join([*lines, "", f"`{results['command']}`", ""])


if __name__ == "__main__":
    cli.run(main)
