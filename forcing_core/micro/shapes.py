"""Shapes with analytic anti-aliasing.

Axes: N things, T frames, H rows, W columns. Distances in pixels of the picture that is drawn.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .names import SHAPES

# Half width and half height over the radius. Areas 3.1, 3.2 and 2.3 radius^2; the triangle is equilateral, tip up.
_HALF = {"circle": (1.0, 1.0), "square": (0.9, 0.9), "triangle": (1.15, 1.15 * 0.75 ** 0.5)}


def half_extents(shape: Tensor, radius: Tensor) -> Tensor:
    """[...] int and [...] px -> [..., 2] px, half width and half height of the bounding box."""
    table = torch.tensor([_HALF[name] for name in SHAPES], dtype=radius.dtype, device=radius.device)
    return table[shape] * radius.unsqueeze(-1)


def _inside(distance: Tensor) -> Tensor:
    """Signed distance, negative inside -> share of the pixel that is covered; overwrites its argument."""
    return distance.neg_().add_(0.5).clamp_(0, 1)


def _circle(dx: Tensor, dy: Tensor, half: Tensor) -> Tensor:
    return _inside((dx.square() + dy.square()).sqrt_().sub_(half[..., :1]))


def _square(dx: Tensor, dy: Tensor, half: Tensor) -> Tensor:
    return _inside(dx.abs() - half[..., :1]) * _inside(dy.abs() - half[..., 1:])


def _triangle(dx: Tensor, dy: Tensor, half: Tensor) -> Tensor:
    side = _inside(dx.abs() * 0.75 ** 0.5 - 0.5 * (dy + half[..., 1:]))
    return side.mul_(_inside(dy - half[..., 1:]))


_COVERAGE = (_circle, _square, _triangle)


def coverage(shape: Tensor, half: Tensor, centre: Tensor, size: int) -> Tensor:
    """[N, T, size, size] in [0, 1]: how much of each pixel the thing covers.

    shape [N] int; half [N, 2] px; centre [N, T, 2] px. Each shape is computed only for the things that have it.
    """
    pixel = torch.arange(size, device=centre.device, dtype=torch.float64) + 0.5
    dx = (pixel - centre[..., :1]).float().unsqueeze(-2)
    dy = (pixel - centre[..., 1:]).float().unsqueeze(-1)
    half = half.float()[:, None, None]
    out = dx.new_empty(*centre.shape[:2], size, size)
    for code, draw in enumerate(_COVERAGE):
        rows = (shape == code).nonzero()[:, 0]
        if len(rows):
            out[rows] = draw(dx[rows], dy[rows], half[rows])
    return out
