"""MemFlow's bank: at a change of prompt, the frames that fit the new prompt best take the place of the sink.

    bank: top_k + 1 frames | newest frames | current block        positions counted inside the window

Until the first change of prompt the bank is the beginning of the video, as a sink is. At a change the bank becomes, of all
frames held, the top_k that answer the new prompt best, and the first frame of the last block written. Each layer, and each
sample of a batch, chooses for itself. With `active` a block attends to so many frames of the bank only, those with the
largest mean(q) . mean(k) over all heads.

Source: arXiv 2512.14699 (MemFlow), public repo KlingTeam/MemFlow, of which a summary is known here, and no weights: its
own ones were trained with the bank. Readings that were not compared with the published code:

    text query    mean over the prompt's rows, its padding left out, of the keys that cross-attention makes of it: what
                  visual queries are compared with in that layer. The score of a frame is its product with the frame's
                  mean raw key of self-attention, summed over heads.
    when          once, before the first forward under the new prompt writes anything, from keys of clean passes; a soft
                  transition counts as a change when its last step is done, and a recache leaves the bank as chosen
    what          a frame that is also in the window is attended to in both places, until the window drops it
    active        frames of the bank compete, those of the window are always attended to; not in a recache
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Sequence

import torch
from torch import Tensor

from ..described_store import DescribedStore, described_bytes
from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import Rope
from ..saved import Saved, Tree
from ..store import Keys
from .base import CacheOptions
from .window import Window, WindowOptions


@dataclass(frozen=True)
class MemFlowOptions(CacheOptions):
    """window: latent frames one pass may attend to, bank and current block included. top_k: frames of the bank chosen by
    the prompt; it has one more. block: latent frames a block. active: frames of the bank that a layer attends to, 0 for
    all. compact: as in `WindowOptions`. store, offload, dense: as in `CacheOptions`.
    """

    window: int = 12
    top_k: int = 2
    block: int = 3
    active: int = 0
    compact: bool = False
    positions: ClassVar[str] = "relative"

    def __post_init__(self):
        super().__post_init__()
        if self.window is None or self.top_k < 1 or self.active < 0:
            raise ForcingError(f"window {self.window}, top_k {self.top_k}, active {self.active} make no sense. Use a window of "
                               "some frames, a top_k of at least 1 and active of at least 0.")
        WindowOptions(self.window, self.sink, self.block, "relative")  # checks the rest

    @property
    def sink(self) -> int:
        """Latent frames of the bank, which never leave as a sink does not."""
        return self.top_k + 1


class MemFlow:
    """Plans of a window whose sink is the bank. What lies in its places is known to the store.

    `turned` says that the next pass is the first one under another prompt.
    """

    def __init__(self, options: MemFlowOptions, frames: int):
        self.options = options
        self._window = Window(WindowOptions(options.window, options.sink, options.block, "relative"), frames)
        self.capacity = self._window.capacity
        # what is chosen moves even where nothing else does
        self.keys = Keys.RAW if options.compact else Keys.BOTH
        self._turned = False

    def plan(self, call: Call) -> Plan:
        plan = self._window.plan(call)
        if call.phase != "recache" or len(call.held) <= self.options.sink:
            return plan
        bank = call.held[:self.options.sink]
        return replace(plan, write=tuple(f for f in plan.write if f not in bank))

    def turned(self) -> None:
        self._turned = True

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the bank and the newest `last`."""
        return self._window.flushed(held, last)

    def make_pass(self, plan: Plan, call: Call, store: MemFlowStore, rope: Rope) -> MemFlowPass:
        asks, self._turned = self._turned and len(call.held) > self.options.sink, False
        return MemFlowPass(plan, call, store, rope, self.options, asks)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> MemFlowStore:
        return MemFlowStore(layers, capacity, frame_tokens, keys, bank=self.options.sink, **variant)

    def store_bytes(self, *, layers: int, frame_tokens: int, dim: int, batch: int, element_size: int) -> int:
        return described_bytes(self.capacity, layers=layers, frame_tokens=frame_tokens, dim=dim, batch=batch,
                               element_size=element_size, keys=self.keys, storage=self.options.storage)


def best(scores: Sequence[float], sources: Sequence[int], last: int, count: int) -> list[int]:
    """Places of the new bank, in temporal order of what lies there: the `count` with the highest scores, and the first
    frame of the last block. sources: the frame in every place; last: the first frame of that block."""
    newest = min(range(len(sources)), key=lambda i: (sources[i] < last, sources[i]))
    chosen = {sources[newest]: newest}
    for i in sorted(range(len(sources)), key=lambda i: -scores[i]):
        if len(chosen) <= count:
            chosen.setdefault(sources[i], i)
    return [chosen[frame] for frame in sorted(chosen)]


