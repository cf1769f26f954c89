"""Triton: LayerNorm without weights and the modulation behind it, x * factor + shift, with one read and one write of x.

Axis legend: B batch, F latent frame, n = F*S tokens, D width. One program a token; sums and the modulation in float32,
rounded once at the end.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .grid import rows, warps


@triton.jit
def _kernel(x, shift, factor, out, width, eps, tokens, per_frame, shift_batch, shift_frame, factor_batch, factor_frame,
            BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch, frame = row // tokens, row % tokens // per_frame
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    add = tl.load(shift + batch * shift_batch + frame * shift_frame + columns, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(factor + batch * factor_batch + frame * factor_frame + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (normed * by + add).to(out.dtype.element_ty), mask=inside)


def modulate(x: Tensor, shift: Tensor, factor: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x [B, n, D]; shift, factor [B, F, 1, D] or [B, 1, D], neighbours along D -> [B, n, D] like x, or `out`, contiguous, of
    any type."""
    x, (batch, tokens, width) = x.contiguous(), x.shape
    out = x.new_empty(x.shape) if out is None else out
    block = triton.next_power_of_2(width)
    with rows(x):
        _kernel[(batch * tokens,)](x, shift, factor, out, width, eps, tokens, tokens // shift.shape[1], *shift.stride()[:2],
                                   *factor.stride()[:2], BLOCK=block, num_warps=warps(block))
    return out
