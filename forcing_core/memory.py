"""What one condition remembers, and the pass through which a layer meets it.

Order of work inside `Pass.exchange`, always: evict -> write -> read. The network sees nothing but a pass; it
never learns which policy made it.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .plan import Call, Phase, Plan
from .policies import Policy, build
from .rope import Rope, rotate
from .store import Store, store_bytes


class Exchange(Protocol):
    """All that a layer knows of memory. `silent` passes stop after the last layer's keys and values."""

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

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        roped = rotate(k, self._turn)
        if self.plan.write:
            self.store.write(layer, self.plan.write, *(self._clip(t, self._kept) for t in (k, roped, v)))
        self.store.align(layer, self.plan, self.rope)
        keys, values = (k, v) if q is None else self._read(layer, roped, v)
        if layer == self.store.layers - 1:
            self.store.settle(self.plan)
        return None if q is None else rotate(q, self._turn), keys, values

    def _read(self, layer: int, roped: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stored frames, then the call's own ones that are attended to without being stored."""
        parts = [self.store.read(layer, self.plan, self.rope)] if self.plan.read else []
        if self.plan.own:
            own = [self.call.span.index(frame) for frame in self.plan.own]
            parts.append((self._clip(roped, own), self._clip(v, own)))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(t, dim=1) for t in zip(*parts))

    def _clip(self, t: Tensor, frames: list[int]) -> Tensor:
        """These frames of the call, by their number in it."""
        if len(frames) == self.call.frames:
            return t
        return t.unflatten(1, (self.call.frames, -1))[:, frames].flatten(1, 2)


@dataclass
class Memory:
    """Store and policy of one condition; CFG has two of them.

    Built per run and dropped with it. `begin` makes the pass for the next forward.
    """

    policy: Policy
    store: Store
    rope: Rope

    def begin(self, first: int, frames: int, phase: Phase) -> Pass:
        call = Call(first, frames, phase, self.store.frames)
        make = getattr(self.policy, "make_pass", Pass)
        return make(self.policy.plan(call), call, self.store, self.rope)

    def forget(self) -> None:
        """Drop every frame (a recache that also renews the sink starts with this)."""
        self.store.clear()

    def free(self) -> None:
        self.store.free()


def make_memory(options, frames: int, *, layers: int, grid: tuple[int, int], head_dim: int, device) -> Memory:
    """An empty memory for one condition of a video of `frames` latent frames.

    options: those of a cache policy; grid: (rows, columns) of tokens in a latent frame.
    """
    policy = build(options, frames)
    make = getattr(policy, "make_store", Store)
    return Memory(policy, make(layers, policy.capacity, grid[0] * grid[1], policy.keys), Rope(grid, head_dim, device))


def memory_bytes(policy: Policy, **sizes: int) -> int:
    """Exact bytes that the memory of one condition will take; sizes as `store.store_bytes` names them (layers,
    frame_tokens, dim, batch, element_size)."""
    count = getattr(policy, "store_bytes", None)
    return count(**sizes) if count else store_bytes(capacity=policy.capacity, keys=policy.keys, **sizes)
