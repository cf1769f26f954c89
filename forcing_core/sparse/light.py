"""Light Forcing: later blocks attend to less, and to frames first, then to blocks of tokens in them.

Chunk-aware growth: the first block is dense; block i, with F latent frames up to its end, leaves out
s_i = base - beta / sqrt(F), where beta makes the mean over the video, weighted by what each block could attend to, the
wanted sparsity. Hierarchical selection, for every head and every block of queries: past frames by the product of mean
query and mean key, then blocks of keys inside those frames, the always kept ones and the current block.

Source: arXiv 2602.04789; details as in the public repo chengtao-lv/LightForcing at 06125f2. Its weights were trained with
this sparsity; on others it costs quality (paper: VBench 73.0 instead of 84.1).
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ForcingError
from .selection import Blocks, Selection, share, top
from .view import View

LONGEST = 1023  # latent frames that the growth is planned for; longer videos go on with its last value


@dataclass(frozen=True)
class LightOptions:
    """sparsity: wanted mean part of the keys that is left out; base: what late blocks tend to. keep: past latent frames that a
    block of queries may attend to, `sink` oldest and `near` newest ones among them. block: tokens chosen together.

    Defaults are those of the published short model; its long one has 0.85, 0.95, 3, 1, 1. Raises ForcingError.
    """

    sparsity: float = 0.88
    base: float = 0.98
    keep: int = 6
    sink: int = 1
    near: int = 2
    block: int = 64
    name: ClassVar[str] = "light"

    def __post_init__(self):
        if not 0 <= self.sparsity <= self.base < 1:
            raise ForcingError(f"A sparsity of {self.sparsity} with a base of {self.base} makes no sense. Use 0 <= sparsity <= "
                               "base < 1.")
        if min(self.sink, self.near) < 0 or self.keep < max(1, self.sink + self.near) or self.block < 1:
            raise ForcingError(f"keep {self.keep} with sink {self.sink}, near {self.near} and blocks of {self.block} tokens "
                               "makes no sense. Keep at least 1 frame, and sink and near ones; use blocks of 1 or more.")


@functools.lru_cache(maxsize=8)
def growth(sparsity: float, base: float, frames: int, block: int, window: int) -> tuple[float, ...]:
    """Sparsity of every block of a video, the first one 0. frames: latent frames of the video; window: in sight at most."""
    ends = [block * (i + 1) for i in range(1, -(-min(frames, LONGEST) // block))]
    seen = [min(end, window) for end in ends]
    slope = sum(n * end ** -0.5 for n, end in zip(seen, ends))
    beta = (base - sparsity) * sum(seen) / slope if ends else 0.0
    return (0.0, *(min(max(base - beta * end ** -0.5, 0.0), base) for end in ends))


def choose(options: LightOptions, view: View, q: Tensor, k: Tensor) -> Selection | None:
    """Blocks of keys for every block of queries; None, all of them, without a past."""
    past, video = view.past, view.video
    if not past:
        return None
    planned = growth(options.sparsity, options.base, video.frames, video.block, video.window)
    size = min(options.block, video.tokens)
    queries, keys = Blocks(q.shape[1], size, video.tokens), Blocks(k.shape[1], size, video.tokens)
    scores = queries.mean(q) @ keys.mean(k).transpose(2, 3)
    count = share(keys.count, 1 - planned[min(view.chunk, len(planned) - 1)])
    if len(past) <= options.keep:
        return Selection(queries, keys, top(scores, count))
    frame = torch.arange(keys.count, device=q.device) // keys.per
    eligible = _frames(options, past, len(view.frames), scores, frame)[..., frame]
    return Selection(queries, keys, top(scores.masked_fill(~eligible, -torch.inf), count) & eligible)


def _frames(options: LightOptions, past: tuple[int, ...], count: int, scores: Tensor, frame: Tensor) -> Tensor:
    """bool [B, H, Q, frames]: which frames a block of queries may attend to. The current block is never left out."""
    end = len(past) - options.near
    middle = list(past[options.sink:end])
    total = scores.new_zeros(*scores.shape[:3], count).index_add_(3, frame, scores)
    mean = total / frame.bincount(minlength=count)
    allowed = torch.ones_like(mean, dtype=torch.bool)
    allowed[..., middle] = top(mean[..., middle], options.keep - options.sink - options.near)
    return allowed
