"""What is measured, and how often."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jax_ccm.errors import UserError, require_least
from jax_ccm.records import paths
from jax_ccm.records.parsing import parse_json
from jax_ccm.records.paths import Folder

Clock = Literal["wall", "cpu"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures on this machine: a turn of a conversation after many others, compression, and training.

    Full context, a window, and the config's method keep the same conversation: a memory that grows with and without
    forgetting, and beside CCM's own methods both ways to write, concatenated and merged. Each number is the median of
    repeated runs after a warm-up; within a round everything is run once, one after the other, so that what disturbs one
    disturbs all. A conversation of 1,000 turns is not talked through: the cache is put into the state in which it would
    be, and one turn is run. Weights do not matter, so no adapter is asked for; the method with its options, the memory
    capacity and the mesh are those of the config.
    Writes bench.json, turns.md, steps.md, sessions.md, plot.png, summary.json and config.yaml into the working
    directory.
    """

    workdir: Folder
    """Where all output goes."""
    turns: tuple[int, ...] = (1, 10, 30, 100, 300, 1000)
    """Closed turns before the one that is measured."""
    prompt: int = 16
    """Tokens of a question."""
    reply: int = 16
    """Tokens of an answer."""
    window: int = 256
    """Newest text tokens that the sliding window keeps; a config whose method is a window has its own."""
    chunk: int = 128
    """Tokens of the chunk that is compressed at once (a method that cuts text itself has its own), and of a row in
    training."""
    prefill: int = 512
    """Tokens of the text that is read at once."""
    rounds: int = 5
    """How often everything is measured; single steps, which are short, three times as often."""
    train_rounds: int = 3
    """How often a training step is measured; 0 for no training."""
    clock: Clock = "wall"
    """What a second is: of the clock on the wall, or of processor time ("cpu"), which does not count waiting for a
    machine that others use too. On one core (taskset -c 0, XLA_FLAGS=--xla_cpu_multi_thread_eigen=false) of an idle
    machine they are the same."""
    memory_gib: float = 16.0
    """Memory of each device that weights, sessions and temporaries may take, for the number of sessions that fit; 0
    leaves it out."""
    reference: Folder | None = None
    """A JSON file with figures of another implementation, which the table then shows beside ours."""


def require_in_order(options: Any, *names: str) -> None:
    """Raises `UserError` if one of these options is no list of different numbers from 1, from small to large."""
    for name in names:
        given = getattr(options, name)
        if not given or min(given) < 1 or sorted(set(given)) != list(given):
            raise UserError(f"--{name} is {list(given)}; give different numbers from 1, in order, such as 1 10 100")


def check(options: Options) -> dict[str, Any] | None:
    """The reference figures, if asked for."""
    require_least(
        options, "--", prompt=1, reply=1, window=1, chunk=1, prefill=1, rounds=1, train_rounds=0, memory_gib=0
    )
    require_in_order(options, "turns")
    paths.usable(options.workdir)
    if options.reference is None:
        return None
    try:
        found = parse_json(options.reference.read_bytes(), str(options.reference))
        seconds = {name: [float(x) for x in span] for name, span in found["seconds"].items()}
        return {"source": str(found["source"]), "seconds": seconds}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f'--reference {options.reference} cannot be used ({e}); it must be JSON like {{"source": "what and where", '
            '"seconds": {"decode": [0.08, 0.12]}}'
        ) from e
