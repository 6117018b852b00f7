"""What is counted is what the kernels do; the figures that the design promises."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jax_ccm.attention import gpu, tpu, tpu_steps
from jax_ccm.attention.shared import Refused
from jax_ccm.attention.tpu_sizes import SHORT, Sizes, choose
from jax_ccm.methods import build
from jax_ccm.planning import kernel_costs
from jax_ccm.planning.chips import CHIPS
from jax_ccm.rules import rows, visibility
from jax_ccm.rules.examples import Example, Segment
from jax_ccm.rules.types import Kind, Slots
from tests import cases
from tests.attention.support import draw, made_for

pytestmark = pytest.mark.once

CONCAT = build("ccm_concat", comp_tokens=8)
LLAMA = kernel_costs.Heads(heads=32, kv_heads=8, size=128)


def chunked(chunks: int, tail: int):
    """A row of chunks of 50 + 8 places and a tail: slots of the text and of the memory."""
    lengths = [50] * chunks + [tail]
    segments = tuple(Segment(np.full(n, 11, np.int32), np.zeros(n, bool)) for n in lengths)
    example = Example(np.zeros(0, np.int32), np.zeros(0, np.int32), segments, "row")
    made = rows.batch(CONCAT, [example], rows.Sizes(58 * chunks + tail, 8 * chunks, 8), cases.VOCAB)
    return made.slots, made.memory.slots


def cells(chunks: int, tail: int) -> int:
    """Visible cells of `chunked`: each chunk's own triangle, and 8 slots of each earlier chunk."""
    triangle = lambda n: n * (n + 1) // 2
    earlier = sum(58 * 8 * i for i in range(chunks)) + tail * 8 * chunks
    return chunks * triangle(58) + triangle(tail) + earlier


def test_formula_of_visible_cells():
    slots, memory = chunked(5, 20)
    seen = [np.asarray(visibility.visible(CONCAT.rule, slots, keys)).sum() for keys in (slots, memory)]
    assert sum(seen) == cells(5, 20)


def test_area_of_long_rows():
    """T = 32,768: at most 1.5 times what is visible."""
    chunks, tail = 564, 32768 - 564 * 58
    slots, memory = chunked(chunks, tail)
    found = kernel_costs.count(CONCAT.rule, slots, (slots, memory), LLAMA, Sizes(256, (512, 512), 1, 4))
    assert found["forward"].visited == found["queries"].visited == found["keys"].visited
    assert 1.0 < found["forward"].visited / cells(chunks, tail) < 1.5


def test_area_of_many_demonstrations():
    """16 chunks of 50 + 8 and a tail of 60 in blocks of 128: at most 0.85 of the causal triangle."""
    slots, memory = chunked(16, 60)
    found = kernel_costs.count(CONCAT.rule, slots, (slots, memory), LLAMA, Sizes(128, (128, 128), 1, 4))
    length = slots.kind.shape[1]
    assert found["forward"].visited < 0.85 * length * (length + 1) / 2


