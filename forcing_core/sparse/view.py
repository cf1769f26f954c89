"""What a sparse method is told of the attention that it chooses for. Numbers are Python's; frames are source frames."""
from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..plan import REFERENCE, Call


@dataclass(frozen=True)
class Video:
    """Sizes that stay. frames: latent frames of the whole video; block: of a block; window: that a pass may attend to at
    most; tokens: of a latent frame; layers: of the store."""

    frames: int
    block: int
    window: int
    tokens: int
    layers: int


@dataclass
class Heads:
    """What is known of the heads of a network (Dummy Forcing). mass: layer -> [H, 3] float32, measured so far. kinds: kind of
    every head of every layer, once they were compared."""

    mass: dict[int, Tensor] = field(default_factory=dict)
    kinds: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class View:
    """One layer of one pass. frames: source frame of every run of `video.tokens` keys, in their order; own: those of the call
    among them. step: noisy passes over this block before this one; None where blocks are denoised together, or behind the
    last step. heads: of this memory."""

    video: Video
    call: Call
    layer: int
    step: int | None
    frames: tuple[int, ...]
    own: frozenset[int]
    heads: Heads

    @property
    def past(self) -> tuple[int, ...]:
        """Places of the past frames among the keys, oldest first; a reference counts as older than anything."""
        places = [i for i, frame in enumerate(self.frames) if frame not in self.own]
        return tuple(sorted(places, key=lambda i: -1 if self.frames[i] >= REFERENCE else self.frames[i]))

    @property
    def chunk(self) -> int:
        """Number of the block, counted in whole blocks from the first frame of the video on."""
        end = self.call.first + self.call.frames - (self.call.ahead if self.call.phase == "noisy" else 0)
        return max(0, -(-end // self.video.block) - 1)


def places(keys: int, tokens: int, queries: int, order: tuple[int, ...] | None, span: tuple[int, ...]):
    """(frames, own) of `View`, for so many keys. order: source frames as the pass lays their keys, if it lays whole frames.
    A memory that holds tokens or packs what it chose has its newest keys last, which are the call's own."""
    if order is not None and len(order) * tokens == keys:
        return tuple(order), frozenset(order) & frozenset(span)
    count = -(-keys // tokens)
    return tuple(range(count)), frozenset(range(count)[-min(count, -(-queries // tokens)):])
