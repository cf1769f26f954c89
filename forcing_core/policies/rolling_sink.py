"""Rolling Sink: a plain window whose past is, all but the newest block, the beginning of the video over and over.

    video     0 1 2 ... 17 | 18 19 20  21 22 23  24 25 26 ...        window 21, blocks of 3
    content   0 1 2 ... 17 | 17 16 15  14 13 12  11 10  9 ... 2 1 0 | 0 1 2 ... 17 | 17 16 ...

The keys and values of the first window - block frames are kept raw. Once a block behind a full window has been written,
the block before it is overwritten: each frame gets the content of the beginning's frame that a to and fro through it
arrives at, at its own position in time. So a block sees the block before it as it is, and the beginning beyond that.

Source: arXiv 2602.07775 (Rolling Sink), public repo haodong2000/RollingSink; runs on Self Forcing and Causal Forcing
weights without training. Published positions end at 8192 frames (34 minutes), which is the length of a table; here they
are computed, and do not end.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Buffer, picked, tensors
from ..errors import ForcingError
from ..offload import pinned
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import TABLE_ROWS, Rope, rotate
from ..saved import Saved, Tree
from ..store import Keys, Store, store_bytes, store_host_bytes
from .base import CacheOptions
from .window import Window, WindowOptions

PARTS = ("all", "scale")  # of a buffer, in a snapshot


@dataclass(frozen=True)
class RollingSinkOptions(CacheOptions):
    """window: latent frames one pass may attend to, current block included. block: latent frames a block; the window
    less one block comes back for ever. Takes nearly twice the memory of the same window without. store, offload, dense: as
    in `CacheOptions`; the beginning is kept like the store.
    """

    window: int = 21
    block: int = 3
    positions: ClassVar[str] = "endless"
    sink: ClassVar[int] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.block < 1 or self.window is None or self.window < 2 * self.block:
            raise ForcingError(f"A rolling sink in a window of {self.window} frames has nothing to bring back beside blocks of "
                               f"{self.block}. Use a window of at least {2 * max(1, self.block)} frames, 21 as published.")

    @property
    def period(self) -> int:
        """Latent frames at the beginning that come back."""
        return self.window - self.block

    def original(self, frame: int) -> int:
        """Which frame's content a frame gets, both counted from the first frame of the scene."""
        turn, step = divmod(frame, self.period)
        return self.period - 1 - step if turn % 2 else step