@pytest.mark.parametrize(
    ("module", "name", "kernel"), [(tpu_steps, "_visible", tpu.attend), (gpu, "sees", gpu.attend)], ids=("tpu", "gpu")
)
def test_kernel_visits_what_is_counted(module, name, kernel, monkeypatch):
    """Each kernel evaluates the rule once for every counted pair and block of heads, and nowhere else."""
    method = cases.METHODS["concat_n2_sink"]
    made = made_for(method)
    keys = (made.slots, made.memory.slots)
    q, sources, d_out = draw(0, 3, made.tokens.shape[1], [s.kind.shape[1] for s in keys], 4, 2, 8)
    sizes, visits = Sizes(16, (16, 32), 1, 1), []
    evaluate = getattr(module, name)

    def counted(*args):
        jax.debug.callback(lambda: visits.append(1))
        return evaluate(*args)

    monkeypatch.setattr(module, name, counted)
    attend = lambda q, *values: kernel(
        q,
        made.slots,
        tuple((*v, s) for v, s in zip(values, keys, strict=True)),
        rule=method.rule,
        sizes=sizes if kernel is tpu.attend else (sizes.q, sizes.k),
        interpret=True,
    )
    shape = kernel_costs.Heads(4, 2, 8)
    if kernel is tpu.attend:
        expected = kernel_costs.count(method.rule, made.slots, keys, shape, sizes, itemsize=4)
    else:
        expected = kernel_costs.count_on_gpu(method.rule, made.slots, keys, shape, (sizes.q, sizes.k), itemsize=4)
    area = list(_by_source(made, method, sizes))
    pairs = sum(cells // (sizes.q * k) for cells, k in zip(area, sizes.k, strict=True))
    out, pull = jax.vjp(jax.jit(attend), q, *sources)
    jax.block_until_ready(out)
    jax.effects_barrier()
    # Four query heads are four blocks of heads, or programs.
    assert len(visits) == 4 * pairs
    jax.block_until_ready(pull(d_out))
    jax.effects_barrier()
    assert len(visits) == 3 * 4 * pairs
    for name, products in (("forward", 2), ("queries", 3), ("keys", 4)):
        assert expected[name].visited == sum(area)
        assert expected[name].flops == products * 2 * sum(area) * 4 * 8
    if kernel is tpu.attend:
        # Rows that see nothing have a step, and no arithmetic.
        assert expected["forward"].steps >= 4 * pairs


def test_bytes_on_a_gpu():
    """Two blocks of queries of which the second sees two blocks of keys, counted by hand; two heads share a key."""
    place, zero = np.arange(32)[None], np.zeros((1, 32), np.int64)
    slots = Slots(zero + Kind.TEXT, zero, place, place)
    found = kernel_costs.count_on_gpu(CONCAT.rule, slots, (slots,), kernel_costs.Heads(2, 1, 64), (16, (16,)))
    head, codes, entry = 64 * 2, 16, 4
    walked = 3 * (16 * (2 * head + codes) + entry) + 2 * entry
    assert found["forward"].bytes == 2 * (32 * (2 * head + 4 + codes) + walked)
    assert found["queries"].bytes == 2 * (32 * (3 * head + 8 + codes) + walked)
    keys = 32 * (4 * head + codes)
    queries = 3 * (16 * (2 * head + 8 + codes) + entry) + 2 * entry
    assert found["keys"].bytes == keys + 2 * queries
    assert [found[name].steps for name in ("forward", "queries", "keys")] == [4, 4, 2]


def _by_source(made, method, sizes):
    """Visited cells of each source, by the definition."""
    for keys, size in zip((made.slots, made.memory.slots), sizes.k, strict=True):
        seen = np.asarray(visibility.visible(method.rule, made.slots, keys))
        batch, rows, columns = seen.shape
        seen = np.pad(seen, ((0, 0), (0, -rows % sizes.q), (0, -columns % size)))
        seen = seen.reshape(batch, -1, sizes.q, seen.shape[2] // size, size).any(axis=(2, 4))
        yield int(seen.sum()) * sizes.q * size


def test_default_sizes():
    """On every TPU the sizes that are taken are within a fifth of the best by the analytic roofline."""
    slots, memory = chunked(140, 68)
    lengths = (slots.kind.shape[1], memory.kind.shape[1])
    taken = choose(1, lengths[0], lengths, 32, 8, 128, 2, short=False)
    tried = {taken, *(Sizes(q, (k, k), 1, 4) for q, k in (SHORT, (512, 512)))}
    found = {sizes: kernel_costs.count(CONCAT.rule, slots, (slots, memory), LLAMA, sizes) for sizes in tried}
    for chip in filter(lambda chip: chip.is_tpu, CHIPS.values()):
        seconds = {sizes: sum(c.seconds(chip) for c in costs.values()) for sizes, costs in found.items()}
        assert seconds[taken] < 1.2 * min(seconds.values()), seconds


def test_sizes_fill_vectors():
    """Heads of a step are neighbours that fill whole vectors of 128 lanes, or all heads."""
    for heads, kv_heads, size in ((9, 3, 64), (32, 8, 64), (32, 32, 96), (32, 8, 128), (64, 1, 128), (16, 8, 256)):
        sizes = choose(1, 4096, (4096, 560), heads, kv_heads, size, 2, short=False)
        assert sizes.kv_heads * size % 128 == 0 or sizes.kv_heads == kv_heads
        assert sizes.kv_heads * sizes.group * size % 128 == 0 or sizes.kv_heads * sizes.group == heads
        assert heads // kv_heads % sizes.group == 0


def test_refused():
    with pytest.raises(Refused, match="scalar memory"):
        choose(64, 32768, (32768, 4520), 32, 8, 128, 2, short=False)
    with pytest.raises(Refused, match="MiB of VMEM"):
        choose(1, 4096, (4096,), 63, 63, 192, 4, short=False)
