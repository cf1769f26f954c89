"""Passes driven by hand: random queries, keys and values in place of a network, and what every pass gave to attend to.

For tests that compute by themselves what a policy's passes must give. Axis legend: [B, n, H, 128]; two tokens a frame
stand for a picture.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.plan import Call, Plan, context_chunks, layout
from torch import Tensor

GRID, HEADS, HEAD_DIM, LAYERS = (1, 2), 2, 128, 2
TOKENS = GRID[0] * GRID[1]
PHASES = ("noisy", "noisy", "clean")  # of every generated block


@dataclass(frozen=True)
class Seen:
    """One layer of one pass: what the network gave (q, k, v) and what it got back (turned; keys and values, whole
    frames in temporal order)."""

    call: Call
    plan: Plan
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    turned: Tensor
    keys: Tensor
    values: Tensor

    @property
    def opens(self) -> bool:
        """Whether this is the first pass over these frames."""
        return self.call.first not in self.call.held


def script(options, frames: int, given: int = 0) -> list[tuple[int, int, str]]:
    """(first, frames, phase) of every pass of a block rollout."""
    spans = [(first, count, "clean") for first, count in context_chunks(given, options.block)]
    blocks = layout(frames - given, options.block, given=given)
    return spans + [(b.first, b.frames, phase) for b in blocks for phase in PHASES]


def memory(options, frames: int):
    return make_memory(options, frames, layers=LAYERS, grid=GRID, head_dim=HEAD_DIM, device="cpu")


def play(options, frames: int, *, given: int = 0, batch: int = 1, seed: int = 0, dtype=torch.float32, passes=None,
         into=None) -> list[Seen]:
    """All passes of a block rollout, or those of `passes`; every pass has numbers of its own, those of a sample depend
    on its place in the batch only. into: a memory to go on with."""
    now, seen = into or memory(options, frames), []
    draws = [torch.Generator().manual_seed(1000 * seed + sample) for sample in range(batch)]
    for first, count, phase in passes or script(options, frames, given):
        step = now.begin(first, count, phase)
        for layer in range(LAYERS):
            q, k, v = torch.stack([torch.randn(3, count * TOKENS, HEADS, HEAD_DIM, generator=draw) for draw in draws],
                                  dim=1).to(dtype)
            turned, keys, values = step.exchange(layer, q, k, v)
            seen.append(Seen(step.call, step.plan, layer, q, k, v, turned,
                             *(_in_time(now.store, step.plan, t) for t in (keys, values))))
    return seen


def _in_time(store, plan: Plan, read: Tensor) -> Tensor:
    """A copy of what was read with its frames in temporal order, where the store has another."""
    if not hasattr(store, "order"):
        return read.clone()
    order = store.order(plan.read)
    return read.unflatten(1, (-1, TOKENS))[:, [order.index(f) for f in plan.read]].flatten(1, 2)
