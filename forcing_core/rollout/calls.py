"""Which forwards a rollout makes, in order, without making them: for progress bars, plan views and reservations."""
from __future__ import annotations

from typing import Callable, Iterator, Sequence

from ..plan import Block, Call, context_chunks, layout
from .windows import windows


def _block(blocks: Sequence[Block], steps: int, first_steps: int) -> Iterator[Call]:
    for block in blocks:
        for _ in range(first_steps if block.index == 0 else steps):
            yield Call(block.first, block.frames, "noisy")
        if block is not blocks[-1]:
            yield Call(block.first, block.frames, "clean")


def _rolling(blocks: Sequence[Block], steps: int, first_steps: int) -> Iterator[Call]:
    for window in windows(len(blocks), steps):
        oldest, newest = blocks[window.start], blocks[window.end - 1]
        yield Call(oldest.first, newest.end - oldest.first, "noisy")
        if window.final and oldest is not blocks[-1]:
            yield Call(oldest.first, oldest.frames, "clean")


# name of a rollout, a key of ROLLOUTS -> its calls after the given frames
CALLS: dict[str, Callable[[Sequence[Block], int, int], Iterator[Call]]] = {"block": _block, "rolling": _rolling}


def calls(name: str, blocks: Sequence[Block], steps: int, *, first_steps: int | None = None, given: int = 0,
          block: int = 3, independent_first: bool = False) -> Iterator[Call]:
    """Every forward of the rollout called `name` without prompt switches, as calls that hold nothing yet.

    steps: denoising steps of a block; first_steps: of the first generated one. given: given frames, written in
    chunks of `block`.
    """
    for first, frames in context_chunks(given, block, independent_first):
        yield Call(first, frames, "clean")
    yield from CALLS[name](blocks, steps, first_steps or steps)


def most_frames(name: str, block: int, steps: int) -> int:
    """Most latent frames of one forward: of a video with enough blocks."""
    return max(call.frames for call in calls(name, layout(block * steps, block), steps))
