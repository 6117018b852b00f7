"""The fast suite has some cases of every test."""

from tests import selection


def test_some_cases_of_every_test():
    tests = [f"tests/test_a.py::test_{test}" for test in "abcdefgh"]
    names = [f"{test}[{case}]" for test in tests for case in range(9)] + ["tests/test_b.py::test_alone"]
    found = selection.spread(names, 2)
    assert found == selection.spread(names, 2) and len(set(found)) == len(found) == 2 * len(tests) + 1
    assert {name.partition("[")[0] for name in found} == {name.partition("[")[0] for name in names}
    # Not the same cases of each.
    assert len({name.partition("[")[2] for name in found if "[" in name}) > 4
    assert selection.spread(names, 9) == names
