"""CCM-concat whose text, or whose compression tokens, see the memory of the newest exchanges alone: own methods.

`docs/results.md` has the commands: this folder on PYTHONPATH, and ``--method.name diag:read5``.
"""

from __future__ import annotations

import dataclasses

from jax_ccm.methods import build
from jax_ccm.rules.types import INF, Kind, Method, see


def cut(reads: int = INF, writes: int = INF) -> Method:
    """Four slots an exchange and a sink, as in the adapter that ships.

    Args:
      reads: exchanges back whose slots text sees; 0 for none.
      writes: the same of compression tokens.
    """
    method = build("ccm_concat", comp_tokens=4, sink=True)
    clauses = [clause for clause in method.rule.sees if Kind.MEMORY not in clause.key]
    if reads:
        clauses.append(see((Kind.TEXT, Kind.QUERY), Kind.MEMORY, 1, reads))
    if writes:
        clauses.append(see(Kind.COMP, Kind.MEMORY, 1, writes))
    return dataclasses.replace(method, name="cut", rule=dataclasses.replace(method.rule, sees=tuple(clauses)))


def grow() -> Method:
    """The method as it is."""
    return cut()


def read5() -> Method:
    """Text sees the slots of five exchanges."""
    return cut(reads=5)


def write5() -> Method:
    """Compression tokens see the slots of five exchanges."""
    return cut(writes=5)


def alone() -> Method:
    """Compression tokens see no slots."""
    return cut(writes=0)


def both5() -> Method:
    """Both see the slots of five exchanges."""
    return cut(reads=5, writes=5)
