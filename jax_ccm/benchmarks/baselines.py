"""Ways to keep a conversation that stand side by side, and the state in which each of them is after many turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_ccm.errors import UserError
from jax_ccm.memory.cache import init_cache
from jax_ccm.methods import beside, build
from jax_ccm.nn.transformer import Transformer
from jax_ccm.rules.occupancy import occupancy
from jax_ccm.rules.types import INF, RAW, TEXT, Kind, MemoryCache, Method, Slots

# More turns than any memory of constant size takes to fill.
MANY = 1 << 20


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A way to keep a conversation.

    Attributes:
      name: what tables and plots call it.
      method: what is run.
      note: what is kept, for people.
      memory: memory slots that there is room for; None for those of all turns.
      text: text tokens that are kept of closed turns; None for what the method keeps of them.
    """

    name: str
    method: Method
    note: str
    memory: int | None = None
    text: int | None = None

    def cache(self, model: Transformer, batch: int, *, turns: int, turn: int) -> MemoryCache:
        """An empty cache with room for ``turns`` closed turns of ``turn`` tokens and an open one."""
        slots, raw = self.room(turns, turn)
        return init_cache(model, self.method, batch, memory_capacity=slots, raw_capacity=raw, overflow="evict")

    def room(self, turns: int, turn: int) -> tuple[int, int]:
        """Memory slots and slots for raw text of `cache`."""
        size, closed = _chunks(self.method, turns + 1, turn)
        slots = self.method.memory_slots(closed + 1 if self.method.chunk else closed, size)
        if self.memory is not None:
            # A chunk writes all its slots at once: fewer could never be held.
            slots = max(self.memory, self.method.memory_slots(1, size))
        text = kept_text(self.method, turns, turn) if self.text is None else self.text
        # A method that cuts text itself closes a chunk as soon as it is full.
        return slots, -(-text // size) * size + size if self.method.chunk else text + turn


def compared(name: str, options: Mapping[str, Any], *, capacity: int, window: int) -> list[Baseline]:
    """Full context, a window, and the method of a config with its options, with those that differ from it only in how
    a chunk enters the memory.

    Args:
      name: of the method.
      options: of the method.
      capacity: memory slots of a memory that grows, where it forgets its oldest.
      window: newest text tokens that the window keeps, besides the first ones that the method keeps. A method that is a
        window has its own size.

    Raises:
      UserError: for a method that has no state between turns to measure.
    """
    own = build(name, **options)
    require_turns(own)
    sinks = dict(sink=True, sinks=own.sink) if own.sink else {}
    streaming = own.rope == "cache"
    newest = build("window", size=max(window, own.sink), streaming=streaming, **sinks)
    found = {
        "full": Baseline("full", build("full"), "all text"),
        "window": Baseline("window", newest, f"the newest {window} tokens of text", text=max(window, own.sink)),
    }
    for label, method in beside(name, **options).items():
        # Whether a memory grows is asked of the method itself, behind more turns than would fill a constant one.
        note, grows = _note(method), _memory(method, MANY) > _memory(method, MANY // 2)
        found[label] = Baseline(label, method, f"{note}, all kept" if grows else note, text=_newest(method))
        if grows:
            # As many at least as a chunk writes.
            room = max(capacity, method.memory_slots(1))
            forgetting = Baseline(f"{label}, evicting", method, f"{note}, the newest {room} slots", memory=room)
            found[forgetting.name] = forgetting
    return list(found.values())


def of(ways: list[Baseline], method: Method) -> Baseline:
    """The one that keeps a conversation by a method; with a bounded memory, if there are two."""
    # The evicting one stands behind the one that keeps all.
    return next(baseline for baseline in reversed(ways) if baseline.method == method)


def require_turns(method: Method) -> None:
    """Refuses a method whose sessions are in no state of their own between turns.

    Raises:
      UserError: saying why, and what to do.
    """
    if method.context == "joined":
        raise UserError(
            f"method {method.name!r} compresses the whole conversation anew each turn: there is no session between "
            "turns whose time or memory could be told. Set method.online: true, which compresses each chunk alone"
        )
    if method.heeds_marks and not method.remembers:
        raise UserError(
            f"method {method.name!r} sees only text that the data keep, and the turns of a conversation have no such "
            "marks; its numbers are those of method full with as much less text"
        )
    if method.context == "chunks" and not method.remembers and not any(_later(clause) for clause in method.rule.sees):
        raise UserError(
            f"method {method.name!r} drops text where a stream decides, not where a turn ends; its numbers are those "
            "of method window with streaming: true and the size of the stream"
        )


def closes_turns(method: Method) -> bool:
    """Whether closing a turn changes a session: not where all text stays."""
    whole = (set(TEXT) <= set(c.key) and c.farthest == INF and c.window is c.hidden is None for c in method.rule.sees)
    return method.remembers or not any(whole)


def kept_text(method: Method, turns: int, turn: int) -> int:
    """Text tokens of closed chunks that a session holds after so many turns, sinks not counted."""
    live = slots_after(method, turns, turn)
    return int(((live.kind == Kind.TEXT) & (live.segment < _chunks(method, turns, turn)[1])).sum())


def slots_after(method: Method, turns: int, turn: int, capacity: int | None = None) -> Slots:
    """The live slots of a session after closed turns of equal length, numpy ``int32 [S]`` each, in order.

    Args:
      method: the compression method.
      turns: closed turns. A method that cuts text itself leaves the rest behind its last chunk open.
      turn: tokens of each.
      capacity: memory slots that there is room for; the oldest are gone.

    See `rules.occupancy.occupancy`.
    """
    size, closed = _chunks(method, turns, turn)
    return occupancy(method, [size] * closed, still_open=turns * turn - closed * size, capacity=capacity)


def fill(cache: MemoryCache, method: Method, *, turns: int, turn: int) -> MemoryCache:
    """The cache as ``turns`` closed turns leave it, except the numbers in its keys and values, which stay."""
    live = slots_after(method, turns, turn, cache.memory_capacity)
    size = cache.slots.kind.shape[1]

    def like(old, x):
        # Placed as the old array was: with another placement every program would be compiled again.
        return jax.device_put(np.broadcast_to(np.asarray(x, np.int32), old.shape), old.sharding)

    return dataclasses.replace(
        cache,
        slots=jax.tree.map(lambda old, x: like(old, np.pad(x, (0, size - len(x)))), cache.slots, live),
        tokens=like(cache.tokens, turns * turn),
        rebased=like(cache.rebased, 0),
        chunks=like(cache.chunks, _chunks(method, turns, turn)[1]),
        lost=like(cache.lost, 0),
    )


def _later(clause: Any) -> bool:
    """Whether raw text of closed chunks is seen."""
    return bool(set(RAW) & set(clause.key)) and clause.farthest > 0


def _newest(method: Method) -> int | None:
    """The width of the window that text of closed chunks is seen through; None without."""
    through = [clause.window for clause in method.rule.sees if _later(clause)]
    widths = [width for width in through if width is not None]
    return max(widths) if widths and len(widths) == len(through) else None


def _memory(method: Method, turns: int) -> int:
    return method.memory_slots(turns, 1)


def _note(method: Method) -> str:
    """What a method keeps of closed turns, for people."""
    of = f"each {method.chunk} tokens" if method.chunk else "a turn"

    def slots(count):
        return f"{count} slot{'s' * (count != 1)}"

    if method.pool:
        return f"a slot for every {method.pool} tokens of text"
    if method.eviction is not None:
        return f"the best {slots(method.eviction.slots)} {'in all' if method.eviction.constant else of}"
    if method.slots_per_chunk:
        grows = _memory(method, MANY) > _memory(method, MANY // 2)
        most = "up to " * (method.ratio is not None)
        return f"{most}{slots(method.slots_per_chunk)} {of}" if grows else f"{slots(_memory(method, MANY))} in all"
    if not any(_later(clause) for clause in method.rule.sees):
        return "nothing"
    width = _newest(method)
    if width is None:
        return "the text that its rule sees" if closes_turns(method) else "all text"
    return f"the newest {width} tokens of text"


def _chunks(method: Method, turns: int, turn: int) -> tuple[int, int]:
    """Tokens of a chunk, and how many of them are closed after so many turns."""
    return (method.chunk, turns * turn // method.chunk) if method.chunk else (turn, turns)
