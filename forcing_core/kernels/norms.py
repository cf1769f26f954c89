"""Norms in float32 on a CPU, in fewer operations: on a small network each of them costs more to begin than to do.

torch has no RMSNorm of its own for CPUs and puts one together from nine operations; from the length of a row it takes five.
Its LayerNorm has a weight and a bias, which is all that modulation is where all frames stand at the same level.
Axis legend: B batch, n tokens, D width.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from . import plain
from .ordinary import Known, Ordinary, in_float32, numbers


class Norms:
    """`norm` and `modulate` of `Kernels`. modules: which ones are nothing but their numbers; all others are called."""

    def __init__(self, modules: Ordinary):
        self._plain = Known(lambda module, x: isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and modules(module, x)
                            and module.normalized_shape == x.shape[-1:])

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        if not (in_float32(x) and self._plain(module, x)):
            return module(x)
        weight, bias = numbers(module)
        if isinstance(module, nn.RMSNorm):
            return rms(x, weight, module.eps)
        return torch.layer_norm(x, module.normalized_shape, weight, bias, module.eps)

    def modulate(self, module: nn.Module, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        """norm(x) * factor + shift of x [B, n, D]; shift and factor [B, F, 1, D] or [B, 1, D]."""
        one = shift.numel() == x.shape[-1] == factor.numel() and isinstance(module, nn.LayerNorm)
        if not one or numbers(module)[0] is not None or not (in_float32(x) and self._plain(module, x)):
            return plain.modulate(module, x, shift, factor)
        return torch.layer_norm(x, module.normalized_shape, factor.view(-1), shift.view(-1), module.eps)


def rms(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight over the last axis of x."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    square = torch.addcmul(_scalar(torch.finfo(x.dtype).eps if eps is None else eps), length, length, value=1 / x.shape[-1])
    out = x * square.rsqrt_()
    return out if weight is None else out.mul_(weight)


@functools.cache
def _scalar(number: float) -> Tensor:
    return torch.tensor(number, device="cpu")  # whatever the default device is
