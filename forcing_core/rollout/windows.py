"""Which blocks are denoised together, and how noisy each of them is then. Integers only.

Level 0 is the noisiest; a block is final once it passed level `steps - 1`. Source: arXiv 2509.25161 (Rolling
Forcing): a window of as many blocks as there are steps slides by one block, the oldest block being the cleanest.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Sequence

from ..errors import ForcingError


@dataclass(frozen=True)
class Window:
    """Blocks start..end-1 in one forward; `levels` holds the level index of each.

    final: its first block is final afterwards. No other block can be.
    """

    index: int
    start: int
    end: int
    levels: tuple[int, ...]
    final: bool

    @property
    def blocks(self) -> range:
        return range(self.start, self.end)


def windows(blocks: int, steps: int) -> tuple[Window, ...]:
    """The rolling schedule: warm-up, steady and cool-down windows, `blocks + steps - 1` in all.

    Block b is at level w - b in window w. Correct for fewer blocks than steps too, where the published code is not.
    """
    return tuple(each_window(blocks, steps))


def each_window(blocks: int, steps: int, first: int = 0) -> Iterator[Window]:
    """`windows` from the one of index `first` on, one at a time: for videos without an end."""
    _check(blocks, steps)
    for index in range(first, blocks + steps - 1):
        start, end = max(0, index - steps + 1), min(blocks, index + 1)
        levels = tuple(index - block for block in range(start, end))
        yield Window(index, start, end, levels, levels[0] == steps - 1)


def single_windows(blocks: int, steps: int) -> tuple[Window, ...]:
    """The plain block rollout in the same terms: every block alone through all levels, `blocks * steps` windows."""
    _check(blocks, steps)
    return tuple(Window(block * steps + level, block, block + 1, (level,), level == steps - 1)
                 for block in range(blocks) for level in range(steps))


def of_phase(schedule: Sequence[Window], steps: int, phase: int) -> tuple[Window, ...]:
    """The windows w with w mod steps == phase. They do not overlap and hold every block exactly once, in both
    schedules."""
    if not 0 <= phase < steps:
        raise ForcingError(f"Phase {phase} does not exist with {steps} steps. Use 0 to {steps - 1}.")
    return tuple(window for window in schedule if window.index % steps == phase)


def _check(blocks: int, steps: int) -> None:
    if blocks < 1 or steps < 1:
        raise ForcingError(f"{blocks} blocks in {steps} steps cannot be scheduled. Use at least one of each.")
