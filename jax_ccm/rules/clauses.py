"""How rules are written."""

from __future__ import annotations

from jax_ccm.rules.types import Clause, Kind


def see(
    query: Kind | tuple[Kind, ...],
    key: Kind | tuple[Kind, ...],
    nearest: int,
    farthest: int,
    *,
    window: int | None = None,
    hidden: tuple[int, int] | None = None,
    behind: bool = False,
) -> Clause:
    """Builds a `Clause`; single kinds need no tuple.

    Args:
      query: kinds that look.
      key: kinds that are seen.
      nearest, farthest, window, hidden, behind: as of `Clause`.
    """
    # As tuples, so that a clause is hashable: rules are static arguments of jit.
    looking, seen = ((kinds,) if isinstance(kinds, Kind) else tuple(kinds) for kinds in (query, key))
    return Clause(looking, seen, nearest, farthest, window, hidden, behind)
