"""Rolling Sink against the published order of what comes back, and against frames kept by hand."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import can_flush
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.plan_view import simulate, title
from forcing_pack.forcing_core.policies import RollingSinkOptions, WindowOptions, build
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.saved import Saved, split
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.passkit import GRID, HEAD_DIM, HEADS, TOKENS, memory, play
from forcing_testkit.policykit import video

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = RollingSinkOptions(window=9, block=3)


def published(start, window, block):
    """Originals that overwrite the block before `start`, by the released rule for whole blocks."""
    now, period = start - block, window - block
    if (now // period) % 2 == 0:
        left = now % period
        return list(range(left, left + block))
    right = period - now % period
    return list(range(right - block, right))[::-1]


def test_the_published_order():
    options = RollingSinkOptions()
    order = [[options.original(f) for f in range(s - 3, s)] for s in range(21, 60, 3)]
    assert order[:2] == [[17, 16, 15], [14, 13, 12]] and order[5:7] == [[2, 1, 0], [0, 1, 2]]
    assert order[11:] == [[15, 16, 17], [17, 16, 15]]
    for window, block in ((21, 3), (9, 3), (8, 2), (5, 1)):
        options = RollingSinkOptions(window, block)
        for start in range(window, 9 * window, block):
            if window % block == 0:
                assert [options.original(f) for f in range(start - block, start)] == published(start, window, block)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_every_pass_sees(batch):
    """The block before as it was made, older ones as the beginning at their own positions. Content that is taken from a
    noisy pass, replaced a block early or late, or left at the beginning's positions, gives other numbers."""
    content, final, first_block = {}, {}, 0
    for one in play(SMALL, 36, batch=batch):
        if one.layer != 0:  # of the last layer the network reads nothing in a clean pass
            continue
        span = one.call.span
        parts = zip(span, one.k.split(TOKENS, 1), one.v.split(TOKENS, 1))
        content.update({f: (k, v) for f, k, v in parts})
        frames = one.plan.read
        assert frames == tuple(range(max(0, span[-1] - 8), span[-1] + 1)) == one.plan.positions
        keys, values = (torch.cat([content[f][i] for f in frames], dim=1) for i in range(2))
        assert torch.equal(one.values, values) and gap(one.keys, rotated(keys, frames, GRID)) <= 1e-5
        if one.call.phase == "clean":
            final.update({f: content[f] for f in span})
            if span[0] >= SMALL.window:
                for f, source in zip(range(span[0] - 3, span[0]), published(span[0], 9, 3)):
                    content[f] = final[source]
                    first_block = first_block or span[0]
    assert first_block == 9


def test_a_video_leaves_the_plain_window_when_the_first_frames_come_back():
    """Block 9-11 is the first behind a full window; what its clean pass brings back, block 12-14 is the first to see."""
    plain, rolled = video(WindowOptions(9, 0, 3), 18), video(SMALL, 18)
    assert torch.equal(rolled[:, :, :12], plain[:, :, :12]) and gap(rolled[:, :, 12:], plain[:, :, 12:]) > 1e-3
    assert torch.equal(video(SMALL, 12), plain[:, :, :12])


def test_short_videos_keep_no_beginning():
    assert build(SMALL, 12).make_store(2, 9, TOKENS, None).period == 0
    sizes = {"layers": 2, "frame_tokens": TOKENS, "dim": 256, "batch": 1, "element_size": 4}
    short, long = (build(SMALL, frames).store_bytes(**sizes) for frames in (12, 13))
    assert short == 2 * 2 * 9 * TOKENS * 256 * 4 and long == short + 2 * 2 * 6 * TOKENS * 256 * 4


def test_a_new_scene_brings_back_its_own_beginning():
    later = [(first, 3, phase) for first in range(60, 87, 3) for phase in ("noisy", "clean")]
    used = memory(SMALL, 90)
    play(SMALL, 90, into=used, passes=[(first, 3, phase) for first in range(0, 24, 3) for phase in ("noisy", "clean")])
    used.forget()
    fresh = play(SMALL, 90, seed=1, passes=later)
    again = play(SMALL, 90, seed=1, passes=later, into=used)
    assert all(torch.equal(a.values, b.values) and torch.equal(a.keys, b.keys) for a, b in zip(fresh, again))
    blocks = [one for one in fresh if one.layer == 0 and one.call.phase == "clean"]
    assert blocks[1].call.span == (63, 64, 65) and blocks[4].plan.read[:3] == (66, 67, 68)
    assert torch.equal(blocks[4].values[:, :3 * TOKENS], torch.cat(blocks[1].v.split(TOKENS, 1)[::-1], dim=1))


def test_a_saved_memory_brings_back_the_same():
    passes = [(first, 3, phase) for first in range(0, 36, 3) for phase in ("noisy", "clean")]
    whole, begun, loaded = memory(SMALL, 36), memory(SMALL, 36), memory(SMALL, 36)
    play(SMALL, 36, passes=passes[:12], into=whole)
    play(SMALL, 36, passes=passes[:12], into=begun)
    loaded.load(Saved(*split(begun.state())), torch.empty(1, 0, HEADS, HEAD_DIM))
    for a, b in zip(play(SMALL, 36, passes=passes[12:], seed=1, into=whole),
                    play(SMALL, 36, passes=passes[12:], seed=1, into=loaded)):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_length_preset_and_what_makes_no_sense():
    assert cache_of(get("rolling-sink")) == RollingSinkOptions()
    table = simulate(RollingSinkOptions(), 2400)
    assert table.rows[-1].positions[-1] == 2399 and max(table.rows[-1].read) < 2400 and "2400" in title(table)
    with pytest.raises(ForcingError, match="cannot be flushed"):
        can_flush(build(SMALL, 30))
    for wrong in ({"window": 5}, {"window": None}, {"block": 0}):
        with pytest.raises(ForcingError, match="Use a window of at least"):
            RollingSinkOptions(**wrong)
