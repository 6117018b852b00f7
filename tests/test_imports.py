"""Imports go one way, and importing the library is cheap."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jax_ccm"

# What each part may import of the library; parts are the first name below jax_ccm.
CORE = {"errors", "parsing", "types", "updates"}
ALLOWED = {
    "errors": set(),
    "updates": set(),
    "parsing": {"errors"},
    "types": {"updates"},
    "paths": {"errors"},
    "processes": CORE,
    "preemption": set(),
    "sessions": set(),
    "layout": CORE | {"sessions"},
    "describe": CORE,
    "methods": CORE,
    "sharding": CORE,
    "draw": CORE | {"layout", "sessions"},
    "kernels": CORE | {"layout"},
    "attention": CORE | {"layout", "kernels", "sharding"},
    "nn": CORE | {"layout", "attention", "sharding"},
    # memory needs only the sizes and the type of the model.
    "memory": CORE | {"layout", "nn", "sharding"},
    "memory_files": CORE | {"describe", "memory", "nn", "sharding"},
    "steps": CORE | {"layout", "memory", "nn"},
    "losses": CORE | {"nn", "sharding"},
    "closing": CORE | {"memory", "nn", "steps"},
    "generate": CORE | {"closing", "memory", "nn", "steps"},
    "weights": CORE | {"paths", "processes", "describe", "nn", "methods", "sharding"},
    "data": CORE | {"layout", "paths", "sessions"},
    "evals": CORE
    | {
        "sessions",
        "layout",
        "memory",
        "nn",
        "steps",
        "losses",
        "closing",
        "sharding",
        "generate",
        "data",
        "methods",
        "paths",
    },
}
EXTERNAL = {"methods": {"jax", "flax"}, "data": {"jax", "flax"}}


def modules():
    return sorted(ROOT.rglob("*.py"))


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    names = set(imported(path))
    assert not any(name.split(".")[0] == "configs" for name in names)
    for banned in EXTERNAL.get(part, ()):
        assert not any(name.split(".")[0] == banned for name in names), f"{path} imports {banned}"
    if part not in ALLOWED:
        return  # commands and what they share may import everything
    for name in names:
        if not name.startswith("jax_ccm.") or name.startswith(f"jax_ccm.{part}"):
            continue
        inside = name.removeprefix("jax_ccm.")
        assert any(inside == a or inside.startswith(f"{a}.") for a in ALLOWED[part]), f"{path.name} imports {name}"


def test_import_is_cheap():
    """At most a second beyond jax and flax, no heavy package, no device."""
    program = """
import json, sys, time
import jax, flax.nnx
start = time.perf_counter()
import jax_ccm
seconds = time.perf_counter() - start
heavy = ["transformers", "orbax", "grain", "tensorflow_datasets", "matplotlib", "torch", "gguf", "safetensors"]
print(json.dumps({"seconds": seconds, "heavy": [name for name in heavy if name in sys.modules],
                  "devices": bool(jax._src.xla_bridge._backends)}))
"""
    # Modules that importing flax alone brings are not ours.
    alone = "import json, sys, jax, flax.nnx; print(json.dumps(sorted(sys.modules)))"
    run = lambda code: json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    result, base = run(program), set(run(alone))
    assert [name for name in result["heavy"] if name not in base] == []
    assert not result["devices"]
    # The first import of a fresh checkout also compiles it to bytecode.
    assert min(result["seconds"], run(program)["seconds"]) < 1.0


def test_size_of_files():
    """A file is one thing, of up to 450 lines; longer ones are split by noun."""
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 450}
    assert not long