class RollingSink:
    """Plans of a window without sink. The content of overwritten frames is a matter of its pass and store.

    A scene that begins with an empty memory brings back its own beginning. A recache writes the frames of the window as
    they were made, and leaves the beginning as it is where that has left the window.
    """

    keys = Keys.ROPED

    def __init__(self, options: RollingSinkOptions, frames: int):
        self.options = options
        self._window = Window(WindowOptions(options.window, 0, options.block, limit=max(TABLE_ROWS, frames)), frames)
        self.capacity = self._window.capacity
        self.recycles = frames > options.window + options.block  # else nobody would see what came back

    def plan(self, call: Call) -> Plan:
        return self._window.plan(call)

    def make_pass(self, plan: Plan, call: Call, store: RecyclingStore, rope: Rope) -> RollingSinkPass:
        return RollingSinkPass(plan, call, store, rope, self.options)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> RecyclingStore:
        return RecyclingStore(layers, capacity, frame_tokens, keys, period=self.options.period if self.recycles else 0,
                              **variant)

    def store_bytes(self, **sizes: int) -> int:
        """As `store.store_bytes`, with the beginning's raw keys and values."""
        storage = self.options.storage
        return (not storage.offload) * self._originals_bytes(**sizes) + store_bytes(
            capacity=self.capacity, keys=self.keys, storage=storage, **sizes)

    def store_host_bytes(self, **sizes: int) -> int:
        """As `store.store_host_bytes`, with the same."""
        storage = self.options.storage
        return storage.offload * self._originals_bytes(**sizes) + store_host_bytes(
            capacity=self.capacity, keys=self.keys, storage=storage, **sizes)

    def _originals_bytes(self, *, layers: int, frame_tokens: int, dim: int, batch: int, element_size: int) -> int:
        heads, period = max(1, dim // 128), self.options.period if self.recycles else 0
        shape = 2 * batch, period, frame_tokens, heads, dim // heads
        return layers * self.options.storage.coder.bytes(shape, element_size)


class RecyclingStore(Store):
    """A store that also keeps raw keys and values of the first `period` frames after it was empty. start: the first of
    them; originals: layer -> a buffer [2 * B, period, tokens, H, D], keys before values; with offload in host memory,
    from where the few frames that are wanted after a block are fetched."""

    def __init__(self, *args, period: int, **variant):
        super().__init__(*args, **variant)
        self.period, self.start = period, 0
        self.originals: dict[int, Buffer] = {}

    @property
    def nbytes(self) -> int:
        return super().nbytes + (not self.storage.offload) * self._originals_bytes()

    @property
    def host_nbytes(self) -> int:
        return super().host_nbytes + self.storage.offload * self._originals_bytes()

    def _originals_bytes(self) -> int:
        return sum(t.nbytes for kept in self.originals.values() for t in tensors(kept))

    def free(self) -> None:
        super().free()
        self.originals.clear()

    def keep_originals(self, layer: int, frames: tuple[int, ...], raw: Tensor, v: Tensor) -> None:
        """Keep those of `frames` that belong to the beginning; raw keys and values [B, len(frames) * tokens, H, D]."""
        first = frames[0] - self.start
        count = min(len(frames), self.period - first)
        if count <= 0:
            return
        if layer not in self.originals:
            self.originals[layer] = self._no_originals(raw)
        parts = torch.cat([raw, v]).unflatten(1, (len(frames), -1))[:, :count]
        self._codec.write(self.originals[layer], slice(first, first + count), parts)

    def _no_originals(self, like: Tensor) -> Buffer:
        batch, _, heads, head_dim = like.shape
        empty = pinned(like.device) if self.storage.offload else like.new_empty
        return self._codec.make((2 * batch, self.period, self.frame_tokens, heads, head_dim), like.dtype,
                                lambda shape, dtype: empty(shape, dtype=dtype).zero_())

    @property
    def _kind(self) -> list:
        return [*super()._kind, self.period]

    def state(self) -> Tree:
        kept = {f"originals {layer}": {name: t.unflatten(0, (2, -1)) for name, t in zip(PARTS, tensors(originals))}
                for layer, originals in self.originals.items()}
        return super().state() | kept | {"start": self.start}

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        self.start = saved.integer("start", 0, min(self.slots, default=0) + 1)
        for layer in range(self.layers):
            if f"originals {layer}" in saved:
                self.originals[layer] = self._no_originals(like)
                for name, t in zip(PARTS, tensors(self.originals[layer])):
                    saved.part(f"originals {layer}").fill(name, t.unflatten(0, (2, -1)))

    def recycle(self, layer: int, frames: tuple[int, ...], originals: list[int], turn: Tensor) -> None:
        """Overwrite held frames by these originals, rotated by `turn`, the table of their positions."""
        here = picked(self.originals[layer], lambda t: t[:, originals].to(turn.device))
        raw, v = self._codec.unpack(here).flatten(1, 2).chunk(2)
        self.write(layer, frames, raw, rotate(raw, turn), v)


@dataclass
class RollingSinkPass(Pass):
    """A pass that keeps the beginning, and after the last layer overwrites the block before its own."""

    store: RecyclingStore
    options: RollingSinkOptions

    def __post_init__(self):
        if not self.call.held:
            self.store.start = self.call.first
        super().__post_init__()

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if self.silent and self.store.period:
            self.store.keep_originals(layer, self.call.span, k, v)
        out = super().exchange(layer, q, k, v)
        # what earlier layers got may lie in the store, so it is changed when all of them are done with it
        if self.call.phase == "clean" and layer == self.store.layers - 1:
            self._recycle()
        return out

    def _recycle(self) -> None:
        start, first = self.store.start, self.call.first
        if not self.store.period or first - start < self.options.window:
            return
        place = dict(zip(self.plan.read, self.plan.positions))
        past = tuple(f for f in range(first - self.options.block, first) if f in place)
        turn = self.rope.table([place[f] for f in past])
        for layer in range(self.store.layers):
            self.store.recycle(layer, past, [self.options.original(f - start) for f in past], turn)