class MemFlowStore(DescribedStore):
    """A store whose first `bank` held frames can be replaced, for one layer and one sample at a time.

    sources: (layer, sample) -> frames in the bank's places, once they were chosen. last: first frame of the newest clean
    pass.
    """

    def __init__(self, *args, bank: int, **settings):
        super().__init__(*args, **settings)
        self.bank, self.last = bank, 0
        self.sources: dict[tuple[int, int], tuple[int, ...]] = {}

    def clear(self) -> None:
        super().clear()
        self.sources.clear()

    def scores(self, layer: int, query: Tensor, slots: Sequence[int]) -> Tensor:
        """[B, len(slots)]: products of a query [B, H, D] with the mean keys of what lies there, over all heads."""
        return torch.einsum("bhd,bfhd->bf", query.float(), self.means[layer][:, list(slots)])

    def stale(self) -> None:
        """The raw keys of the bank change: rotate them anew wherever they stand."""
        self.positions.update(dict.fromkeys(self.frames[:self.bank]))  # None is no position, so each counts as moved

    def retrieve(self, layer: int, query: Tensor, held: dict[int, int]) -> None:
        """Choose the bank of a layer anew. query: of the new prompt, [B, H, D]. held: frame -> slot of all that was held
        before this pass evicted anything; what it evicts still lies there."""
        frames, slots = zip(*sorted(held.items()))
        rows = self.scores(layer, query, slots).tolist()
        picks = []  # of every sample: slots, in temporal order of what lies there
        for sample, row in enumerate(rows):
            sources = (*self.sources.get((layer, sample), frames[:self.bank]), *frames[self.bank:])
            places = best(row, sources, self.last, self.bank - 1)
            picks.append([slots[i] for i in places])
            self.sources[layer, sample] = tuple(sources[i] for i in places)
        bank, data = [self.slots[f] for f in frames[:self.bank]], self._at(layer)
        raw, v = (self._gathered(buffer, picks) for buffer in (data.raw, data.v))
        each = torch.arange(len(rows), device=raw.device)[:, None]
        self.means[layer][:, bank] = self.means[layer][each, torch.tensor(picks, device=raw.device)]
        super().write(layer, frames[:self.bank], raw, raw, v)  # `stale` has them rotated

    def _gathered(self, buffer, picks: list[list[int]]) -> Tensor:
        """[B, places * tokens, H, D] of a buffer, other slots for every sample."""
        content = {slot: self._codec.read(buffer, [slice(slot, slot + 1)]) for row in picks for slot in row}
        return torch.stack([torch.cat([content[slot][sample] for slot in row]) for sample, row in enumerate(picks)])

    @property
    def _kind(self) -> list:
        return [*super()._kind, self.bank]

    def state(self) -> Tree:
        tree = super().state() | {"last": self.last}
        for layer, sample in self.sources:
            tree.setdefault(f"bank {layer}", {})[str(sample)] = list(self.sources[layer, sample])
        return tree

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        self.last = saved.integer("last", 0, max(self.slots, default=0) + 1)
        for layer in filter(lambda layer: f"bank {layer}" in saved, range(self.layers)):
            part = saved.part(f"bank {layer}")
            for sample in filter(lambda sample: str(sample) in part, range(like.shape[0])):
                self.sources[layer, sample] = self._bank_of(part, str(sample))

    def _bank_of(self, part: Saved, sample: str) -> tuple[int, ...]:
        frames = part.frames(sample, most=self.bank)
        if len(frames) != self.bank:
            raise ForcingError("A bank of the snapshot has places without a frame. Take an earlier or another snapshot.")
        return frames


@dataclass
class MemFlowPass(Pass):
    """A pass that has the bank chosen where it is the first one under a new prompt, and may attend to a part of it.

    asks: whether it wants the new prompt; the network then calls `ask` before `exchange`.
    """

    store: MemFlowStore
    options: MemFlowOptions
    asks: bool

    def __post_init__(self):
        self._held = dict(self.store.slots)
        super().__post_init__()
        if self.asks:
            self.store.stale()
        if self.call.phase == "clean":
            self.store.last = self.call.first
        bank = tuple(f for f in self.plan.read[:self.options.sink] if f < self.call.first)
        self._sparse = bank if 0 < self.options.active < len(bank) and self.call.phase != "recache" else ()
        self._query: Tensor | None = None

    def ask(self, layer: int, text: Tensor) -> None:
        """The mean key that this layer's cross-attention makes of the prompt, [B, H, D]."""
        self.store.retrieve(layer, text, self._held)

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        self._query = None if q is None else q.mean(dim=1, dtype=torch.float32)
        out = super().exchange(layer, q, k, v)
        if self.silent and self.plan.write:
            self.store.describe(layer, self.plan.write, self._clip(k, self._kept))
        return out

    def _read(self, layer: int, roped: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        read = super()._read(layer, roped, v)
        return tuple(self._activated(layer, t) for t in read) if self._sparse else read

    def _activated(self, layer: int, t: Tensor) -> Tensor:
        """Keys or values without the frames of the bank that this layer does not attend to."""
        scores = self.store.scores(layer, self._query, [self.store.slots[f] for f in self._sparse])
        at = {frame: place for place, frame in enumerate(self.order)}
        bank = torch.tensor([at.pop(frame) for frame in self._sparse], device=t.device)
        rest = torch.tensor(list(at.values()), device=t.device).expand(len(t), -1)
        index = torch.cat([bank[scores.topk(self.options.active, dim=1).indices], rest], dim=1)
        each = torch.arange(len(t), device=t.device)[:, None]
        return t.unflatten(1, (-1, self.store.frame_tokens))[each, index].flatten(1, 2)
