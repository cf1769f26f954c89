"""Norms in float32 on a CPU, in fewer operations: on a small network each of them costs more to begin than to do.

torch has no RMSNorm of its own for CPUs and puts one together from nine operations; from the length of a row it takes five.
Its LayerNorm has a weight and a bias, which is all that modulation is where all frames stand at the same level.
Axis legend: B batch, n tokens, D width.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from . import plain
from .ordinary import Instead, Known, Ordinary, Work, in_float32, scalar


class Norms:
    """`norm` and `modulate` of `Kernels`. modules: which ones are nothing but their numbers; all others are called."""

    def __init__(self, modules: Ordinary):
        self._modules, self.norm = modules, Instead(self._norm)
        self._bare = Known(lambda module, x: isinstance(module, nn.LayerNorm) and module.weight is None
                           and self._is_plain(module, x))

    def modulate(self, module: nn.Module, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        """norm(x) * factor + shift of x [B, n, D]; shift and factor [B, F, 1, D] or [B, 1, D]."""
        one = shift.numel() == x.shape[-1] == factor.numel()
        if not (one and in_float32(x) and self._bare(module, x)):
            return plain.modulate(module, x, shift, factor)
        return torch.layer_norm(x, module.normalized_shape, factor.view(-1), shift.view(-1), module.eps)

    def _norm(self, module: nn.Module, x: Tensor) -> Work | None:
        """[B, n, D] -> [B, n, D]."""
        if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or not self._is_plain(module, x):
            return None
        own, shape, eps = module._parameters, module.normalized_shape, module.eps
        if isinstance(module, nn.RMSNorm):
            return lambda x: rms(x, own.get("weight"), eps)
        return lambda x: torch.layer_norm(x, shape, own.get("weight"), own.get("bias"), eps)

    def _is_plain(self, module: nn.Module, x: Tensor) -> bool:
        return self._modules(module, x) and module.normalized_shape == x.shape[-1:]


def rms(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight over the last axis of x."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    square = torch.addcmul(scalar(torch.finfo(x.dtype).eps if eps is None else eps), length, length, value=1 / x.shape[-1])
    out = x * square.rsqrt_()
    return out if weight is None else out.mul_(weight)
