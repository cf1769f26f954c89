"""The same things in plain torch: what other kernels have to equal, and what runs wherever they do not.

Modules are called here, never opened, so whatever a layer has become (patched, wrapped, quantised, paged) acts.
Axis legend: B batch, F latent frame, n = F*S tokens, D width. What is said of frames is [B, F, 1, D], what is said of all of
them alike is [B, 1, D].
"""
from __future__ import annotations

import torch
from torch import Tensor, nn


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """norm(x) * factor + shift of x [B, n, D]."""
    if shift.dim() == 3:
        return torch.addcmul(shift, norm(x), factor)
    return torch.addcmul(shift, norm(_frames(x, shift)), factor).flatten(1, 2)


def gate(x: Tensor, y: Tensor, by: Tensor) -> Tensor:
    """x + y * by of x, y [B, n, D]."""
    if by.dim() == 3:
        return torch.addcmul(x, y, by)
    return torch.addcmul(_frames(x, by), _frames(y, by), by).flatten(1, 2)


def call(module: nn.Module, x: Tensor) -> Tensor:
    """A norm, a linear layer or a feed-forward network, [B, n, in] -> [B, n, out]."""
    return module(x)


def embed(module: nn.Module, x: Tensor) -> Tensor:
    """Patches of x [B, C, F, h, w] as tokens [B, n, D]; the convolution is in float32."""
    return module(x.float()).to(x.dtype).flatten(2).transpose(1, 2).contiguous()


def closed(module: nn.Module, x: Tensor) -> bool:
    """Whether the parts of a head may be called in its place: here never."""
    return False


def _frames(x: Tensor, m: Tensor) -> Tensor:
    """View tokens by frame [B, F, S, D], so that what is said of frames broadcasts."""
    return x.unflatten(1, (m.shape[1], -1))
