"""Which forwards a rollout makes, in order, without making them: for progress bars, plan views and reservations."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Iterator, Sequence

from ..plan import REFERENCE, Block, Call, context_chunks, layout
from .recompute import replayed
from .windows import windows


@dataclass(frozen=True)
class _Order:
    """What the order of forwards depends on. given: (first, frames) of the chunks that given frames are written in. ahead,
    references, over: latent frames of a knot and of a reference, and the rollout that they were added to."""

    blocks: Sequence[Block]
    steps: int
    first_steps: int
    given: tuple[tuple[int, int], ...]
    block: int
    window: int | None
    ahead: int = 0
    references: int = 0
    over: str = "block"

    def noisy(self, block: Block) -> Iterator[Call]:
        for _ in range(self.first_steps if block.index == 0 else self.steps):
            yield Call(block.first, block.frames, "noisy")


def _given(order: _Order) -> Iterator[Call]:
    for first, frames in order.given:
        yield Call(first, frames, "clean")


def _block(order: _Order) -> Iterator[Call]:
    yield from _given(order)
    for block in order.blocks:
        yield from order.noisy(block)
        if block is not order.blocks[-1]:
            yield Call(block.first, block.frames, "clean")


def _per_step(order: _Order) -> Iterator[Call]:
    yield from _given(order)
    for block in order.blocks:
        yield from order.noisy(block)


def _recompute(order: _Order) -> Iterator[Call]:
    for block in order.blocks:
        for first, frames in replayed(block, order.window, order.block):
            yield Call(first, frames, "clean")
        yield from order.noisy(block)


def _rolling(order: _Order) -> Iterator[Call]:
    yield from _given(order)
    blocks = order.blocks
    for window in windows(len(blocks), order.steps):
        oldest, newest = blocks[window.start], blocks[window.end - 1]
        yield Call(oldest.first, newest.end - oldest.first, "noisy")
        if window.final and oldest is not blocks[-1]:
            yield Call(oldest.first, oldest.frames, "clean")


def _knot(order: _Order) -> Iterator[Call]:
    if order.references:
        yield Call(REFERENCE, order.references, "clean")
    for call in CALLS[order.over](order):
        yield replace(call, frames=call.frames + order.ahead) if call.phase == "noisy" else call


# name of a rollout, a key of ROLLOUTS -> its calls after the given frames
CALLS: dict[str, Callable[[_Order], Iterator[Call]]] = {
    "block": _block, "rolling": _rolling, "recompute": _recompute, "knot": _knot, "per_step": _per_step}


def calls(name: str, blocks: Sequence[Block], steps: int, *, first_steps: int | None = None, given: int = 0,
          block: int = 3, independent_first: bool = False, window: int | None = None, ahead: int = 0, references: int = 0,
          over: str = "block") -> Iterator[Call]:
    """Every forward of the rollout called `name` without prompt switches, as calls that hold nothing yet.

    steps: denoising steps of a block; first_steps: of the first generated one. given: given frames, written in
    chunks of `block`. window: of the memory, None for all; it sets how much a rollout recomputes.
    ahead, references, over: of the knot rollout, whose forwards hold the knot too.
    """
    yield from CALLS[name](_Order(blocks, steps, first_steps or steps, context_chunks(given, block, independent_first),
                                  block, window, ahead, references, over))


def most_frames(name: str, block: int, steps: int, **more) -> int:
    """Most latent frames of one forward: of a video with enough blocks. more: as for `calls`."""
    return max(call.frames for call in calls(name, layout(block * steps, block), steps, **more))
