"""Where a thing is at any time: closed forms, so that minute 10 costs what second 1 costs and a longer clip
has the shorter one as its prefix.

Axes: [B, K, T, 2] = clips, things, frames, (x, y). Pixels of a 64-pixel frame, y down; time in frames; float64,
because a path unfolds over thousands of pixels.
"""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from .names import LAWS

FRAME = 64.0
REACH = 0.33  # radius of circles and swings, as a share of the smaller side of the room
PERIOD = 48.0  # frames between two moments of rest of a speeding thing


def room(half: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest centre, each [..., 2], for a thing of half extents `half` [..., 2]."""
    return half, FRAME - half


def reach(half: Tensor) -> Tensor:
    """Radius of the path of circling and swinging things, [...] px."""
    low, high = room(half)
    return REACH * (high - low).amin(-1)


def fold(point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A straight path folded into [low, high]: elastic bounces for ever."""
    width = high - low
    return low + width - ((point - low).remainder(2 * width) - width).abs()


def _moving(step: Tensor, time: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    along = step * time
    return along, torch.zeros_like(along)


def _speeding(step: Tensor, time: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Starts at a fifth of its mean speed, then 0.2 to 1.8 of it in turn."""
    phase = 2 * torch.pi / PERIOD
    along = step * (time - 0.8 * torch.sin(phase * time) / phase)
    return along, torch.zeros_like(along)


def _circling(step: Tensor, time: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Points along the heading after four frames, so that its first eight lead that way."""
    angle = step * (time - 4) / radius
    return radius * torch.sin(angle), -radius * torch.cos(angle)


def _swinging(step: Tensor, time: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A pendulum's flat arc through the centre of the path."""
    swing = torch.sin(step * time / radius)
    return radius * swing, 0.3 * radius * (0.5 - swing.square())


# (speed, time, radius) -> distance along the heading and across it; order of names.LAWS.
PATHS: tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], ...] = (
    _moving, _speeding, _circling, _swinging)
assert len(PATHS) == len(LAWS)


def centres(law: Tensor, start: Tensor, heading: Tensor, speed: Tensor, half: Tensor, time: Tensor) -> Tensor:
    """Centres [B, K, T, 2] at the frames `time` [T].

    law [B, K] int; start [B, K, 2] px, for circling and swinging the centre of the path; heading [B, K] radians;
    speed [B, K] px/frame; half [B, K, 2] px.
    """
    heading, step, radius = (v.double().unsqueeze(-1) for v in (heading, speed, reach(half)))
    time = time.double()
    ways = [torch.stack(path(step, time, radius), -1) for path in PATHS]
    way = torch.stack(ways).gather(0, law[None, ..., None, None].expand(1, *ways[0].shape))[0]
    ahead = torch.stack([heading.cos(), heading.sin()], -1)
    across = torch.stack([-heading.sin(), heading.cos()], -1)
    point = start.double().unsqueeze(-2) + way[..., :1] * ahead + way[..., 1:] * across
    low, high = room(half.double().unsqueeze(-2))
    return fold(point, low, high)
