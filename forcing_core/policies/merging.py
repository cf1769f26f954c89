"""TempCache: tokens that leave the window are merged with the older token they resemble, instead of being dropped.

Sink, recent frames and the current block are kept as they are. A frame that leaves them is merged, layer by layer:
each of its tokens joins the group whose latest raw key is most similar to its own, if the cosine (over all heads) is
above tau and the two lie near each other in the picture; otherwise it starts a group. A group stands for its m members
by one entry: the latest key, at its place in time and picture, the mean of the values, and log m added to the logits,
which is exact where the members' keys are equal. Merging is done at the first forward of a block, so on final keys and
once a block.

The number of groups is capped: the ones with the fewest members for the time since the last one joined go first.

Source: arXiv 2602.01801 (TempCache). The paper finds the most similar key by approximate search over the previous
frame; here the search is exact, over all groups nearby.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Sequence

import torch
from torch import Tensor

from ..bias import Attention, biased_attention
from ..errors import ForcingError
from ..group_store import MergedStore, group_bytes
from ..offload import STAGES
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import TABLE_ROWS, Rope
from ..store import Keys, store_bytes, store_host_bytes
from .base import CacheOptions
from .window import Window, WindowOptions


@dataclass(frozen=True)
class MergingOptions(CacheOptions):
    """tau: cosine above which a token joins a group; 0.9 is the paper's, more than 1 merges nothing. sink: first latent
    frames of the video, kept as they are. recent: newest past frames that are. block: latent frames a block.
    radius: rows and columns that a token may lie away from the group it joins. budget: most groups, in latent frames'
    worth of tokens. limit: first temporal position that may not be used; beyond it everything but the sink slides
    along. compact: as in `WindowOptions`, for the frames kept as they are. In an int8 or fp8 store the groups' keys are
    kept so too, and the sums of their values in bfloat16; offload takes the groups along.
    """

    tau: float = 0.9
    sink: int = 1
    recent: int = 3
    radius: int = 1
    budget: int = 12
    block: int = 3
    limit: int = TABLE_ROWS
    compact: bool = False
    positions: ClassVar[str] = "rebased"
    overlaps: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.recent < 0 or self.radius < 0 or self.budget < 1:
            raise ForcingError(f"recent {self.recent}, radius {self.radius}, budget {self.budget} make no sense. "
                               "Use at least 0, 0 and 1.")
        self.kept()  # checks the rest

    @property
    def window(self) -> int:
        """Latent frames kept as they are, current block included."""
        return self.sink + self.recent + self.block

    def kept(self) -> WindowOptions:
        """The window of those frames."""
        return WindowOptions(self.window, self.sink, self.block, "rebased", self.limit)


class Merging:
    """Plans of the window of dense frames. What became of the others is known to the store."""

    def __init__(self, options: MergingOptions, frames: int):
        self.options = options
        self._window = Window(options.kept(), frames)
        self.capacity = self._window.capacity
        self.groups = min(options.budget, max(0, frames - self.capacity))  # in latent frames' worth of tokens
        self.keys = self._window.keys if not self.groups else Keys.RAW if options.compact else Keys.BOTH

    def plan(self, call: Call) -> Plan:
        return self._window.plan(call)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`; all groups go."""
        return self._window.flushed(held, last)

    def lingering(self, evictions: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Frames of which groups may tell: all that were evicted, or the newest, in full, where nothing is ever merged."""
        gone = tuple(chain.from_iterable(evictions)) if self.groups else ()
        return gone if self.options.tau < 1 else gone[-self.groups:]

    def make_pass(self, plan: Plan, call: Call, store: MergedStore, rope: Rope) -> MergingPass:
        return MergingPass(plan, call, store, rope, self.options)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> MergedStore:
        return MergedStore(layers, capacity, frame_tokens, keys, groups=self.groups * frame_tokens, **variant)

    def store_bytes(self, *, layers: int, **sizes: int) -> int:
        """As `store.store_bytes`, with the groups; reached when the first frame is merged."""
        storage = self.options.storage
        resident = min(STAGES, layers) if storage.offload else layers
        return resident * self._group_bytes(**sizes) + store_bytes(layers=layers, **self._kept(**sizes))

    def store_host_bytes(self, *, layers: int, **sizes: int) -> int:
        """As `store.store_host_bytes`, with the groups."""
        return (layers * self._group_bytes(**sizes) * self.options.storage.offload
                + store_host_bytes(layers=layers, **self._kept(**sizes)))

    def _kept(self, **sizes: int) -> dict:
        return {**sizes, "capacity": self.capacity, "keys": self.keys, "storage": self.options.storage}

    def _group_bytes(self, *, frame_tokens: int, batch: int, **sizes: int) -> int:
        """Of one layer."""
        return group_bytes(self.groups * frame_tokens * batch, self.options.storage.coder, **sizes)


@dataclass
class MergingPass(Pass):
    """A pass that merges the frames that it evicts, and attends to the groups beside the frames."""

    store: MergedStore
    options: MergingOptions

    def __post_init__(self):
        # content of evicted frames stays in their slots until this pass writes over it, layer by layer
        self._leaving = [(frame, self.store.slots[frame]) for frame in self.plan.evict]
        self._bias: Tensor | None = None
        super().__post_init__()

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if self._leaving:
            self.store.merge(layer, self._leaving, self.options, self.rope.grid[1])
        return super().exchange(layer, q, k, v)

    def _read(self, layer: int, roped: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super()._read(layer, roped, v)
        self._bias = None
        groups = self.store.at(layer)
        if groups is None or not any(groups.used):
            return keys, values
        end, limit = self.call.first + self.call.frames, self.options.limit
        merged, means, log = groups.read(max(0, end - limit), self.options.sink, min(end, limit), self.rope)
        self._bias = torch.cat([log.new_zeros(len(log), keys.shape[1]), log], dim=1)
        return torch.cat([keys, merged], dim=1), torch.cat([values, means], dim=1)

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Attention with the logarithm of a group's size added to its logits."""
        if self._bias is None:
            return attention(q, keys, values)
        return biased_attention(attention, q, keys, values, self._bias)
