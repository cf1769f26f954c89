"""Reward Forcing's EMA sink: frames that leave the window are blended into the sink instead of being lost.

    sink <- alpha * sink + (1 - alpha) * evicted

for keys before rotation and for values, token by token, once a block and layer, before the new block is written.
Positions are counted inside the window, so the length is unlimited. Source: arXiv 2512.04678 (Reward Forcing),
public repo JaydenLyh/Reward-Forcing.

The published code blends only where as many frames leave as there are sink frames, and overwrites the sink
otherwise. Here frame f goes into sink frame (f - first sink frame) mod sink, which is the same where the published
code blends, and spreads the past evenly over the sink for every other block and sink size.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Iterable

import torch
from torch import Tensor

from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import Rope
from ..saved import Saved, Tree
from ..store import Keys, Store, store_bytes
from .base import CacheOptions
from .deep_sink import bounded
from .window import Window

SINK_DTYPES = ("model", "float32")


@dataclass(frozen=True)
class EmaSinkOptions(CacheOptions):
    """window: latent frames one pass may attend to, sink and current block included. sink: leading frames that take
    up what is evicted. block: latent frames a block. alpha: what is kept of the sink at each blend.
    sink_dtype: "model" blends in the compute dtype as published, which in bfloat16 rounds most of a small step away;
    "float32" keeps a float32 copy of the sink beside the store, as the paper's formula has it.
    compact: as in `WindowOptions`. store, offload, dense: as in `CacheOptions`; an int8 or fp8 store rounds small steps away
    too, so take "float32" with it.
    """

    window: int = 9
    sink: int = 3
    block: int = 3
    alpha: float = 0.999
    sink_dtype: str = "model"
    compact: bool = False
    positions: ClassVar[str] = "relative"

    def __post_init__(self):
        super().__post_init__()
        bounded(self)
        if self.sink_dtype not in SINK_DTYPES:
            raise ForcingError(f"sink_dtype = {self.sink_dtype!r} is not known. Use one of {', '.join(SINK_DTYPES)}.")
        if not 0 <= self.alpha <= 1:
            raise ForcingError(f"alpha = {self.alpha} makes no sense: it is the share of the sink that stays. "
                               "Use a number from 0 to 1.")


class EmaSink:
    """Plans of the EMA sink: those of a window with relative positions. The blending is done by its pass and store."""

    def __init__(self, options: EmaSinkOptions, frames: int):
        self.options = options
        self._window = Window(bounded(options), frames)
        self.capacity, self.keys = self._window.capacity, self._window.keys
        self._precise = options.sink_dtype == "float32" and options.sink > 0 and frames > options.window

    def plan(self, call: Call) -> Plan:
        return self._window.plan(call)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`."""
        return self._window.flushed(held, last)

    def make_pass(self, plan: Plan, call: Call, store: EmaStore, rope: Rope) -> EmaPass:
        return EmaPass(plan, call, store, rope, self.options.alpha)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> EmaStore:
        return EmaStore(layers, capacity, frame_tokens, keys, sink=self.options.sink, precise=self._precise, **variant)

    def store_bytes(self, *, layers: int, frame_tokens: int, dim: int, batch: int, element_size: int) -> int:
        """As `store.store_bytes`, with the float32 copies of the sink."""
        storage = self.options.storage
        copies = 2 * self.options.sink if self._precise and (element_size < 4 or not storage.coder.exact) else 0
        return layers * copies * frame_tokens * dim * batch * 4 + store_bytes(
            layers=layers, capacity=self.capacity, frame_tokens=frame_tokens, dim=dim, batch=batch,
            element_size=element_size, keys=self.keys, storage=storage)


@dataclass
class EmaPass(Pass):
    """A pass that blends the frames it evicts into the sink before it writes its own."""

    store: EmaStore
    alpha: float

    def __post_init__(self):
        # slots of evicted frames: their content stays until this pass writes over it, layer by layer
        self._blends = self.store.leaving(self.plan.evict)
        super().__post_init__()
        self.store.stale(sink for _, sink in self._blends)

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        for slot, sink in self._blends:
            self.store.blend(layer, slot, sink, self.alpha)
        return super().exchange(layer, q, k, v)


class EmaStore(Store):
    """A store whose first `sink` held frames can take up others. precise: with float32 copies of the sink, made when
    it is written, unless the store itself is that exact."""

    def __init__(self, *args, sink: int, precise: bool, **settings):
        super().__init__(*args, **settings)
        self.sink, self.precise = sink, precise
        self._copies: list[Tensor | None] = [None] * self.layers  # [2, B, sink, tokens, H, D]: keys, values

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(copy.nbytes for copy in self._copies if copy is not None)

    def free(self) -> None:
        super().free()
        self._copies = [None] * self.layers

    def leaving(self, frames: tuple[int, ...]) -> list[tuple[int, int]]:
        """(slot, sink frame that takes it up) of every held frame that is about to be evicted, oldest first."""
        sink = self.frames[:self.sink]
        return [(self.slots[f], sink[(f - sink[0]) % self.sink]) for f in frames] if sink else []

    def stale(self, frames: Iterable[int]) -> None:
        """The raw keys of these frames change: rotate them anew wherever they stand."""
        self.positions.update(dict.fromkeys(frames))  # None is no position, so each counts as moved

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        super().write(layer, frames, raw, roped, v)
        if not self._rounds(raw):
            return
        sink = self.frames[:self.sink]
        if self._copies[layer] is None:
            self._copies[layer] = self._empty_copies(raw)
        for new, kept in zip((raw, v), self._copies[layer]):
            parts = new.unflatten(1, (-1, self.frame_tokens))
            for i, frame in enumerate(frames):
                if frame in sink:
                    kept[:, sink.index(frame)] = parts[:, i]

    def _rounds(self, like: Tensor) -> bool:
        """Whether copies are kept beside buffers for such tensors."""
        return self.precise and (like.element_size() < 4 or not self._codec.exact)

    def _empty_copies(self, like: Tensor) -> Tensor:
        shape = (2, like.shape[0], self.sink, self.frame_tokens, *like.shape[2:])
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    @property
    def _kind(self) -> list:
        return [*super()._kind, self.precise]

    def state(self) -> Tree:
        filled = min(self.sink, len(self.frames))
        return super().state() | {f"sink {layer}": {"copies": copies[:, :, :filled]}
                                  for layer, copies in enumerate(self._copies) if copies is not None}

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        for layer in range(self.layers if self.slots and self._rounds(like) else 0):
            self._copies[layer] = self._empty_copies(like)
            saved.part(f"sink {layer}").fill("copies", self._copies[layer][:, :, :min(self.sink, len(self.frames))])

    def blend(self, layer: int, slot: int, frame: int, alpha: float) -> None:
        """frame <- alpha * frame + (1 - alpha) * what lies in `slot`, for raw keys and values of one layer."""
        data, copies = self._at(layer), self._copies[layer]
        mine = self.slots[frame]
        new = []
        for i, buffer in enumerate((data.raw, data.v)):
            old = self._codec.read(buffer, [slice(slot, slot + 1)])
            if copies is None:
                new.append(alpha * self._codec.read(buffer, [slice(mine, mine + 1)]) + (1 - alpha) * old)
            else:
                kept = copies[i][:, self.frames.index(frame)]
                kept.copy_(alpha * kept + (1 - alpha) * old.float())
                new.append(kept.to(old))
        super().write(layer, (frame,), new[0], new[0], new[1])
