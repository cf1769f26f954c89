"""The short way of an ordinary pass into the store and out of it, where its frames lie in one stretch of slots each.

Most passes write their block into neighbouring slots and read slots without a gap. Where they lie is then the same for every
layer and for all passes of a block, so the views are made once, keys are rotated straight into the buffer, and no layer looks
up frames. On a small network that bookkeeping is a noticeable part of a layer's time.

Axis legend: B batch, n tokens written, m tokens read, H heads, D head_dim, p = D / 2 complex pairs.
"""
from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from .buffers import PLAIN, Layer
from .plan import Call, Plan
from .rope import HeadTable
from .store import Keys, Store

KEPT = 8  # layouts of one store; a full window that goes round has few, one that fills never comes back to any


class Views(NamedTuple):
    """Of one layer: where rotated keys go, [B, n, H, D], the same as complex64 [B, n, H, p] of a float32 buffer, where raw keys
    and values go, and the keys and values that are read, [B, m, H, D]. data: the buffers behind all of them."""

    data: Layer
    roped: Tensor
    pairs: Tensor | None
    raw: Tensor | None
    v: Tensor
    keys: Tensor
    values: Tensor


class Stretch:
    """One layout of a store: the slots that a pass writes and those that it reads."""

    def __init__(self, write: slice, read: slice, layers: int):
        self.write, self.read = write, read
        self._layers: list[Views | None] = [None] * layers

    def exchange(self, store: Store, layer: int, turn: Tensor, q: Tensor | None, k: Tensor,
                 v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """As `Pass.exchange`. turn: rotation of the call's frames, complex64 [1, n, 1, p]."""
        at = self._views(store, layer, v)
        if at.pairs is None:
            at.roped.copy_(turned(k, turn))
        else:
            torch.mul(k.view(torch.complex64), turn, out=at.pairs)
        if at.raw is not None:
            at.raw.copy_(k)
        at.v.copy_(v)
        return None if q is None else turned(q, turn), at.keys, at.values

    def _views(self, store: Store, layer: int, like: Tensor) -> Views:
        data, views = store.buffers(layer, like), self._layers[layer]
        if views is None or views.data is not data:
            write, read = (lambda t: t[:, self.write].flatten(1, 2)), (lambda t: t[:, self.read].flatten(1, 2))
            roped = write(data.roped)
            pairs = roped.view(torch.complex64) if roped.dtype == torch.float32 == like.dtype else None
            views = self._layers[layer] = Views(data, roped, pairs, None if data.raw is None else write(data.raw),
                                                write(data.v), read(data.roped), read(data.v))
        return views


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, n, H, D] rotated by complex numbers [1, n, 1, p], without gradients; math in float32."""
    return (x.float().view(torch.complex64) * turn).view(torch.float32).type_as(x)


def stretch_of(plan: Plan, call: Call, store: Store, turn: Tensor | HeadTable) -> Stretch | None:
    """The stretch of a placed plan; None where it takes the long way: for other stores than the ordinary one, keys that have to
    be turned anew, frames that are not stored, and slots with gaps. Passes with the same layout share it."""
    if type(store) is not Store or store.storage != PLAIN or store.keys is Keys.RAW or plan.own or plan.write != call.span:
        return None
    if not isinstance(turn, Tensor) or not turn.is_complex() or turn.shape[0] != 1:
        return None
    if store.keys is Keys.BOTH and any(store.positions.get(f, p) != p for f, p in zip(plan.read, plan.positions)):
        return None
    write, read = (_slots(store, frames) for frames in (plan.write, store.order(plan.read)))
    if write is None or read is None:
        return None
    key = write.start, write.stop, read.start, read.stop
    if key not in store.stretches:
        if len(store.stretches) >= KEPT:
            store.stretches.clear()
        store.stretches[key] = Stretch(write, read, store.layers)
    return store.stretches[key]


def _slots(store: Store, frames: Sequence[int]) -> slice | None:
    """The neighbouring slots of these frames, if they are that."""
    slots = [store.slots[frame] for frame in frames]
    if not slots or slots != list(range(slots[0], slots[0] + len(slots))):
        return None
    return slice(slots[0], slots[-1] + 1)
