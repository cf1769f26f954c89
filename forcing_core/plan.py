"""Plain data between a rollout, a policy and a pass. Numbers are Python's; frames are latent frames."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ForcingError

Phase = Literal["noisy", "clean", "recache"]
REFERENCE = 1 << 39  # number of a reference's first latent frame: outside of any video, and never forgotten


@dataclass(frozen=True)
class Block:
    """Latent frames denoised together: `index` counts generated blocks from 0, `first` is a frame number."""

    index: int
    first: int
    frames: int

    @property
    def end(self) -> int:
        return self.first + self.frames


@dataclass(frozen=True)
class Call:
    """One forward of the network, before anyone decided what it may see.

    first, frames: the latent frames of the call. phase: "noisy" (a denoising step), "clean" (the forward that
    leaves the final keys and values), "recache" (clean frames replayed under a new prompt).
    held: source frames the store holds now, in temporal order. A call is the first of its block exactly when
    its frames are not held yet, so nobody needs a step number. sigma: noise level (0..1) of its noisiest frame.
    ahead: frames behind those of the block that its noisy passes also hold (the knot), not counted in `frames`.
    """

    first: int
    frames: int
    phase: Phase
    held: tuple[int, ...] = ()
    sigma: float = 0.0
    ahead: int = 0

    @property
    def span(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + self.frames))


@dataclass(frozen=True)
class Plan:
    """What one forward reads and writes. All numbers are source frames, except positions.

    evict: held frames dropped before anything is written.
    write: frames of the call whose keys and values are kept (a recache may keep fewer than it computes).
    read: stored frames attended to, after writing, in temporal order; `positions` are their temporal
    RoPE positions. query: temporal position of every frame of the call. own: frames of the call attended to at
    their query positions without being stored (a joint pass over frames that are not final yet).
    """

    evict: tuple[int, ...]
    write: tuple[int, ...]
    read: tuple[int, ...]
    positions: tuple[int, ...]
    query: tuple[int, ...]
    own: tuple[int, ...] = ()


def layout(frames: int, block: int, *, given: int = 0, independent_first: bool = False,
           allow_tail: bool = True) -> tuple[Block, ...]:
    """Split `frames` latent frames to be generated into blocks that follow `given` frames.

    independent_first: the very first frame of the video is a block of its own (models trained with
    [1, f, f, ...]); with given frames it has been given. A shorter last block is allowed unless
    allow_tail is False, which raises ForcingError naming the two nearest legal counts.
    """
    if frames < 1:
        raise ForcingError(f"There is nothing to generate: {frames} new latent frames were asked for. "
                           "Ask for at least 1 more frame than the given ones.")
    head = 1 if independent_first and given == 0 else 0
    tail = (frames - head) % block
    if tail and not allow_tail:
        lower, upper = frames - tail, frames - tail + block
        near = f"{upper}" if lower < 1 else f"{lower} or {upper}"
        raise ForcingError(f"{frames} new latent frames do not divide into blocks of {block}. Use {near} instead.")
    sizes = [head] * bool(head) + [block] * ((frames - head) // block) + [tail] * bool(tail)
    blocks, first = [], given
    for index, size in enumerate(sizes):
        blocks.append(Block(index, first, size))
        first += size
    return tuple(blocks)


def context_chunks(given: int, block: int, independent_first: bool = False) -> tuple[tuple[int, int], ...]:
    """(first, frames) of the clean passes that write `given` frames into the store before generation."""
    edges = [0, 1] if independent_first and given else [0]
    while edges[-1] < given:
        edges.append(min(edges[-1] + block, given))
    return tuple((a, b - a) for a, b in zip(edges, edges[1:]))
