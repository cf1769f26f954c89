"""The deep sink: where its frames stand, literally as traced from the published code, and what a layer gets."""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.plan import Call
from forcing_pack.forcing_core.policies import DeepSinkOptions, WindowOptions, build
from forcing_pack.forcing_core.store import Keys
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.passkit import GRID, TOKENS, memory, play, script
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = DeepSinkOptions()
SMALL = DeepSinkOptions(window=9, sink=4, block=2)


def plans(options, frames, given=0, passes=None):
    """(call, plan) of every pass, on frame numbers alone."""
    policy, held = build(options, frames), ()
    for first, count, phase in passes or script(options, frames, given):
        call = Call(first, count, phase, held)
        plan = policy.plan(call)
        held = tuple(sorted({*held, *plan.write} - {*plan.evict}))
        yield call, plan


def opening(options, frames, given=0):
    """Plans of the first pass of every block."""
    return [plan for call, plan in plans(options, frames, given) if call.first not in call.held]


def span(first, last):
    return tuple(range(first, last + 1))


def test_the_published_trace():
    """[0..13|17..23], [3..16|20..26], [6..19|23..29]: the sink stays at the first overflow, then moves by a block; three
    positions behind it stay empty."""
    made = opening(PUBLISHED, 30)
    assert [plan.positions for plan in made[6:]] == [
        span(0, 20), span(0, 13) + span(17, 23), span(3, 16) + span(20, 26), span(6, 19) + span(23, 29)]
    assert [plan.evict for plan in made[6:]] == [(), (14, 15, 16), (17, 18, 19), (20, 21, 22)]
    assert [plan.query for plan in made[7:]] == [span(21, 23), span(24, 26), span(27, 29)]


def test_the_papers_trace_has_no_hole():
    made = opening(replace(PUBLISHED, hole=False), 30)
    assert [plan.positions for plan in made[6:]] == [span(0, 20), span(3, 23), span(6, 26), span(9, 29)]


@pytest.mark.parametrize("window, frames, given, shifts", [
    (9, 14, 0, [0, 2, 4]),  # the first block past 9 frames starts at 8
    (8, 14, 0, [0, 2, 4]),  # a multiple of the block: the sink starts at block start - window
    (9, 15, 5, [0, 2, 4]),  # given frames 0..4: blocks start at 5, 7, 9; the one at 9 overflows first
    (9, 17, 11, [0, 2, 3, 5, 7]),  # given ones overflow themselves: chunks start at 8 and 10, blocks at 11, 13, 15
])
def test_the_shift_counts_from_the_first_overflow(window, frames, given, shifts):
    """Wherever blocks start, also where the window is no multiple of them: a base of block start - window would
    move the sink at once."""
    made = [plan for _, plan in plans(replace(SMALL, window=window), frames, given) if plan.evict]
    assert [plan.positions[0] for plan in made] == shifts


@pytest.mark.parametrize("hole", [True, False])
def test_later_passes_of_a_block_stand_where_the_first_did(hole):
    """The published code moves the sink at the first forward only."""
    last = None
    for call, plan in plans(replace(SMALL, hole=hole), 20):
        if last is not None and last[0] == call.first:
            assert (plan.evict, plan.read, plan.positions, plan.query) == ((), *last[1:])
        last = call.first, plan.read, plan.positions, plan.query
        assert max(plan.read) < call.first + call.frames
        assert all(plan.positions[plan.read.index(f)] == p for f, p in zip(call.span, plan.query))


def test_an_empty_store_starts_anew():
    """Upstream keeps the old base after a reset: the next video's sink is off by the length of the last one."""
    policy, one = build(SMALL, 40), build(SMALL, 40)
    list(policy.plan(call) for call, _ in plans(SMALL, 20))
    held = ()
    for first, count, phase in script(SMALL, 14):
        call = Call(first, count, phase, held)
        plan = policy.plan(call)
        assert plan == one.plan(call)
        held = tuple(sorted({*held, *plan.write} - {*plan.evict}))


