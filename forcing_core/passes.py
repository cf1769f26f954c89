"""The pass through which a layer meets memory.

Order of work inside `Pass.exchange`, always: evict -> write -> read. The network sees nothing but a pass; it
never learns which policy made it.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .plan import Call, Plan
from .rope import HeadTable, Rope, rotate
from .store import Store
from .stretch import stretch_of


class Exchange(Protocol):
    """All that a layer knows of memory. `silent` passes stop after the last layer's keys and values.

    A pass may also have `attend(layer, q, keys, values, attention)`, which stands for `attention(q, keys, values)`
    with what `exchange` returned: for choices per head and for key biases; and `attend_prompt`, the same for the keys and
    values of the prompt. One with `observes` true gets queries even
    in the last layer of a silent pass: for choices that depend on them. One with `asks` true is told of the prompt before
    every `exchange`, by `ask(layer, text)` with the mean key of the layer's cross-attention, float32 [B, H, D]. One with
    `leading` frames of which the last layer's keys and values are all that is wanted gets its queries there without them.
    """

    silent: bool

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]: ...


@dataclass
class Pass:
    """One forward with its plan. q, k, v are raw projections [B, n, H, D] of the call's frames.

    `exchange` stores k and v as planned and returns the rotated q and the rotated keys and the values to
    attend to. With q None (the last layer of a silent pass) it only stores.
    """

    plan: Plan
    call: Call
    store: Store
    rope: Rope

    def __post_init__(self):
        self.silent = self.call.phase != "noisy"
        self._turn = self.rope.table(self.plan.query)
        self._kept = [self.call.span.index(frame) for frame in self.plan.write]
        self.store.place(self.plan)
        self._stretch = stretch_of(self.plan, self.call, self.store, self._turn) if type(self) is Pass else None

    @property
    def turn(self) -> Tensor | HeadTable:
        """Rotation of the call's frames."""
        return self._turn

    def over(self, store: Store, rope: Rope, turn: Tensor) -> Pass:
        """The same pass over another bookkeeping of the same buffers, with these tables."""
        other = copy.copy(self)
        other.store, other.rope, other._turn = store, rope, turn
        return other

    @property
    def order(self) -> tuple[int, ...]:
        """Source frames in the order in which `exchange` lays their keys."""
        return (*self.store.order(self.plan.read), *self.plan.own)

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if self._stretch is not None and not torch.is_grad_enabled():
            found = self._stretch.exchange(self.store, layer, self._turn, q, k, v)
            if layer == self.store.layers - 1:
                self.store.settle(self.plan)
            return found
        roped = rotate(k, self._turn)
        if self.plan.write:
            self.store.write(layer, self.plan.write, *(self._clip(t, self._kept) for t in (k, roped, v)))
        return self.met(layer, None if q is None else rotate(q, self._turn), roped, v)

    def met(self, layer: int, q: Tensor | None, roped: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """What comes behind writing: rotated q, and the keys and values to attend to. roped: rotated keys of the call's
        frames, only looked at where the plan has `own` ones."""
        self.store.align(layer, self.plan, self.rope)
        keys, values = (roped, v) if q is None else self._read(layer, roped, v)
        if layer == self.store.layers - 1:
            self.store.settle(self.plan)
        return q, keys, values

    def _read(self, layer: int, roped: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stored frames, then the call's own ones that are attended to without being stored."""
        parts = [self._stored(layer)] if self.plan.read else []
        if self.plan.own:
            own = [self.call.span.index(frame) for frame in self.plan.own]
            parts.append((self._clip(roped, own), self._clip(v, own)))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(t, dim=1) for t in zip(*parts))

    def _stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """(rotated keys, values) of the plan's read frames."""
        return self.store.read(layer, self.plan, self.rope)

    def _clip(self, t: Tensor, frames: list[int]) -> Tensor:
        """These frames of the call, by their number in it."""
        if len(frames) == self.call.frames:
            return t
        return t.unflatten(1, (self.call.frames, -1))[:, frames].flatten(1, 2)
