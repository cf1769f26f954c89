"""Videos without an end: the same blocks and windows as those of long ones, none of them laid out."""
import itertools
from dataclasses import fields

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import KINDS, build
from forcing_pack.forcing_core.rollout import ROLLOUTS
from forcing_pack.forcing_core.rollout.windows import each_window, windows
from forcing_pack.forcing_core.schedule import Level
from forcing_pack.forcing_core.streaming import ENDLESS, EndlessBlocks
from hypothesis import given
from hypothesis import strategies as st

LEVELS = (Level(1000.0, 1.0), Level(750.0, 0.75), Level(500.0, 0.5))


@given(st.integers(1, 5), st.integers(0, 7), st.booleans())
def test_blocks_are_those_of_a_long_video(block, given, alone):
    endless = EndlessBlocks(block, given, alone)
    head = 1 if alone and not given else 0
    wanted = layout(head + 9 * block, block, given=given, independent_first=alone)
    assert endless[:len(wanted)] == wanted == tuple(itertools.islice(endless, len(wanted)))
    assert endless[3:5] == wanted[3:5] and endless[-1].end <= ENDLESS < endless[-1].end + block


def test_blocks_end_somewhere():
    with pytest.raises(IndexError):
        EndlessBlocks(3)[ENDLESS]


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_windows_come_one_at_a_time_from_anywhere(blocks, steps, data):
    first = data.draw(st.integers(0, blocks + steps))
    assert tuple(each_window(blocks, steps, first)) == windows(blocks, steps)[first:]


@pytest.mark.parametrize("rollout", ["block", "rolling"])
def test_rollouts_begin_without_counting_the_blocks(rollout):
    """The first blocks are those of a long video; nothing waits for the last one."""
    def denoiser(x, levels, first, phase):
        return 0.5 * x + first

    def begin(blocks):
        noise = BlockNoise(3, (1, 2), (2, 2))
        return [*itertools.islice(ROLLOUTS[rollout](denoiser, blocks, LEVELS, noise, block=2), 4)]

    made, wanted = begin(EndlessBlocks(2)), begin(layout(40, 2))
    assert [block for block, _ in made] == [block for block, _ in wanted]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(made, wanted))


def options(kind):
    """Of a policy that forgets: bounded by a window, positions counted from somewhere near."""
    names = {field.name for field in fields(KINDS[kind][0])}
    return KINDS[kind][0](**{name: value for name, value in {"window": 21, "positions": "rebased"}.items() if name in names})


@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_is_as_long_as_the_video(kind):
    assert build(options(kind), ENDLESS).capacity <= 120  # the reservoir of Relax Forcing


def test_a_memory_without_a_window_is_refused():
    with pytest.raises(ForcingError, match="Set a window"):
        build(KINDS["window"][0](), ENDLESS)