def test_a_replay_leaves_the_sink_where_it_is():
    """A recache under a new prompt (LongLive's global sink) and the pass after it."""
    passes = script(SMALL, 14) + [(5, 9, "recache"), (14, 2, "noisy")]
    made = list(plans(SMALL, 16, passes=passes))
    before, replay, after = (plan for _, plan in made[-3:])
    assert replay.positions == before.positions and replay.write == before.read[4:] and replay.evict == ()
    assert after.positions[0] == before.positions[0] + 2


@pytest.mark.parametrize("options", [SMALL, replace(SMALL, hole=False), replace(SMALL, compact=True),
                                     DeepSinkOptions(7, 3, 1), DeepSinkOptions(21, 14, 3)], ids=str)
def test_keys_stand_where_the_plan_says(options):
    """Raw keys of a plain list, rotated once: keys moved twice, or not in every layer, are elsewhere."""
    frames = options.window + 7 * options.block
    for layer in range(2):
        k, v = {}, {}
        for one in play(options, frames):
            if one.layer != layer:
                continue
            for kept, new in ((k, one.k), (v, one.v)):
                kept.update(zip(one.call.span, new.unflatten(1, (-1, TOKENS)).unbind(1)))
            keys = torch.cat([k[f] for f in one.plan.read], dim=1)
            assert gap(one.keys, rotated(keys, one.plan.positions, GRID)) <= 1e-5
            assert torch.equal(one.values, torch.cat([v[f] for f in one.plan.read], dim=1))


def test_nothing_accumulates_in_bfloat16():
    """In-place rotations as published lose 3 % of the keys in 100 moves; here every move starts from the raw keys."""
    options = DeepSinkOptions(window=5, sink=2, block=1)
    seen = play(options, 120, dtype=torch.bfloat16)
    sink = torch.cat([one.k for one in seen if one.layer == 0 and one.call.first < 2 and one.call.phase == "clean"], dim=1)
    last = [one for one in seen if one.layer == 0][-1]
    assert last.plan.positions[:2] == (114, 115)
    assert gap(last.keys[:, :2 * TOKENS].float(), rotated(sink, (114, 115), GRID).float()) <= 0.02


def attended(one):
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (one.turned, one.keys, one.values)))


def test_rebased_goes_on_where_absolute_ends():
    """All distances stay, so attention does; positions stay below the limit."""
    absolute, moved = (play(replace(SMALL, **c), 40) for c in ({}, {"positions": "rebased", "limit": 12}))
    for one, other in zip(absolute, moved, strict=True):
        assert max(other.plan.positions + other.plan.query) < 12 and min(other.plan.positions) >= 0
        assert gap(attended(one), attended(other)) <= 1e-5
        assert (one.plan.positions == other.plan.positions) == (one.call.first + one.call.frames <= 12)
    with pytest.raises(ForcingError, match="'rebased', or make at most 1024"):
        build(PUBLISHED, 1025)
    assert build(replace(PUBLISHED, positions="rebased"), 3000).capacity == 21


def test_a_flush_leaves_sink_and_newest():
    now = memory(SMALL, 30)
    play(SMALL, 30, passes=script(SMALL, 14), into=now)
    now.flush(2)
    assert now.store.frames == (0, 1, 2, 3, 12, 13)
    seen = play(SMALL, 30, passes=[(14, 2, "noisy"), (14, 2, "clean"), (16, 2, "noisy")], into=now)
    assert seen[-1].plan.evict == (12,) and seen[-1].plan.positions[0] == 16 - 8


def test_keys_follow_the_need():
    assert build(PUBLISHED, 21).keys is Keys.ROPED and build(PUBLISHED, 22).keys is Keys.BOTH
    assert build(replace(PUBLISHED, compact=True), 22).keys is Keys.RAW
    assert build(PUBLISHED, 21).plan(Call(18, 3, "noisy", span(0, 17))) == build(
        WindowOptions(21, 14, 3), 21).plan(Call(18, 3, "noisy", span(0, 17)))


@pytest.mark.parametrize("options, message", [
    ({"window": None}, "needs a window"), ({"window": 16}, "at least 17 frames"),
    ({"positions": "relative"}, "absolute, rebased"), ({"positions": "rebased", "limit": 23}, "at least 24")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        DeepSinkOptions(**options)
