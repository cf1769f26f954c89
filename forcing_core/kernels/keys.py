"""Queries and keys straight from their projections into the store: norm, rotation and writing in one kernel each.

What a pass does is told in `passes.py`; this is the same order of work - write, align, read - for the ordinary pass over
the ordinary store. All others meet memory as everywhere.
"""
from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..buffers import PLAIN as AS_IT_IS
from ..passes import Pass
from ..store import Store
from .ordinary import Ordinary

Meet = Callable[..., tuple[Tensor | None, Tensor, Tensor]]


def can_meet(now: Any) -> bool:
    """Whether this pass writes all of its frames, attends to nothing that is not stored, and nobody watches or changes it."""
    if type(now) is not Pass or "exchange" in vars(now) or type(now.store) is not Store:
        return False
    whole = now.plan.write == now.call.span and not now.plan.own
    turn = now.turn
    return whole and now.store.storage == AS_IT_IS and isinstance(turn, Tensor) and turn.is_complex() and turn.shape[0] == 1


class Meeting:
    """`exchange` of one pass for projections that no norm has seen. ordinary: which norms may be taken apart."""

    def __init__(self, now: Pass, ordinary: Ordinary):
        from .rotate import norm_rotate  # needs Triton

        self.now, self.ordinary, self.kernel = now, ordinary, norm_rotate
        self._slots: Tensor | None = None

    def __call__(self, layer: int, attention: nn.Module, heads: int, q: Tensor | None, k: Tensor,
                 v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """q, k [B, n, D] as projected, v [B, n, H, d] -> (rotated q, keys, values), [B, n, H, d] each."""
        now, norms = self.now, (attention.norm_q, attention.norm_k)
        if not all(self.ordinary(norm, k) and norm.weight is not None for norm in norms):
            q = None if q is None else _by_head(attention.norm_q(q), heads)
            return now.exchange(layer, q, _by_head(attention.norm_k(k), heads), v)
        self._write(layer, attention.norm_k, k, v)
        return now.met(layer, None if q is None else self._query(attention.norm_q, q, v), None, v)

    def _write(self, layer: int, norm: nn.Module, k: Tensor, v: Tensor) -> None:
        call = self.now.call
        data, runs = self.now.store.spots(layer, call.span, v)
        if self._slots is None:  # made on the device: a copy from the host could not be part of a CUDA graph
            self._slots = torch.cat([torch.arange(slot, slot + stop - start, device=k.device) for start, stop, slot in runs])
        by_frame = v.unflatten(1, (call.frames, -1))
        for start, stop, slot in runs:
            data.v[:, slot:slot + stop - start] = by_frame[:, start:stop]
        self.kernel(k, norm.weight, _eps(norm, k), self.now.turn, self._slots, data.raw, data.roped)

    def _query(self, norm: nn.Module, q: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], self.now.call.frames, q.shape[1] // self.now.call.frames, *v.shape[2:])
        own = torch.arange(self.now.call.frames, device=q.device)
        self.kernel(q, norm.weight, _eps(norm, q), self.now.turn, own, None, out)
        return out.flatten(1, 2)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1))


def _eps(norm: nn.Module, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
