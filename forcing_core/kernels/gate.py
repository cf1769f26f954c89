"""Triton: the gated residual x + y * gate with one gate a latent frame.

torch.addcmul does the same in one pass over x and y; this saves its index arithmetic for the broadcast gate, and rounds once.
Axis legend: B batch, F latent frame, n = F*S tokens, D width. One program a token.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .grid import rows, warps


@triton.jit
def _kernel(x, y, gate, out, width, tokens, per_frame, gate_batch, gate_frame, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch, frame = row // tokens, row % tokens // per_frame
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    here = row * width + columns
    left = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(y + here, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(gate + batch * gate_batch + frame * gate_frame + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + here, (left + right * by).to(out.dtype.element_ty), mask=inside)


def gate(x: Tensor, y: Tensor, by: Tensor, out: Tensor | None = None) -> Tensor:
    """x, y [B, n, D]; by [B, F, 1, D] or [B, 1, D], neighbours along D -> [B, n, D] like x, or `out`, contiguous, of any
    type."""
    x, y, (batch, tokens, width) = x.contiguous(), y.contiguous(), x.shape
    out = x.new_empty(x.shape) if out is None else out
    block = triton.next_power_of_2(width)
    with rows(x):
        _kernel[(batch * tokens,)](x, y, by, out, width, tokens, tokens // by.shape[1], *by.stride()[:2], BLOCK=block,
                                   num_warps=warps(block))
    return out
