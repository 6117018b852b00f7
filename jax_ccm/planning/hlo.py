"""Collectives of a compiled program, read from its text."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """Equal exchanges of a program.

    Attributes:
      operation: such as "all-gather".
      shape: what each device holds of the larger side, such as "bf16[4096,1024]".
      group: devices that take part together.
      count: how often it happens in a run of the program.
      bytes: of ``shape``, once.
    """

    operation: str
    shape: str
    group: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all, by the ring algorithm."""
        # A ring passes on all parts but the own one; all-reduce does so twice: reduce-scatter, then all-gather.
        share = (self.group - 1) / self.group if self.group > 1 else 1.0
        return self.count * self.bytes * share * (2 if self.operation == "all-reduce" else 1)


class _Exchange(NamedTuple):
    """What a `Collective` counts."""

    operation: str
    shape: str
    group: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, those in loops counted for every turn.

    Args:
      text: of the optimised program, ``compiled.as_text()``.
    """
    bodies, entry = _computations(text)

    # An exchange that runs beside other work stands in several computations, under one number.
    @functools.cache
    def inside(name: str) -> dict[str, tuple[_Exchange, int]]:
        total: dict[str, tuple[_Exchange, int]] = {}
        for line in bodies.get(name, ()):
            found = _INSTRUCTION.match(line)
            if found is None:
                continue
            result, operation = found.groups()
            # Its "-done" is no exchange of its own.
            plain = operation.removesuffix("-start")
            if plain in OPERATIONS:
                number = _CHANNEL.search(line)
                total[number[1] if number else line] = (_one(plain, result, line, operation != plain), 1)
            # The text has the body of a loop once.
            times = _turns(line, bodies) if operation == "while" else 1
            for called in _CALLED.findall(line):
                for other in re.findall(r"[\w.\-]+", called):
                    for number, (exchange, count) in inside(other).items():
                        most = total[number][1] if number in total else 0
                        total[number] = (exchange, max(count * times, most))
        return total

    total: collections.Counter[_Exchange] = collections.Counter()
    for exchange, count in inside(entry).values():
        total[exchange] += count
    return sorted(Collective(each.operation, each.shape, each.group, n, each.bytes) for each, n in total.items())


def lines(found: Iterable[Collective]) -> list[str]:
    """A line for each, for people and golden files."""
    return [f"{c.count:4d} x {c.operation} {c.shape} over {c.group}" for c in found]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler noted, or the constant that its counter is compared with; else 1."""
    known = _TRIPS.search(line)
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    if known is not None or condition is None:
        return int(known[1]) if known else 1
    constants = [int(n) for text in bodies[condition[1]] for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)]
    return constants[0] if len(constants) == 1 else 1


def _one(operation: str, result: str, line: str, started: bool) -> _Exchange:
    """What an instruction exchanges."""

    def sizes(dims):
        return tuple(map(int, dims.split(","))) if dims else ()

    shapes: list[tuple[str, tuple[int, ...]]] = [(kind, sizes(dims)) for kind, dims in _SHAPE.findall(result)]

    def size(shape):
        return math.prod(shape[1]) * _bits(shape[0]) // 8

    # What is started gives operand and result (and counters); several results together are one exchange.
    shapes = [max(shapes, key=size)] if started or len(shapes) == 1 else shapes
    group = _group(line)
    if operation == "reduce-scatter":
        # Its result is one share; the larger side is what goes in.
        shapes = [(kind, (group * dims[0], *dims[1:])) for kind, dims in shapes]
    text = "+".join(f"{kind}[{','.join(map(str, dims))}]" for kind, dims in shapes)
    return _Exchange(operation, text, group, sum(map(size, shapes)))


def _bits(kind: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", kind)
    return _BITS.get(kind, int(digits[1]) if digits else 8)


def _group(line: str) -> int:
    # Three spellings: groups and their size, lists of devices, and axes of a mesh.
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named[2]))
    return 2 if "source_target_pairs" in line else 1
