"""Triton: RMSNorm over the full width, then the rotary embedding, written to where the store wants it.

Axis legend: B batch, n = F*S tokens, D = H * d width, T slots. One program a token. What the norm gives stays in float32
until it is rotated, so a rotated key is rounded once where plain torch rounds twice.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import rows, warps


@triton.jit
def _kernel(x, weight, table, slots, raw, roped, width, head, eps, tokens, per_frame, raw_batch, roped_batch,
            RAW: tl.constexpr, ROPED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    turn = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    normed = values * turn * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + token // per_frame).to(tl.int64)
    there = (slot * per_frame + token % per_frame) * width + columns
    if RAW:
        tl.store(raw + batch * raw_batch + there, normed.to(raw.dtype.element_ty), mask=inside)
    if ROPED:
        other = columns ^ 1  # the other half of the pair; it is in the cache already
        beside = tl.load(x + row * width + other, mask=inside, other=0.0).to(tl.float32) * turn
        beside *= tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
        angle = table + token * head + (columns % head) // 2 * 2
        cos = tl.load(angle, mask=inside, other=0.0)
        sin = tl.load(angle + 1, mask=inside, other=0.0)
        turned = normed * cos + tl.where(columns % 2 == 0, -beside, beside) * sin
        tl.store(roped + batch * roped_batch + there, turned.to(roped.dtype.element_ty), mask=inside)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, table: Tensor, slots: Tensor, raw: Tensor | None,
                roped: Tensor | None) -> None:
    """Write the normed x [B, n, D] to `raw` and rotated to `roped`, each [B, T, S, H, d] or None, every sample of them
    contiguous; frame i goes to slot slots[i].

    weight: [D]. table: complex64 [1, n, 1, d / 2]. slots: integers [F] on the device of x.
    """
    x, (batch, tokens, width) = x.contiguous(), x.shape
    turns = torch.view_as_real(table).contiguous()
    block = triton.next_power_of_2(width)
    some = raw if roped is None else roped
    with rows(x):
        _kernel[(batch * tokens,)](x, weight, turns, slots, x if raw is None else raw, x if roped is None else roped, width,
                                   some.shape[-1], eps, tokens, some.shape[2], 0 if raw is None else raw.stride(0),
                                   0 if roped is None else roped.stride(0), RAW=raw is not None, ROPED=roped is not None,
                                   BLOCK=block, num_warps=warps(block))
