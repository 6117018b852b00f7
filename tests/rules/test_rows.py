"""Masks and positions: drawn, and cell by cell against the reference's rules."""

from __future__ import annotations

import numpy as np
import pytest

from jax_ccm.errors import UserError
from jax_ccm.methods import METHODS, build
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.examples import Example, Segment, join
from jax_ccm.rules.mixtures import Ema
from jax_ccm.rules.rows import Sizes, batch, measure
from jax_ccm.rules.types import Kind, Slots
from jax_ccm.rules.visibility import visible
from tests import cases

V = cases.VOCAB


def example(*segments, start=(), separator=(), scored=True) -> Example:
    array = lambda x: np.array(x, np.int32)
    return Example(
        array(start), array(separator), tuple(Segment(array(s), np.full(len(s), scored, bool)) for s in segments)
    )


def drawn(method, *segments) -> list[str]:
    """The mask of a tight row as text: own places, a bar, memory."""
    session = example(*segments)
    made = batch(method, [session], measure(method, session), V)
    own = visible(method.rule, made.slots, made.slots)[0]
    past = visible(method.rule, made.slots, made.memory.slots)[0] if made.memory else np.zeros((len(own), 0), bool)
    text = lambda row: "".join("x" if cell else "." for cell in row)
    return [f"{text(a)}|{text(b)}" for a, b in zip(own, past, strict=True)]


# Chunks ``1 5``, ``6`` and the tail ``7 8``, one compression token.
@pytest.mark.parametrize(
    ("method", "expected"),
    {
        build("ccm_concat"): "x......|.. xx.....|.. xxx....|.. ...x...|x. ...xx..|x. .....x.|xx .....xx|xx",
        build(
            "ccm_concat", independent=True
        ): "x......|.. xx.....|.. xxx....|.. ...x...|.. ...xx..|.. .....x.|xx .....xx|xx",
        build("ccm_concat", sink=True): "x......|.. xx.....|.. xxx....|.. x..x...|x. x..xx..|x. x....x.|xx x....xx|xx",
        build("ccm_merge"): "x......|.. xx.....|.. xxx....|.. ...x...|x. ...xx..|x. .....x.|.x .....xx|.x",
        build(
            "ccm_merge", independent=True
        ): "x......|.. xx.....|.. xxx....|.. ...x...|.. ...xx..|.. .....x.|.x .....xx|.x",
        build("gist"): "x.....|. xx....|. xxx...|. xxxx..|. ....x.|x ....xx|x",
        build("full"): "x....| xx...| xxx..| xxxx.| xxxxx|",
        build("window", size=2): "x....| xx...| .xx..| ..xx.| ...xx|",
        build("none"): "x.| xx|",
    }.items(),
    ids=lambda x: x.name if hasattr(x, "name") else "",
)
def test_drawn(method, expected):
    assert drawn(method, [1, 5], [6], [7, 8]) == expected.split()


