"""How many live sessions fit: full context and compressed memories side by side, everything counted."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_ccm import methods
from jax_ccm.benchmarks import baselines
from jax_ccm.config.loading import build_method
from jax_ccm.config.schema import Config
from jax_ccm.distributed import sharding
from jax_ccm.nn import ModelConfig
from jax_ccm.planning import costs, programs
from jax_ccm.planning.chips import Chip
from jax_ccm.planning.measure import Need, largest, need
from jax_ccm.rules.types import Method


@dataclasses.dataclass(frozen=True)
class Setting:
    """A conversation.

    Attributes:
      chunks: closed so far.
      chunk_tokens: of each.
      raw: slots for raw text that is not compressed yet: the input and the answer in hand.
    """

    chunks: int
    chunk_tokens: int
    raw: int


def systems(config: Config) -> dict[str, Method]:
    """Full context, and the config's method; beside CCM's own both ways to write, with the same options.

    Raises:
      UserError: for a method that has no sessions between turns to count.
    """
    baselines.require_turns(build_method(config))
    return {"full": methods.build("full")} | methods.beside(config.method.name, **config.method.options())


def room(method: Method, setting: Setting) -> tuple[int, int]:
    """Memory slots and slots for raw text of a session."""
    baseline = baselines.Baseline(method.name, method, "")
    slots, raw = baseline.room(setting.chunks, setting.chunk_tokens)
    if method.chunk:
        # The open chunk is the raw text in flight.
        return slots, raw
    text = baselines.kept_text(method, setting.chunks, setting.chunk_tokens)
    return method.memory_slots(setting.chunks, setting.chunk_tokens), text + setting.raw


def serving_mesh(shape: ModelConfig, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """As many devices share the heads as divide them, so that weights are never moved; the rest hold other sessions."""
    tensor = math.gcd(shape.num_kv_heads, len(devices))
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": tensor, "context": 1}, devices)


def most_sessions(
    config: Config,
    shape: ModelConfig,
    method: Method,
    setting: Setting,
    mesh: jax.sharding.Mesh,
    chip: Chip,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The largest number of sessions for which every step fits, and what the steps need then.

    The steps are closing a chunk in all sessions at once (where that changes them, not with full context) and reading a
    token in all of them.
    """
    slots, raw = room(method, setting)
    step = sharding.row_shares(mesh)
    one = programs.abstract_cache(config, shape, method, mesh, step, slots, raw)
    each = programs.device_bytes(one) / step
    weights = programs.device_bytes(programs.abstract_model(config, shape, method, mesh))
    # The cache of a session, and as much again as two of its layers for temporaries.
    guess = int((0.97 * chip.usable_bytes - weights) / (each * (1 + 2 / shape.num_layers)))

    def program(kind: Callable, sessions: int):
        cache = programs.abstract_cache(config, shape, method, mesh, sessions, slots, raw)
        return kind(config, shape, method, mesh, cache)

    @functools.cache
    def needs(kind: Callable, sessions: int) -> Need:
        found = need(program(kind, sessions), chip)
        verdict = "fits" if found.fits else "does not fit"
        say(f"{method.name}, {kind.__name__} of {sessions:,} sessions: {found.bytes / 2**30:.2f} GiB, {verdict}")
        return found

    # Compilers keep about 2 % of a chip's memory for themselves.
    limit = int(0.98 * chip.usable_bytes)
    closing = (programs.compress_step,) if baselines.closes_turns(method) else ()
    most, steps, refused = _fitting((*closing, programs.decode_step), needs, guess=guess, step=step, limit=limit)

    def entry(name: str, found: Need) -> dict[str, Any]:
        decodes = name == programs.decode_step.__name__
        tokens = 1 if decodes else len(method.closes)
        cache, weights = found.kinds["cache"], found.kinds["weights"]
        cost = costs.serving_cost(shape, most, tokens, slots + raw, cache, weights, logits=decodes)
        return found.to_json() | {"flops": cost.flops, "seconds": cost.times(chip, mesh.size, found)}

    return {
        "sessions": most,
        # The sink has a slot beside those of memory and text.
        "slots": slots + raw + int(method.sink),
        # Of all devices, everything that a session holds.
        "cache_bytes_per_session": one.nbytes // step,
        "first_that_does_not_fit": min(refused),
        "steps": {name: entry(name, found) for name, found in steps.items()},
    }


def _fitting(
    kinds: Sequence[Callable], needs: Callable[[Callable, int], Need], *, guess: int, step: int, limit: int
) -> tuple[int, dict[str, Need], list[int]]:
    """The most sessions for which several steps fit.

    Args:
      kinds: the steps.
      needs: what one of them needs for so many sessions.
      guess, step, limit: as for `largest`.

    Returns:
      That number, 0 if there is none; what each step, by name, needs then; and the numbers that were found too large.
    """
    most, fits, refused = guess, [], []
    for kind in kinds:
        if not most:
            break
        # What fits the step before is only to be confirmed, if this one needs no more.
        if not fits or not needs(kind, most).fits:
            most, tried = largest(lambda n, kind=kind: needs(kind, n), step=step, guess=most, limit=limit)
            refused += [n for n, found in tried.items() if not found.fits]
        fits.append(kind)
    return most, {kind.__name__: needs(kind, most) for kind in fits} if most else {}, refused
