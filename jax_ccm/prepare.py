"""``python -m jax_ccm.prepare list | inspect CONFIG | audit CONFIG | build CONFIG``: data, and what they become."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from typing import Literal

import tyro

from jax_ccm.config import cli
from jax_ccm.config.schema import Config
from jax_ccm.errors import UserError, require_least, unknown

COMMAND = "jax_ccm.prepare"
ACTIONS = ("list", "inspect", "audit", "build")


@dataclasses.dataclass(frozen=True)
class Options:
    """Shows examples of a config's data as training feeds them, each a table of runs of tokens.

    Chunks, the tokens that the method adds, positions, on which tokens the LoRA acts, and which are scored. No weights
    are loaded. ``python -m jax_ccm.prepare list`` names the formats and sources there are.
    """

    split: Literal["train", "validation", "test"] = "train"
    """Which sources of the config's data; those of training are drawn as training draws them, the others are asked
    behind their whole context."""
    count: int = 3
    """How many examples, spread over the records; few others are made."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """Counts the records of a config's data that stand in two splits, or twice in one; and, of online records, says how
    far each question is answered by its own conversation alone.
    """


@dataclasses.dataclass(frozen=True)
class Build:
    """Tokenises a config's training data once, into the folder that data.tokenized names.

    With the same config and ``--data.tokenized DIR`` training then reads no corpus, and gets the same batches.
    """


@dataclasses.dataclass(frozen=True)
class Listing:
    """Names the formats of records, the generated data sets with their options, and the prepared ones of tfds."""


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    first, rest = (argv[0] if argv else ""), argv[1:]
    if first == "list":
        tyro.cli(Listing, args=rest, prog=f"python -m {COMMAND} list")
        from jax_ccm.data import listing

        print(*listing.lines(), sep="\n")
    elif first == "inspect" or first in ("-h", "--help"):
        options, config = cli.parse(Options, rest if first == "inspect" else argv, command=f"{COMMAND} inspect")
        show(config, options)
    elif first == "audit":
        from jax_ccm.data import audit

        _, config = cli.parse(Audit, rest, command=f"{COMMAND} audit")
        print(*audit.lines(config.data), sep="\n")
    elif first == "build":
        _, config = cli.parse(Build, rest, command=f"{COMMAND} build")
        write(config)
    elif first:
        raise unknown("action of prepare", first, ACTIONS)
    else:
        raise UserError(f"say what to do: python -m {COMMAND} list, or inspect, audit or build CONFIG")


def write(config: Config) -> None:
    """Tokenises a config's training data into the folder that ``data.tokenized`` names, and says how much there is."""
    from jax_ccm.config.loading import build_method, tokenizer_of, vocabulary
    from jax_ccm.data import documents, tokenized

    tokenizer, started = tokenizer_of(config), time.perf_counter()
    format, vocab = documents.build(config.data, tokenizer), vocabulary(config, tokenizer)
    say = functools.partial(print, flush=True)
    folder = tokenized.build(config.data, build_method(config), format, tokenizer, vocab, say)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:,.1f} MiB in {time.perf_counter() - started:,.0f} s")


def show(config: Config, options: Options) -> None:
    """Prints examples of a config's data."""
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from jax_ccm.config.loading import build_method, tokenizer_of, vocabulary
    from jax_ccm.data import runs, samples
    from jax_ccm.rules.describe import describe_method, label

    require_least(options, "--", count=1)
    method, tokenizer = build_method(config), tokenizer_of(config)
    vocab = vocabulary(config, tokenizer)
    if options.split == "train":
        data, looked = samples.training(config.data, method, tokenizer, vocab, options.count)

        def example(place):
            return data.draw(data.units[place], np.random.default_rng([config.train.seed, place]))
    else:
        data, looked = samples.questions(config.data, tokenizer, options.split, options.count)
        # Of running text: what is evaluated are windows, not records.
        windows = data.texts() if data.config.draws_spans else None

        def example(place):
            unit = data.units[place]
            return data.format.ask(unit, data.format.chunks(unit)) if windows is None else windows[place]

    acts = ", ".join(kind.name for kind in method.gate) or "no token"
    print(f"{options.split} data{looked}: {data.report}")
    print(f"method: {label(describe_method(method))}; the LoRA acts on {acts}")
    console = Console(highlight=False, soft_wrap=True)
    places = np.unique(np.linspace(0, len(data.units) - 1, options.count).round().astype(int))
    for number, place in enumerate(places, 1):
        shown = example(int(place))
        made, row = runs.runs(method, shown, vocab, tokenizer)
        slots = 0 if row.memory is None else int(row.memory.slots.live.sum())
        print(
            f"\nexample {number}: {shown.id or '(no name)'}\n{len(row.tokens[0])} places, {slots} slots written to "
            f"memory, {int((row.weights > 0).sum())} tokens scored"
        )
        where = [runs.positions(run.positions) for run in made]
        width = max(len("positions"), *map(len, where))
        print(f"chunk  kind    {'positions':<{width}}  LoRA  scored  text")
        for run, spread in zip(made, where, strict=True):
            chunk = "tail" if run.chunk is None else str(run.chunk)
            marks = f"{'yes' * run.gated:<4}  {'yes' * run.scored:<6}"
            # A terminal would obey control characters; line breaks and tabs are shown.
            text = "".join(c if c.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(c, "�") for c in run.text)
            style = "magenta" if run.gated and not run.scored else "bold green" if run.scored else ""
            head = f"{chunk:<5}  {run.kind.name:<6}  {spread:<{width}}  {marks}  "
            console.print(Text.assemble(head, "[", (text, style), "]"))


if __name__ == "__main__":
    cli.run(main)