def reference(kind: str, ids: np.ndarray, n: int, sink: bool):
    """The reference's mask (after causality) and positions for one row without padding, from its published rules."""
    length = len(ids)
    is_comp = (ids >= V) & (ids < V + n)
    is_sum = ids >= V + n
    before = lambda last: np.concatenate([[0], np.cumsum(ids == last)[:-1]])
    comp_block, sum_block = before(V + n - 1), before(V + 2 * n - 1)
    same = lambda b: b[:, None] == b[None]
    if kind == "concat_recur":
        allow = same(comp_block) | is_comp[None]
    elif kind == "merge_recur":
        allow = same(sum_block) | (is_sum[None] & (sum_block[None] == sum_block[:, None] - 1))
    elif kind == "concat":
        allow = same(comp_block) | (is_comp[None] & (comp_block[:, None] == comp_block.max()))
    elif kind == "gist":
        allow = same(comp_block) | (is_comp[None] & (comp_block[None] == comp_block[:, None] - 1))
    else:  # merge: contexts are blocks of COMP; the tail sees itself and the SUM group that precedes it
        gist = same(sum_block) | (is_sum[None] & (sum_block[None] == sum_block[:, None] - 1))
        allow = (same(comp_block) & gist) | (is_sum[:, None] & is_comp[None])
        allow |= (sum_block[:, None] == 1) & is_sum[None]
    if sink:
        allow = allow | (ids == 1)[None]
    text = ~(is_comp | is_sum)
    positions = np.cumsum(text) - 1
    for group in (is_comp, is_sum):
        slot = (ids - V) % n
        positions = np.where(group, positions + slot + 1, positions)
    return allow & np.tril(np.ones((length, length), bool)), positions


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kind", ["concat_recur", "concat", "merge_recur", "merge", "gist"])
def test_cells_of_the_reference(kind, sink):
    """Every cell and position of random ragged rows (traps 1, 9, 10, 13; SUM columns are our memory slots)."""
    rng = np.random.default_rng(0)
    for _ in range(25):
        n = int(rng.integers(1, 4))
        count = 1 if kind == "gist" else int(rng.integers(1, 5))
        segments = [rng.integers(5, 90, rng.integers(1, 6)) for _ in range(count + 1)]
        segments[0] = np.concatenate([[1], segments[0]])
        name = {"gist": "gist"}.get(kind, f"ccm_{kind.split('_')[0]}")
        options = {} if kind == "gist" else {"independent": not kind.endswith("recur")}
        method = build(name, comp_tokens=n, sink=sink, **options)
        comp, sums = V + np.arange(n), V + n + np.arange(n)
        ids = []
        for i, segment in enumerate(segments[:-1]):
            ids += [segment, comp]
            if kind == "merge_recur" or (kind == "merge" and i == count - 1):
                ids.append(sums)
        ids = np.concatenate([*ids, segments[-1]])
        expected, positions = reference(kind, ids, n, sink)

        session = example(*segments)
        made = batch(method, [session], measure(method, session), V)
        own = visible(method.rule, made.slots, made.slots)[0]
        past = visible(method.rule, made.slots, made.memory.slots)[0]
        is_sum = ids >= V + n
        places = np.flatnonzero(~is_sum)
        assert np.array_equal(made.slots.position[0], positions[places])
        ours = np.zeros_like(expected)
        ours[np.ix_(places, places)] = own
        if method.mix is None:
            ours[np.ix_(places, places[made.memory.source[0]])] |= past
        else:
            columns = np.flatnonzero(is_sum)
            written = past[:, past.shape[1] - len(columns) :]
            assert not past[:, : past.shape[1] - len(columns)].any()
            ours[np.ix_(places, columns)] |= written
        assert np.array_equal(ours[places], expected[places])


def test_positions_of_the_specification():
    """Ids ``1 5 6 C0 C1 7 8 C0 C1 9`` have positions ``0 1 2 3 4 3 4 5 6 5`` (trap 1)."""
    method = build("ccm_concat", comp_tokens=2)
    session = example([1, 5, 6], [7, 8], [9])
    made = batch(method, [session], measure(method, session), V)
    assert made.tokens[0].tolist() == [1, 5, 6, V, V + 1, 7, 8, V, V + 1, 9]
    assert made.slots.position[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 5]


def test_mixtures():
    """Mean: state t weighs its chunks equally; EMA: geometric, the first chunk a plain copy (trap 8)."""
    session = example([1], [2], [3], [4], [5])
    for method, last in (
        (build("ccm_merge", comp_tokens=2), [0.25] * 4),
        (build("ccm_ema", comp_tokens=2), [0.125, 0.125, 0.25, 0.5]),
        (build("ccm_ema", comp_tokens=2, decay=1.0), [0, 0, 0, 1]),
    ):
        made = batch(method, [session], measure(method, session), V)
        mix = made.memory.mix[0]
        assert np.allclose(mix.sum(1), 1)
        assert np.allclose(mix[6, 0::2], last) and np.allclose(mix[7, 1::2], last)
        assert np.allclose(mix[0::2, 1::2], 0), "slots are not mixed with each other"
        assert np.allclose(np.triu(mix[0::2, 0::2], 1), 0), "a state holds no later chunk"
    in_turn = build("ccm_merge", comp_tokens=1, groups=2)
    mix = batch(in_turn, [session], measure(in_turn, session), V).memory.mix[0]
    assert np.array_equal(mix, [[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]])
    with pytest.raises(ValueError, match="decay is 1.5"):
        Ema(1.5)


