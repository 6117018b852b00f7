"""Some cases of each parametrised test, for the fast suite (`pytest --cases`)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def spread(names: Sequence[str], most: int) -> list[str]:
    """So many cases of each test at most, as far apart as can be; of tests with the same cases, different ones.

    Args:
      names: of all cases, ``FILE::TEST[CASE]``, in their order.
      most: of one test.

    Returns:
      Those to run, the same ones every time.
    """
    tests: dict[str, list[str]] = {}
    for name in names:
        tests.setdefault(name.partition("[")[0], []).append(name)
    found = []
    for test, cases in tests.items():
        count = len(cases)
        # Of the test's name, not by `hash`: each process, and each run, finds the same.
        begin = zlib.crc32(test.encode())
        parts = range(count) if count <= most else (begin + part * count // most for part in range(most))
        found += [cases[part % count] for part in parts]
    return found
