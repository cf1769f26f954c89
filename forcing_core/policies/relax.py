"""Relax Forcing: seven frames are enough, if one of them is an old one that fits the beginning and is unlike the newest.

    sink | history | tail | current block        as published 2 + 1 + 1 + 3 latent frames

All that was made lately is kept, in a reservoir that forgets its oldest frames; a block attends to little of it. Between
sink and tail, candidates stand evenly spaced in the newer half, and those with the highest score become its history:

    score = cos(candidate, sink) - novelty * cos(candidate, tail)

of mean keys, before rotation and over all heads, of the first layer. Keys are described in clean passes alone, so all
layers and steps of a block have the same choice. Sink and history stand directly before the tail, at positions counted
inside what is attended to, so the length is unlimited.

Source: arXiv 2603.21366 (Relax Forcing), public repo zengqunzhao/Relax-Forcing; runs on Self Forcing weights without
training. Readings that nothing published was compared with: the reservoir counts sink, tail and current block; while it
is not full, its newer half is that of what is there; every sample of a batch chooses for itself. A recache, of which the
paper knows nothing, rewrites what a plain window of as many frames would hold, and leaves the rest as it was made.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import Rope
from ..saved import Saved, Tree
from ..store import Keys, Store, store_bytes
from .base import CacheOptions
from .window import Window, WindowOptions


@dataclass(frozen=True)
class RelaxOptions(CacheOptions):
    """sink: leading latent frames, always attended to. history: frames chosen among the candidates. recent: newest past
    frames, the tail. candidates: frames that the history is chosen from. reservoir: latent frames kept, current block
    included. novelty: how much a candidate loses for being like the tail. block: latent frames a block. store, offload,
    dense: as in `CacheOptions`.
    """

    sink: int = 2
    history: int = 1
    recent: int = 1
    candidates: int = 4
    reservoir: int = 120
    novelty: float = 2.0
    block: int = 3
    positions: ClassVar[str] = "relative"

    def __post_init__(self):
        super().__post_init__()
        if min(self.sink, self.history) < 0 or min(self.recent, self.block) < 1 or not self.history <= self.candidates:
            raise ForcingError(f"sink {self.sink}, history {self.history}, recent {self.recent}, candidates {self.candidates}, "
                               f"block {self.block} make no sense. The sink and the history need at least 0 frames, recent and "
                               "block at least 1, and candidates at least as many as the history.")
        if not 0 <= self.novelty < inf:
            raise ForcingError(f"novelty = {self.novelty} makes no sense. Use a number from 0 on, 2 as published.")
        if self.reservoir < self.window:
            raise ForcingError(f"A reservoir of {self.reservoir} frames is smaller than the {self.window} that a block attends "
                               f"to. Use at least {self.window}, 120 as published.")

    @property
    def window(self) -> int:
        """Latent frames one pass attends to at most."""
        return self.sink + self.history + self.recent + self.block

    def parts(self, past: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(sink, candidates, tail) of the past frames held, all in temporal order."""
        sink, rest = past[:self.sink], past[self.sink:]
        cut = max(0, len(rest) - self.recent)
        return sink, self._spaced(rest[:cut]), rest[cut:]

    def _spaced(self, between: tuple[int, ...]) -> tuple[int, ...]:
        """Evenly spaced frames of the newer half, its ends included; of a wider part where that has no whole history."""
        half = between[min(len(between) // 2, max(0, len(between) - self.history)):]
        count = min(self.candidates, len(half))
        return tuple(half[i * (len(half) - 1) // max(1, count - 1)] for i in range(count))


class Relax:
    """Plans of the seven frames. replays: latent frames that a recache needs, fewer than are held.

    Which candidates a sample attends to is known to the pass; a plan names the newest ones, whose places they take.
    """

    keys = Keys.RAW  # few of many frames are read, so rotating them at every read is cheaper than keeping them rotated

    def __init__(self, options: RelaxOptions, frames: int):
        self.options = options
        self._window = Window(WindowOptions(options.reservoir, options.sink, options.block, "relative"), frames)
        self.capacity, self.replays = self._window.capacity, min(options.window, frames)

    def plan(self, call: Call) -> Plan:
        plan = self._window.plan(call)
        if call.phase == "recache":
            return self._replayed(plan, call) if call.held else plan
        sink, among, tail = self.options.parts(tuple(f for f in plan.read if f < call.first))
        past = (*sink, *among[len(among) - min(len(among), self.options.history):], *tail)
        read = (*past, *(f for f in plan.read if f >= call.first))
        query = tuple(range(len(past), len(past) + call.frames))
        return replace(plan, read=read, positions=tuple(range(len(read))), query=query)

    def _replayed(self, plan: Plan, call: Call) -> Plan:
        """The sink and the newest frames, as many as a block attends to. What is not among them only queries."""
        sink, rest = call.held[:self.options.sink], call.held[self.options.sink:]
        read = (*sink, *rest[-(self.options.window - self.options.sink):])
        stands = {f: i for i, f in enumerate(read)}
        query = tuple(stands.get(f, len(read) - 1 - (read[-1] - f)) for f in call.span)
        return replace(plan, write=tuple(f for f in plan.write if f in stands), read=read,
                       positions=tuple(range(len(read))), query=query)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`."""
        return self._window.flushed(held, last)

    def make_pass(self, plan: Plan, call: Call, store: RelaxStore, rope: Rope) -> RelaxPass:
        return RelaxPass(plan, call, store, rope, self.options)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> RelaxStore:
        return RelaxStore(layers, capacity, frame_tokens, keys, **variant)

    def store_bytes(self, *, layers: int, frame_tokens: int, dim: int, batch: int, element_size: int) -> int:
        """As `store.store_bytes`, with the float32 mean keys of the first layer."""
        return self.capacity * batch * dim * 4 + store_bytes(
            layers=layers, capacity=self.capacity, frame_tokens=frame_tokens, dim=dim, batch=batch,
            element_size=element_size, keys=self.keys, storage=self.options.storage)


class RelaxStore(Store):
    """A store with a description of every frame: means [B, capacity, H * D] float32, mean raw keys of the first layer."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.means: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.means is None else self.means.nbytes)

    def free(self) -> None:
        super().free()
        self.means = None

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        super().write(layer, frames, raw, roped, v)
        if self.means is None:
            self.means = self._no_means(raw)

    def _no_means(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape[0], self.capacity, like.shape[2] * like.shape[3], dtype=torch.float32)

    def describe(self, frames: tuple[int, ...], raw: Tensor) -> None:
        """Note the mean keys of these written frames; raw keys [B, len(frames) * tokens, H, D] of the first layer."""
        means = raw.unflatten(1, (len(frames), -1)).mean(dim=2, dtype=torch.float32).flatten(2)
        self.means[:, [self.slots[f] for f in frames]] = means

    def described(self, frames: tuple[int, ...]) -> Tensor:
        """[B, len(frames), H * D]"""
        return self.means[:, [self.slots[f] for f in frames]]

    def state(self) -> Tree:
        return super().state() | ({} if self.means is None else {"means": self.means[:, :self._used]})

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        if self._used:
            self.means = self._no_means(like)
            saved.fill("means", self.means[:, :self._used])


@dataclass
class RelaxPass(Pass):
    """A pass whose samples attend to the candidates that each of them chose."""

    store: RelaxStore
    options: RelaxOptions

    def __post_init__(self):
        super().__post_init__()
        self._plans: list[Plan] = []  # of every sample, once they are known

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        out = super().exchange(layer, q, k, v)
        if layer == 0 and self.silent and self.plan.write:
            self.store.describe(self.plan.write, self._clip(k, self._kept))
        return out

    def _stored(self, layer: int) -> tuple[Tensor, Tensor]:
        self._plans = self._plans or self._chosen()
        read = {plan: self.store.read(layer, plan, self.rope) for plan in dict.fromkeys(self._plans)}
        if len(read) == 1:
            return next(iter(read.values()))
        each = [[t[sample] for t in read[plan]] for sample, plan in enumerate(self._plans)]
        keys, values = (torch.stack(t) for t in zip(*each))
        return keys, values

    def _chosen(self) -> list[Plan]:
        """The plan of every sample, or one for all of them."""
        options = self.options
        sink, among, tail = options.parts(tuple(f for f in self.store.frames if f < self.call.first))
        if self.call.phase == "recache" or len(among) <= options.history:
            return [self.plan]
        scores = score(self.store.described(among), self.store.described(sink), self.store.described(tail), options.novelty)
        best = scores.topk(options.history, dim=1).indices.sort(dim=1).values.tolist()
        behind = self.plan.read[len(sink) + options.history:]
        return [replace(self.plan, read=(*sink, *(among[i] for i in row), *behind)) for row in best]


def score(candidates: Tensor, sink: Tensor, tail: Tensor, novelty: float) -> Tensor:
    """[B, n] of mean keys [B, n, D] of the candidates and those of the frames of sink (which may have none) and tail."""
    alike = cosine_similarity(candidates, tail.mean(dim=1, keepdim=True), dim=-1)
    fits = cosine_similarity(candidates, sink.mean(dim=1, keepdim=True), dim=-1) if sink.shape[1] else 0.0
    return fits - novelty * alike