def test_targets_skip_compression_tokens():
    """A token is predicted from the text token before it; the first of a session is not scored."""
    method = build("ccm_concat", comp_tokens=2)
    session = example([10, 11], [12], [13, 14])
    made = batch(method, [session], Sizes(12, 6, 6), V)
    assert made.targets[0].tolist() == [11, 12, 13, 14, 0, 0]
    assert made.indices[0].tolist() == [0, 1, 4, 7, 0, 0]
    assert made.weights[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert made.steps[0].tolist() == [0, 1, 2, 2, 0, 0]
    assert measure(method, session) == Sizes(9, 4, 4)


def test_openings_and_contexts():
    """Start and separators open segments, after the compression tokens (trap 14), as each method wants its context."""
    session = example([10], [11], [12], start=[1], separator=[3, 4])
    tokens = lambda method: batch(method, [session], measure(method, session), V).tokens[0].tolist()
    assert tokens(build("ccm_concat")) == [1, 10, V, 3, 4, 11, V, 3, 4, 12]
    assert tokens(build("gist")) == [1, 10, 3, 4, 11, V, 3, 4, 12]
    assert tokens(build("full")) == [1, 10, 3, 4, 11, 3, 4, 12]
    assert tokens(build("none")) == [1, 12]
    joined = join(session, [2, 1])
    assert [s.tokens.tolist() for s in joined.segments] == [[10, 3, 4, 11], [12]]
    assert joined.segments[0].scored.tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="do not partition 3 segments"):
        join(session, [2, 2])


def test_padding_sides():
    method = build("ccm_merge", comp_tokens=2)
    session = example([10, 11], [12], [13, 14])
    sizes = Sizes(12, 6, 6)
    right, left = batch(method, [session], sizes, V), batch(method, [session], sizes, V, pad="left")
    live = left.slots.live[0]
    assert live.tolist() == [False] * 3 + [True] * 9
    assert left.tokens[0][live].tolist() == right.tokens[0][:9].tolist()
    assert left.indices[0].tolist() == [3, 4, 7, 10, 0, 0]
    assert left.memory.source[0].tolist() == [5, 6, 8, 9, 0, 0]
    for name in ("kind", "segment", "index", "position"):
        assert np.array_equal(getattr(left.slots, name)[0][live], getattr(right.slots, name)[0][:9])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(8, 4, 4), "tokens=9, the batch has 8"),
        (Sizes(9, 3, 4), "memory=4, the batch has 3"),
        (Sizes(9, 4, 3), "scored=4, the batch has 3"),
    ],
)
def test_caps(sizes, message):
    with pytest.raises(UserError, match=message):
        batch(build("ccm_concat", comp_tokens=2), [example([10, 11], [12], [13, 14])], sizes, V)


@pytest.mark.parametrize(("name", "need"), [("ccm_merge", 4), ("ccm_ema", 4), ("compressive", 3)])
def test_caps_of_memory_that_is_weighed(name, need):
    """What has weights for the size of the batch is refused alike."""
    options = {"ratio": 1, "recent": 0} if name == "compressive" else {"comp_tokens": 2}
    method, session = build(name, **options), example([10, 11], [12], [13, 14])
    assert batch(method, [session], Sizes(9, need, 4), V).memory.slots.live.sum() == need
    with pytest.raises(UserError, match=f"needs memory={need}, the batch has {need - 1}; raise the cap"):
        batch(method, [session], Sizes(9, need - 1, 4), V)


