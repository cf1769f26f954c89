"""Two passes in one forward: the clean pass of a block and the first noisy pass of the next one.

The weights are read once for both, which counts where they are streamed to the device or a forward is small. Nothing is
masked: layer by layer, the clean half writes its keys and attends, then the noisy half does, which finds those keys as it
would have found them behind a forward of their own. Everything else in a layer is done token by token. So the numbers are
those of two forwards, but for the rounding of matrix products with more rows.
"""
from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from .memory import Memory
from .passes import Pass
from .schedule import Level
from .store import Store


class Frames(NamedTuple):
    """What one pass works on: x [B, C, F, H, W], a level for every frame, and the number of the first one."""

    x: Tensor
    levels: Sequence[Level]
    first: int


class Joined:
    """The pass of such a forward, whose first `leading` frames are those of the clean half. In the last layer their keys
    and values are all that is wanted, so from there on the forward goes without them."""

    silent = False

    def __init__(self, clean: Pass, noisy: Pass):
        self.clean, self.noisy = clean, noisy
        self.leading, self.layers = clean.call.frames, clean.store.layers
        self._tokens = self.leading * clean.store.frame_tokens

    def exchange(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As they are: the halves meet memory one after the other, in `attend`."""
        return q, k, v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """q without the clean half in the last layer."""
        n = self._tokens
        if layer == self.layers - 1:
            self.clean.exchange(layer, None, k[:, :n], v[:, :n])
            return attention(*self.noisy.exchange(layer, q, k[:, n:], v[:, n:]))
        done = attention(*self.clean.exchange(layer, q[:, :n], k[:, :n], v[:, :n]))
        return torch.cat([done, attention(*self.noisy.exchange(layer, q[:, n:], k[:, n:], v[:, n:]))], dim=1)


def can_join(memory: Memory) -> bool:
    """Whether passes of this memory can share a forward: those with plain, dense passes over a plain store that holds the
    block already. Others look at keys or change them."""
    plain = type(memory.store) is Store and not hasattr(memory.policy, "make_pass") and not memory.ahead
    return plain and memory.sparse is None and bool(memory.store.frames)


def join(memory: Memory, clean: Frames, noisy: Frames) -> Joined:
    """Begin both passes at once. Planning the second one must not change what the first one finds."""
    first = memory.begin(clean.first, len(clean.levels), "clean", max(level.sigma for level in clean.levels))
    first.store = memory.store.held()
    memory.store.settle(first.plan)
    return Joined(first, memory.begin(noisy.first, len(noisy.levels), "noisy", max(level.sigma for level in noisy.levels)))
