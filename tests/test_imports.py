"""Each file stands in one room, rooms stand on floors, imports go down; and importing the library is cheap."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jax_ccm"

# Each line stands above all that it imports: a file imports from its own room and from lower floors. Rooms are folders
# (a name with a slash) or single files of the root. What each is: docs/house.md.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("rules/", "distributed/", "records/", "numerics/"),
    ("methods/", "attention/", "data/"),
    ("nn/",),
    ("memory/", "weights/"),
    ("evals/", "config/"),
    ("sessions/", "harness/"),
    ("benchmarks/",),
    ("evaluate", "verify", "compare", "convert", "inspect", "prepare", "rollout", "lm_eval", "training/", "reports/"),
    ("report", "bench", "chat", "train", "planning/", "serving/"),
    ("plan", "serve", "devices/"),
    ("__init__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS, 1) for room in rooms}
COMMANDS = {room for room in FLOOR if not room.endswith("/")} - {"errors", "__init__"}
EXTERNAL = {"methods/": {"jax", "flax"}, "data/": {"jax", "flax"}}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room of a file of the library."""
    first, *inside = path.relative_to(ROOT).with_suffix("").parts
    return f"{first}/" if inside else first


def imports(path: Path):
    """``(module, name)`` of all that a file imports, wherever in it; the name is empty for a whole module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def imported(path: Path) -> set[str]:
    """Modules that a file imports, and what may be one."""
    return {name for module, inside in imports(path) for name in (module, f"{module}.{inside}".rstrip("."))}


def files_of(path: Path) -> set[Path]:
    """Files of the library that a file imports."""
    found = set()
    for module, name in imports(path):
        first, *inside = module.split(".")
        if first != ROOT.name or not (inside or name):
            continue  # the package alone gives its version: it is loaded before any of its modules
        folder = ROOT.joinpath(*inside)
        # The module of that name, else the one that the name is taken from.
        places = [folder / name, folder] if name else [folder]
        files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
        found.add(next(file for file in files if file.exists()))
    return found


def test_each_room_is_there():
    rooms = [room for rooms in FLOORS for room in rooms]
    assert len(rooms) == len(set(rooms))
    assert {room_of(path) for path in modules()} == set(rooms), "a room without a floor, or a floor without its room"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    room = room_of(path)
    assert room in FLOOR, f"{path.relative_to(ROOT)} stands in no room that has a floor: give {room} one in FLOORS"
    packages = {name.split(".")[0] for name in imported(path)}
    assert not packages & ({"configs", "tests"} | EXTERNAL.get(room, set())), f"{path} imports {packages}"
    for other in files_of(path):
        there = room_of(other)
        assert there == room or FLOOR[there] < FLOOR[room], (
            f"{path.relative_to(ROOT)} (floor {FLOOR[room]}) imports {other.relative_to(ROOT)} (floor {FLOOR[there]})"
        )


def test_no_circles():
    """No file imports itself through others."""
    graph = {path: files_of(path) for path in modules()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        pytest.fail(" -> ".join(str(path.relative_to(ROOT)) for path in e.args[1]))


def test_import_is_cheap():
    """At most a second beyond jax and flax, no heavy package, no device."""
    program = """
import json, sys, time
import jax, flax.nnx
start = time.perf_counter()
import jax_ccm
seconds = time.perf_counter() - start
heavy = ["transformers", "orbax", "grain", "tensorflow_datasets", "matplotlib", "torch", "gguf", "safetensors",
         "jax_ccm.config.schema"]
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
    """A file is one thing, of up to 450 lines; a command, which parses, calls and prints, of up to 150."""
    most = lambda path: 150 if room_of(path) in COMMANDS else 450
    lines = {path: len(path.read_text().splitlines()) for path in modules()}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > most(path)}