def test_bad_input():
    sizes = Sizes(20, 4, 10)
    method = build("ccm_concat")
    with pytest.raises(UserError, match="segment 1 is empty"):
        batch(method, [example([5], [], [6])], sizes, V)
    for token in (V, V + 1, -1):
        with pytest.raises(UserError, match=f"token id {token} .* outside the vocabulary"):
            batch(method, [example([5], [token, 6])], sizes, V)
    with pytest.raises(UserError, match="no parallel form"):
        batch(build("ccm_concat", streaming=True), [example([5], [6])], sizes, V)
    with pytest.raises(UserError, match="did you mean 'ccm_concat'"):
        build("ccm_conct")
    with pytest.raises(UserError, match="'comp_tokens'"):
        build("ccm_concat", comp_token=3)
    with pytest.raises(UserError, match="at least 1 token"):
        build("ccm_concat", comp_tokens=0)
    with pytest.raises(UserError, match="takes no options"):
        build("full", sink=True)


def test_chunk():
    made = rows.chunk([[5, 6], [], [7]], 3, V)
    assert made.tokens.tolist() == [[5, 6, 0], [0, 0, 0], [7, 0, 0]]
    assert made.valid.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
    with pytest.raises(UserError, match="row 1 has 4 tokens, and the chunk holds 3"):
        rows.chunk([[1], [1, 2, 3, 4]], 3, V)
    for token in (V, -1):
        with pytest.raises(UserError, match=f"row 0: token id {token} is outside the vocabulary"):
            rows.chunk([[token]], 3, V)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("window", dict(size=0), "window size is 0"),
        ("window", dict(size=3, sink=True, sinks=4), "window size is 3, smaller than the sinks=4"),
        ("window", dict(size=3, sink=True, sinks=0), "sinks is 0"),
        ("window", dict(size=9, sinks=4), "sinks is 4, but sink is false"),
        ("window", {}, "method 'window' needs its option 'size'"),
        ("streaming_llm", dict(sinks=-1), "sinks is -1"),
    ],
)
def test_windows_and_sinks_that_do_not_go_together(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, **options)


def test_every_method_builds():
    for name in METHODS:
        method = build(name, **{"window": {"size": 4}, "local": {"hidden": 0.5}}.get(name, {}))
        assert method.name == name
        hash(method)  # a static argument of jit


def test_numpy_and_jax_agree():
    """The same function on the host and under jit."""
    import jax

    rng = np.random.default_rng(0)
    slots = lambda: Slots(*(rng.integers(0, 8, (2, 9)).astype(np.int32) for _ in range(4)))
    for method in cases.METHODS.values():
        q, k = slots(), slots()
        ours = jax.jit(visible, static_argnums=0)(method.rule, q, k)
        assert np.array_equal(ours, visible(method.rule, q, k))


@pytest.mark.parametrize("name", cases.METHODS)
def test_reachable_is_what_somebody_can_see(name):
    """`reachable` keeps each key that some later place can see, and drops the rest."""
    rule = cases.METHODS[name].rule
    rng = np.random.default_rng(1)
    keys = Slots(
        rng.integers(1, 8, (1, 40)), rng.integers(0, 5, (1, 40)), np.arange(40)[None], rng.integers(0, 30, (1, 40))
    )
    now = np.array([4]), np.array([30])
    kept = visibility.reachable(rule, keys, *now)[0]
    later = [(kind, 4 + ahead, 30 + 3 * ahead) for ahead in range(4) for kind in Kind]
    queries = Slots(
        *(np.array([[x[i] for x in later]]) for i in (0, 1)),
        np.full((1, len(later)), 99),
        np.array([[x[2] for x in later]]),
    )
    seen = visible(rule, queries, keys)[0].any(0)
    assert np.array_equal(seen, kept)
