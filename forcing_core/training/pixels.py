"""Pictures as numbers: the foreground of a clip, a loss that does not drown in the background, and decibels.

Shapes cover 4 to 9 per cent of the pixels. Videos are [B, 3, T, H, W] in [-1, 1], masks [B, 1, T, H, W].
"""
from __future__ import annotations

import torch
from torch import Tensor


def foreground(video: Tensor, threshold: float = 0.1) -> Tensor:
    """Mask of the pixels that differ from their clip's background, its median colour, in any channel."""
    background = video[:, :, ::4, ::2, ::2].flatten(2).median(dim=2).values
    return (video - background[:, :, None, None, None]).abs().amax(1, keepdim=True) > threshold


def pixel_loss(made: Tensor, video: Tensor, mask: Tensor, weight: float, l1: float) -> Tensor:
    """Mean of squared plus l1 times absolute error; pixels of the mask count `weight` times."""
    error = made.float() - video
    weights = 1 + (weight - 1) * mask
    return ((error.square() + l1 * error.abs()) * weights).mean() / weights.mean()


class ErrorSums:
    """Squared errors of made videos, over all pixels and over the foreground; float64 on the device."""

    def __init__(self):
        self._sums: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, made: Tensor, video: Tensor, mask: Tensor) -> ErrorSums:
        error = (made.float() - video).square().mean(1, keepdim=True)
        pixels = torch.tensor(float(mask.numel()), device=mask.device)
        self._sums = self._sums + torch.stack([error.sum(), pixels, (error * mask).sum(), mask.sum()]).double()
        return self

    def psnr(self) -> tuple[float, float]:
        """dB over all pixels and over the foreground; 100 where nothing differs."""
        error, pixels, shape_error, shape_pixels = self._sums.tolist()
        return _decibels(error, pixels), _decibels(shape_error, shape_pixels)

    def share(self) -> float:
        """Share of the pixels that are foreground."""
        _, pixels, _, shape_pixels = self._sums.tolist()
        return shape_pixels / pixels


def _decibels(error: float, pixels: float) -> float:
    mean = max(error / max(pixels, 1.0), 4e-10)
    return float(10 * torch.log10(torch.tensor(4 / mean)))
