"""Merged tokens against the softmax over all that they stand for, and the rules of who joins whom."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.group_store import Groups
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.policies import MergingOptions, WindowOptions
from forcing_pack.forcing_core.presets import get
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.policykit import attended, softmax_attention, video

pytestmark = pytest.mark.usefixtures("one_thread")
GRID, TOKENS, HEADS = (2, 3), 6, 2


def drive(options, frames, key_of):
    """Write `frames` frames one by one, with random keys in their noisy pass; then a noisy pass over a block.

    key_of: frame -> clean raw key [B, tokens, H, 128]. Returns (output, q, [(k, v)] of all frames, the pass)."""
    held = make_memory(options, frames + options.block, layers=1, grid=GRID, head_dim=128, device="cpu")
    draw, past = torch.Generator().manual_seed(5), []
    for frame in range(frames):
        for phase in ("noisy", "clean"):
            q, k, v = torch.randn(3, *key_of(0).shape, generator=draw)
            k = key_of(frame) if phase == "clean" else k
            attended(held.begin(frame, 1, phase), 0, q, k, v)
        past.append((k, v))
    q, k, v = torch.randn(3, len(k), options.block * TOKENS, HEADS, 128, generator=draw)
    now = held.begin(frames, options.block, "noisy")
    past += list(zip(k.split(TOKENS, 1), v.split(TOKENS, 1)))
    return attended(now, 0, q, k, v), q, past, now


def random_key(frame, batch=1):
    return torch.randn(batch, TOKENS, HEADS, 128, generator=torch.Generator().manual_seed(frame))


@pytest.mark.parametrize("frames", [6, 9, 30])
def test_repeated_frames_equal_dense_attention(frames):
    """Duplicates merge without loss: a forgotten log m, a mean of keys, a sum of values, a group's first position
    instead of its last, or a frame counted twice give other numbers. Merged frames stand where the last of them does."""
    options = MergingOptions(sink=1, recent=2, block=2)
    out, q, past, now = drive(options, frames, lambda frame: random_key(0 if 0 < frame else 99))
    gone = range(1, frames - 2)
    places = [gone[-1] if f in gone else f for f in range(frames + 2)]
    keys, values = (torch.cat([pair[i] for pair in past], dim=1) for i in range(2))
    dense = softmax_attention(rotated(q, places[-2:], GRID), rotated(keys, places, GRID), values)
    assert gap(out, dense) <= 1e-5
    assert now.store.groups[0].used == [TOKENS] and float(now.store.groups[0].members.max()) == len(gone)


@pytest.mark.parametrize("tau", [0.9, 1.1])
def test_without_redundancy_it_is_dense_attention(tau):
    """Nothing resembles anything: every token stays, at its own place."""
    options = MergingOptions(tau=tau, sink=1, recent=1, block=2)
    out, q, past, _ = drive(options, 9, lambda frame: random_key(frame, 2))
    keys, values = (torch.cat([pair[i] for pair in past], dim=1) for i in range(2))
    dense = softmax_attention(rotated(q, (9, 10), GRID), rotated(keys, range(11), GRID), values)
    assert gap(out, dense) <= 1e-5


def test_a_video_that_merges_nothing_is_the_dense_video():
    dense = video(WindowOptions(None, 0, 3), 18)
    assert gap(video(MergingOptions(tau=1.1, recent=2), 18), dense) <= 1e-5
    assert gap(video(MergingOptions(tau=-1.1, recent=2), 18), dense) > 1e-3


def test_noisy_keys_are_never_merged():
    """Groups hold the keys of clean passes, and only a first forward of a block changes them."""
    options = MergingOptions(tau=1.1, sink=1, recent=1, block=1)
    *_, past, now = drive(options, 8, random_key)
    groups = now.store.groups[0]
    assert torch.equal(groups.at(slice(groups.used[0])), torch.cat([k for k, _ in past[1:7]], dim=1))
    assert groups.last[0, :groups.used[0]].tolist() == [f for f in range(1, 7) for _ in range(TOKENS)]


# -- who joins whom: one row of five tokens, keys along axes --------------------------------------------------

def axis_keys(*axes):
    """[1, len(axes), 1, 8]: token i points along axis axes[i]; a pair (a, b) mostly along a."""
    keys = torch.zeros(1, len(axes), 1, 8)
    for i, axis in enumerate(axes):
        main, other = axis if isinstance(axis, tuple) else (axis, axis)
        keys[0, i, 0, other] += 0.4
        keys[0, i, 0, main] += 1.0
    return keys


def merged(options, *frames, size=15):
    groups = Groups.empty(size, axis_keys(0))
    for frame, axes in enumerate(frames):
        values = torch.arange(len(axes), dtype=torch.float32)[None, :, None, None].expand(1, -1, 1, 8) + 10 * frame
        groups.add(frame, axis_keys(*axes), values, options, columns=5)
    return groups


def listed(groups):
    """[(axis of the key, members, last frame, cell, mean value)] of all groups."""
    n = groups.used[0]
    mean = groups.values[0, :n, 0, 0] / groups.members[0, :n]
    rows = (groups.at(slice(n))[0, :, 0].argmax(-1), groups.members[0, :n], groups.last[0, :n], groups.cells[0, :n], mean)
    return list(zip(*(row.tolist() for row in rows)))


def test_tokens_join_their_like_nearby():
    """One step aside within the radius, two steps not; the latest key and place, the mean value."""
    groups = merged(MergingOptions(), (0, 1, 2, 3, 4), (1, 0, 5, 4, 6))
    assert listed(groups) == [(0, 2, 1, 1, 5.5), (1, 2, 1, 0, 5.5), (2, 1, 0, 2, 2), (3, 1, 0, 3, 3), (4, 2, 1, 3, 8.5),
                              (5, 1, 1, 2, 12), (6, 1, 1, 4, 14)]
    far = merged(MergingOptions(), (0, 1, 2, 3, 4), (2, 6, 0, 5, 7))
    assert [row[1] for row in listed(far)] == [1] * 10


def test_of_several_that_join_the_last_leaves_its_key():
    groups = merged(MergingOptions(), (0, 1, 2, 3, 4), ((1, 5), (1, 6), (1, 7), 5, 6))
    assert listed(groups)[1] == (1, 4, 1, 2, (1 + 10 + 11 + 12) / 4)
    assert float(groups.at(slice(2))[0, 1, 0, 7]) > 0 == float(groups.at(slice(2))[0, 1, 0, 5])


def test_the_threshold():
    """(1, 5) lies at a cosine of 0.93 to 1."""
    counts = [merged(MergingOptions(tau=tau), (0, 1, 2, 3, 4), (0, (1, 5), 2, 3, 4)).used for tau in (0.92, 0.94)]
    assert counts == [[5], [6]]


def test_rows_count_as_well_as_columns():
    options, keys = MergingOptions(), axis_keys(0, 1, 2, 3, 4, 5)
    for columns, joined in ((2, 2), (3, 2), (6, 1)):  # axis 0 comes back at cell 3: one row down, one column aside
        groups = Groups.empty(12, keys)
        groups.add(0, keys, keys, options, columns)
        groups.add(1, axis_keys(1, 6, 7, 0, 6, 7), keys, options, columns)
        assert float(groups.members[0, 0]) == joined, columns


def test_the_budget():
    """Full: the groups with the fewest members for the time since the last one joined make room, the newest frame
    always stays."""
    options = MergingOptions(tau=0.95, radius=9)
    groups = merged(options, (0, 1, 2, 3, 4), (0, 1, 5, 6, 7), (0, 0, 0, 1, 1), ((3, 0), (4, 0), (5, 0), (6, 0), (7, 0)),
                    size=8)
    # before frame 3: 5 / 2, 4 / 2, three of 1 / 4 and three of 1 / 3
    assert [row[:2] for row in listed(groups)] == [(0, 5), (1, 4), (5, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1)]
    tight = merged(options, (0, 1, 2, 3, 4), (5, 5, 6, 6, 7), size=5)
    assert [row[2] for row in listed(tight)] == [1] * 5


def test_groups_slide_below_the_limit_but_not_under_the_sink():
    """Past the last position everything but the sink slides; groups that would fall below it stay right behind it."""
    options = MergingOptions(tau=1.1, sink=1, recent=1, block=1, limit=6)
    out, q, past, _ = drive(options, 12, random_key)
    places = [0] + [max(1, f - 7) for f in range(1, 13)]
    keys, values = (torch.cat([pair[i] for pair in past], dim=1) for i in range(2))
    assert gap(out, softmax_attention(rotated(q, [5], GRID), rotated(keys, places, GRID), values)) <= 1e-5


def test_forgetting_and_flushing_take_the_groups_along():
    for forget in (lambda held: held.forget(), lambda held: held.flush(2)):
        options = MergingOptions(sink=1, recent=1, block=1)
        held = make_memory(options, 20, layers=1, grid=GRID, head_dim=128, device="cpu")
        for frame in range(8):
            q, k, v = torch.randn(3, 1, TOKENS, HEADS, 128, generator=torch.Generator().manual_seed(frame))
            attended(held.begin(frame, 1, "clean"), 0, q, k, v)
        assert held.store.groups[0].used != [0]
        forget(held)
        assert held.store.groups[0].used == [0]


def test_the_preset():
    options = cache_of(get("tempcache"))
    assert (options.tau, options.sink, options.window) == (0.9, 1, 7) and get("tempcache").available


@pytest.mark.parametrize("options, message", [
    ({"recent": -1}, "make no sense"), ({"radius": -1}, "make no sense"), ({"budget": 0}, "make no sense"),
    ({"limit": 6}, "limit of at least 7")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        MergingOptions(**options)
