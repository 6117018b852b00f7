"""The README's example runs and prints what it says."""

import doctest
from pathlib import Path


def test_example():
    result = doctest.testfile(str(Path(__file__).parents[1] / "README.md"), module_relative=False)
    assert result.attempted > 8 and result.failed == 0
