"""The window schedule of Rolling Forcing: every block meets every level once, in order, whatever the length."""
import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.rollout.windows import Window, of_phase, single_windows, windows
from hypothesis import given
from hypothesis import strategies as st

BLOCKS, STEPS = st.integers(1, 14), st.integers(1, 7)
SCHEDULES = st.sampled_from([windows, single_windows])


def levels_of_blocks(schedule):
    """block -> the levels it meets, in the order of the windows."""
    seen = {}
    for window in schedule:
        assert len(window.levels) == window.end - window.start
        for block, level in zip(window.blocks, window.levels):
            seen.setdefault(block, []).append(level)
    return seen


@given(SCHEDULES, BLOCKS, STEPS)
def test_every_block_passes_every_level_once_in_order(make, blocks, steps):
    """Also with fewer blocks than steps, where the published loop injects fresh noise again and again."""
    assert levels_of_blocks(make(blocks, steps)) == {block: list(range(steps)) for block in range(blocks)}


@given(SCHEDULES, BLOCKS, STEPS)
def test_blocks_become_final_one_by_one_and_in_order(make, blocks, steps):
    schedule = make(blocks, steps)
    assert [window.start for window in schedule if window.final] == list(range(blocks))
    for window in schedule:
        assert (steps - 1 in window.levels) == window.final
    assert [window.index for window in schedule] == list(range(len(schedule)))


@given(BLOCKS, STEPS)
def test_a_rolling_window_is_as_long_as_it_can_be(blocks, steps):
    """At most as many blocks as steps, neighbours one level apart, the oldest cleanest; all that fit are in it."""
    schedule = windows(blocks, steps)
    assert len(schedule) == blocks + steps - 1
    assert max(window.end - window.start for window in schedule) == min(blocks, steps)
    for window in schedule:
        assert all(a - b == 1 for a, b in zip(window.levels, window.levels[1:]))
        assert window.end == blocks or window.levels[-1] == 0
        assert window.start == 0 or window.final


@given(SCHEDULES, BLOCKS, STEPS, st.data())
def test_the_windows_of_a_phase_hold_every_block_exactly_once(make, blocks, steps, data):
    phase = data.draw(st.integers(0, steps - 1))
    chosen = of_phase(make(blocks, steps), steps, phase)
    assert [block for window in chosen for block in window.blocks] == list(range(blocks))
    assert {window.index % steps for window in chosen} == {phase}


def test_the_published_schedule():
    """Seven blocks in five steps, written out: warm-up, steady, cool-down."""
    assert [(w.start, w.end, w.levels) for w in windows(7, 5)] == [
        (0, 1, (0,)), (0, 2, (1, 0)), (0, 3, (2, 1, 0)), (0, 4, (3, 2, 1, 0)), (0, 5, (4, 3, 2, 1, 0)),
        (1, 6, (4, 3, 2, 1, 0)), (2, 7, (4, 3, 2, 1, 0)),
        (3, 7, (4, 3, 2, 1)), (4, 7, (4, 3, 2)), (5, 7, (4, 3)), (6, 7, (4,))]


def test_fewer_blocks_than_steps():
    assert windows(2, 4) == (Window(0, 0, 1, (0,), False), Window(1, 0, 2, (1, 0), False),
                             Window(2, 0, 2, (2, 1), False), Window(3, 0, 2, (3, 2), True),
                             Window(4, 1, 2, (3,), True))


@pytest.mark.parametrize("call", [lambda: windows(0, 4), lambda: windows(3, 0), lambda: single_windows(0, 1),
                                  lambda: of_phase(windows(3, 2), 2, 2), lambda: of_phase(windows(3, 2), 2, -1)])
def test_what_cannot_be_scheduled(call):
    with pytest.raises(ForcingError, match="Use"):
        call()
