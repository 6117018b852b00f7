"""The map of visible blocks and the list of pairs that kernels walk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ccm.attention import blocks
from jax_ccm.methods import build
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.types import Kind, Slots
from tests import cases
from tests.attention.support import made_for

pytestmark = pytest.mark.once


def exact(rule, q: Slots, k: Slots, q_size: int, k_size: int) -> np.ndarray:
    """The definition: whether any place of the one block sees any of the other."""
    cells = np.asarray(visibility.visible(rule, q, k))
    batch, rows, columns = cells.shape
    cells = np.pad(cells, ((0, 0), (0, -rows % q_size), (0, -columns % k_size)))
    return cells.reshape(batch, -(-rows // q_size), q_size, -1, k_size).any(axis=(2, 4))


@pytest.mark.parametrize("name", cases.METHODS)
def test_map_is_exact(name):
    """For every method, text and memory, and sizes that divide nothing: no block too few, none too many.

    Where positions decide and do not rise along a row, extremes of a block that holds parts of two chunks cannot tell
    which of them a position belongs to: then a few are too many, which costs time and changes no result.
    """
    method = cases.METHODS[name]
    in_order = not any(clause.behind for clause in method.rule.sees)
    made = made_for(method)
    for q_size, k_size in ((4, 4), (8, 5)):
        for keys in (made.slots, *([made.memory.slots] if made.memory is not None else [])):
            found = blocks.visible_blocks(method.rule, made.slots, keys, q_size, k_size)
            expected = exact(method.rule, made.slots, keys, q_size, k_size)
            what = f"{q_size} x {k_size}, {keys.kind.shape[1]} keys"
            np.testing.assert_array_equal(found, expected if in_order else expected | found, what)
            assert (np.asarray(found) >= expected).all() and np.mean(found != expected) < 0.01
    assert expected.any() and not expected.all()


SLOT = st.tuples(st.integers(0, 7), st.integers(0, 3), st.integers(0, 12), st.integers(0, 12))
RULES = [cases.METHODS[name].rule for name in ("merge_n2_repeat", "loma", "sentinel", "window_sink", "local")]


@given(st.lists(SLOT, min_size=7, max_size=7), st.lists(SLOT, min_size=7, max_size=7), st.sampled_from(RULES))
@settings(max_examples=40, deadline=None)
def test_nothing_visible_is_left_out(q, k, rule):
    """Slots in no order at all: every visible pair of query and key lies in a pair of blocks that is found."""
    q, k = (Slots(*np.asarray(x, np.int32).T[:, None]) for x in (q, k))
    found = np.asarray(blocks.visible_blocks(rule, q, k, 3, 2))
    assert (found >= exact(rule, q, k, 3, 2)).all()


def walk(pairs, sources: int):
    """The list, read as a kernel reads it: (batch row, block, source or None, column, first, last)."""
    rows, columns = np.asarray(pairs.rows), np.asarray(pairs.columns)
    for row, column in zip(rows[: pairs.count].tolist(), columns[: pairs.count].tolist(), strict=True):
        hit = [s for s in range(sources) if row & (blocks.SOURCE << s)]
        assert len(hit) <= 1
        source = hit[0] if hit else None
        place = None if source is None else column >> (16 * source) & 0xFFFF
        block = blocks.batch_of(row), blocks.block_of(row)
        yield *block, source, place, bool(row & blocks.FIRST), bool(row & blocks.LAST)


def test_list_of_pairs():
    """The list holds exactly the visible pairs, row after row, and one pair for a row that sees nothing."""
    rng = np.random.default_rng(0)
    text, memory = rng.random((2, 5, 4)) < 0.4, rng.random((2, 5, 3)) < 0.3
    text[1, 2], memory[1, 2] = False, False
    pairs = jax.jit(blocks.list_pairs)(text, memory)
    found = list(walk(pairs, 2))
    expected = []
    for b in range(2):
        for row in range(5):
            hits = [(0, c) for c in np.flatnonzero(text[b, row])] + [(1, c) for c in np.flatnonzero(memory[b, row])]
            hits = hits or [(None, None)]
            expected += [(b, row, *hit, i == 0, i == len(hits) - 1) for i, hit in enumerate(hits)]
    assert found == expected
    # A source that is not visited stands at what its row visits first or last, so that nothing more is loaded.
    columns = np.asarray(pairs.columns)[: pairs.count]
    for source, seen in enumerate((text, memory)):
        for here, (b, row, visited, place, *_) in zip(columns >> (16 * source) & 0xFFFF, found, strict=True):
            hits = np.flatnonzero(seen[b, row])
            ends = (hits[0] if source > (visited or 0) else hits[-1]) if len(hits) else 0
            assert here == (place if visited == source else ends)


def test_list_has_bounds():
    with pytest.raises(ValueError, match="at most 16384 rows"):
        jax.eval_shape(blocks.list_pairs, jnp.zeros((1 << 15, 1, 1), bool))


def test_pairs_of_the_docstring():
    method = build("ccm_concat", comp_tokens=2)
    example = cases.sessions(((6, 6, 6, 8),), start=0, separator=0)
    made = rows.batch(method, example, rows.Sizes(32, 16, 40), cases.VOCAB)
    memory = made.memory.slots
    assert np.asarray(memory.kind != Kind.PAD).sum() == 6
    text = blocks.visible_blocks(method.rule, made.slots, made.slots, 8, 8)
    pairs = blocks.list_pairs(text, blocks.visible_blocks(method.rule, made.slots, memory, 8, 8))
    expected = [(0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 2), (2, 1, 0), (3, 0, 3), (3, 1, 0)]
    assert [x[1:4] for x in walk(pairs, 2)] == expected
