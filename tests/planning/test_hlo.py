"""Collectives read from compiled programs."""

from __future__ import annotations

import pytest

from jax_ccm.planning.hlo import Collective, collectives, lines

TEXT = """HloModule jit_step

%inner (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-gather.1 = f32[8]{0} all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[8]{0} fusion(%a), kind=kOutput, calls=%inner
  %again = f32[8]{0} fusion(%a), kind=kOutput, calls=%inner
  %all-reduce.2 = (bf16[2,3]{1,0}, bf16[4]{0}) all-reduce(%b, %c), channel_id=2, replica_groups={{0,1,2,3}}
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

ENTRY %main (q: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body
  %scatter = f32[2]{0} reduce-scatter(%y), channel_id=3, replica_groups=mesh['a'=1,'b'=4] {'b'}, to_apply=%add
  %started = (f32[4]{0}, f32[16]{0}) all-gather-start(%y), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}
  %done = f32[16]{0} all-gather-done(%started)
}
"""


def test_loops_groups_and_asynchronous_parts():
    found = collectives(TEXT)
    assert found == [
        # In the loop; the fusions are two parts of one exchange.
        Collective("all-gather", "f32[16]", 4, 1, 64),
        Collective("all-gather", "f32[8]", 2, 32, 32),
        Collective("all-reduce", "bf16[2,3]+bf16[4]", 4, 32, 20),
        # What each device holds before.
        Collective("reduce-scatter", "f32[8]", 4, 1, 32),
    ]
    assert lines(found)[1] == "  32 x all-gather f32[8] over 2"
    assert [c.sent for c in found] == pytest.approx([48, 32 * 16, 32 * 20 * 1.5, 24])
    noted = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert {c.count for c in collectives(noted)} == {1, 7}
