"""The same three things in plain torch: what the Triton kernels have to equal, and what runs wherever they do not.

Modules are called here, never opened, so whatever a norm has become (patched, wrapped, quantised, paged) acts.
Axis legend: B batch, F latent frame, n = F*S tokens, D width. What is said of frames is [B, F, 1, D], what is said of all of
them alike is [B, 1, D].
"""
from __future__ import annotations

import torch
from torch import Tensor, nn


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift of x [B, n, D]."""
    if shift.dim() == 3:
        return torch.addcmul(shift, norm(x), 1 + scale)
    return torch.addcmul(shift, norm(_frames(x, shift)), 1 + scale).flatten(1, 2)


def gate(x: Tensor, y: Tensor, by: Tensor) -> Tensor:
    """x + y * by of x, y [B, n, D]."""
    if by.dim() == 3:
        return torch.addcmul(x, y, by)
    return torch.addcmul(_frames(x, by), _frames(y, by), by).flatten(1, 2)


def normed(norm: nn.Module, x: Tensor, heads: int) -> Tensor:
    """norm(x) of x [B, n, D], as heads [B, n, H, d]."""
    return norm(x).view(*x.shape[:2], heads, -1)


def _frames(x: Tensor, m: Tensor) -> Tensor:
    """View tokens by frame [B, F, S, D], so that what is said of frames broadcasts."""
    return x.unflatten(1, (m.shape[1], -1))
