"""A drawn face: identity parameters, head pose and mouth opening in, pictures out.

    who = identities(seed=1, n=4)
    drive = track(seed=2, n=4, frames=81)         # [4, 4, 81]: yaw, pitch, roll, mouth
    video = paint(who, drive)                     # [4, 3, 81, 64, 64] in [-1, 1]
    still = reference(who)                        # [4, 3, 64, 64], looking straight ahead, mouth closed
    pose = driver(drive)                          # the same motion on a faceless puppet

Axes: B faces, T frames, H rows, W columns. A face is a list of ellipses in head units (half the head's height is 1,
x right, y down); z is how far a part lies in front of the head's axis, which is what turning moves.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import mix

SKIN = ((1.00, 0.87, 0.77), (0.95, 0.76, 0.62), (0.83, 0.61, 0.45), (0.66, 0.45, 0.31), (0.45, 0.29, 0.20))
HAIR = ((0.08, 0.07, 0.07), (0.33, 0.20, 0.11), (0.85, 0.68, 0.32), (0.65, 0.25, 0.10), (0.70, 0.70, 0.72))
EYES = ((0.20, 0.40, 0.80), (0.15, 0.55, 0.30), (0.40, 0.22, 0.10), (0.35, 0.40, 0.45))
SHIRT = ((0.75, 0.20, 0.25), (0.20, 0.35, 0.70), (0.20, 0.50, 0.35), (0.90, 0.90, 0.90))
WALL = ((0.16, 0.18, 0.22), (0.55, 0.65, 0.72), (0.93, 0.91, 0.87))
_TABLES = {"skin": SKIN, "hair": HAIR, "eyes": EYES, "shirt": SHIRT, "wall": WALL}
_FIXED = {"white": (0.97, 0.97, 0.97), "dark": (0.10, 0.05, 0.07), "lips": (0.72, 0.28, 0.30)}
_HEAD = 0.30  # half the head's height over the picture's height
_CENTRE = (0.5, 0.47)
Identity = dict[str, Tensor]


class Part(NamedTuple):
    """One ellipse. `wide`: x and rx are shares of the head's half width; `jaw`: rx of the jaw's too; `shade`
    darkens the colour; `open`: how much the mouth's opening adds to ry; `body`: stays when the head turns."""

    colour: str
    x: float
    y: float
    rx: float
    ry: float
    z: float = 0.0
    shade: float = 1.0
    open: float = 0.0
    wide: bool = False
    jaw: bool = False
    body: bool = False


def _pair(colour: str, x: float, *rest: float, **more) -> tuple[Part, Part]:
    return Part(colour, -x, *rest, **more), Part(colour, x, *rest, **more)


PARTS = (
    Part("hair", 0.0, -0.12, 1.16, 1.02, -0.35, wide=True),
    Part("shirt", 0.0, 1.85, 1.35, 0.75, body=True),
    Part("skin", 0.0, 1.0, 0.36, 0.42, shade=0.82, body=True),
    *_pair("skin", 0.98, 0.05, 0.14, 0.2, -0.1, 0.9, wide=True),
    Part("skin", 0.0, 0.0, 1.0, 0.9, wide=True),
    Part("skin", 0.0, 0.45, 1.0, 0.58, 0.1, wide=True, jaw=True),
    Part("hair", 0.0, -0.86, 0.86, 0.36, 0.35, wide=True),
    *_pair("white", 0.36, -0.08, 0.2, 0.13, 0.75),
    *_pair("eyes", 0.36, -0.08, 0.115, 0.125, 0.78),
    *_pair("dark", 0.36, -0.08, 0.05, 0.06, 0.79),
    *_pair("hair", 0.36, -0.32, 0.22, 0.055, 0.75, 0.7),
    Part("skin", 0.0, 0.2, 0.1, 0.17, 0.95, 0.82),
    Part("lips", 0.0, 0.58, 0.32, 0.075, 0.8, open=0.2),
    Part("dark", 0.0, 0.58, 0.25, 0.0, 0.8, open=0.2),
)
_PUPPET = {"skin": (0.5, 0.5, 0.5), "hair": (0.35, 0.35, 0.35), "eyes": (0.1, 0.1, 0.1), "shirt": (0.25, 0.25, 0.25),
           "wall": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "dark": (0.0, 0.0, 0.0), "lips": (1.0, 0.2, 0.2)}


def identities(seed: int, n: int, device: torch.device | str = "cpu") -> Identity:
    """n random people: indices of the colour tables [n], `width` [n] (half width of the head) and `jaw` [n]."""
    generator = torch.Generator("cpu").manual_seed(mix(seed, 0xFACE))
    u = torch.rand(n, 7, generator=generator).to(device)
    out = {name: (u[:, i] * len(table)).long().clamp_max(len(table) - 1)
           for i, (name, table) in enumerate(_TABLES.items())}
    out["width"] = 0.70 + 0.16 * u[:, 5]
    out["jaw"] = 0.58 + 0.30 * u[:, 6]
    return out


def track(seed: int, n: int, frames: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """[n, 4, frames] of frames start ..: yaw, pitch, roll in radians and mouth opening in 0 .. 1.

    Slow sums of two sines for the pose; the mouth opens every one and a half seconds (16 fps) and pauses now and then: a
    code with 16 numbers for a cell of four frames shows hardly more than their mean, so faster speech would be lost.
    Closed forms: a longer track has the shorter one as its prefix.
    """
    generator = torch.Generator("cpu").manual_seed(mix(seed, 0x7AC4))
    u = torch.rand(n, 4, 4, 1, generator=generator, dtype=torch.float64).to(device)
    time = torch.arange(start, start + frames, device=device, dtype=torch.float64)
    slow = torch.sin(2 * math.pi * (time / (40 + 50 * u[:, :, 0]) + u[:, :, 1]))
    fast = torch.sin(2 * math.pi * (time / (22 + 14 * u[:, :, 2]) + u[:, :, 3]))
    reach = torch.tensor([0.36, 0.2, 0.14], device=device, dtype=time.dtype)[:, None]
    pose = reach * (0.7 * slow[:, :3] + 0.3 * fast[:, :3])
    syllable = torch.sin(2 * math.pi * (time / (22 + 8 * u[:, 3, 2]) + u[:, 3, 3])).clamp_min(0)
    speaking = (1.5 * slow[:, 3] + 1.0).clamp(0, 1)
    return torch.cat([pose, (syllable * speaking)[:, None]], 1).float()


def eased(drive: Tensor, frames: int = 16) -> Tensor:
    """The track [B, 4, T] with a start from rest, as in a reference picture, over its first `frames` frames."""
    ramp = torch.arange(drive.shape[2], device=drive.device).div(frames).clamp_max(1)
    return drive * ramp


def _coverage(x: Tensor, y: Tensor, rx: Tensor, ry: Tensor, pixels: float) -> Tensor:
    """Share of each pixel inside an ellipse at the origin, from a first-order distance. Overwrites x, y [B, T, H, W]."""
    x, y = x.square_() / (rx * rx), y.square_() / (ry * ry)
    radius = (x + y).sqrt_()
    slope = (x / (rx * rx) + y / (ry * ry)).sqrt_().clamp_min_(1e-4)
    return ((radius - 1).mul_(radius) / slope).mul_(-pixels).add_(0.5).clamp_(0, 1)


def _grids(roll: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Coordinates in head units of the upright body and of the rolled head, each ([B, T, H, W] x, y)."""
    pixel = (torch.arange(size, device=roll.device) + 0.5) / size
    x, y = ((pixel - c) / _HEAD for c in _CENTRE)
    y, x = torch.meshgrid(y, x, indexing="ij")
    sin, cos = roll.sin()[..., None, None], roll.cos()[..., None, None]
    return (x[None, None], y[None, None]), (cos * x + sin * y, cos * y - sin * x)


def _draw(colours: dict[str, Tensor], width: Tensor, jaw: Tensor, drive: Tensor, size: int) -> Tensor:
    """colours: name -> [B, C] in [0, 1]; width, jaw [B]; drive [B, 4, T]. [B, C, T, size, size] in [-1, 1]."""
    yaw, pitch, roll, mouth = (v[..., None, None] for v in drive.unbind(1))
    body, head = _grids(drive[:, 2], size)
    pixels = size * _HEAD
    video = (2 * colours["wall"] - 1)[..., None, None, None]
    for part in PARTS:
        unit = width if part.wide else torch.ones_like(width)
        rx = (part.rx * unit * (jaw if part.jaw else 1))[:, None, None, None]
        ry = (part.ry + part.open * mouth).clamp_min(0.01)
        x, y = (part.x * unit)[:, None, None, None], part.y
        grid = body if part.body else head
        if not part.body:
            x, y = x * yaw.cos() + part.z * yaw.sin(), y * pitch.cos() + part.z * pitch.sin()
            rx = rx * (1 - 0.5 * max(part.z, 0) * (1 - yaw.cos()))
        covered = _coverage(grid[0] - x, grid[1] - y, rx, ry, pixels)
        colour = (2 * colours[part.colour] * part.shade - 1)[..., None, None, None]
        video = torch.lerp(video, colour, covered[:, None])
    return video


def paint(who: Identity, drive: Tensor, size: int = 64) -> Tensor:
    """Video [B, 3, T, size, size] in [-1, 1] of people `who` moved by `drive` [B, 4, T]."""
    device = drive.device
    colours = {name: torch.tensor(table, device=device)[who[name]] for name, table in _TABLES.items()}
    colours |= {name: torch.tensor([rgb], device=device) for name, rgb in _FIXED.items()}
    return _draw(colours, who["width"], who["jaw"], drive, size)


def reference(who: Identity, size: int = 64) -> Tensor:
    """Picture [B, 3, size, size] in [-1, 1]: straight ahead, mouth closed."""
    still = torch.zeros(len(who["width"]), 4, 1, device=who["width"].device)
    return paint(who, still, size)[:, :, 0]


def driver(drive: Tensor, size: int = 64) -> Tensor:
    """Driving video [B, 3, T, size, size] in [-1, 1]: a gray puppet, so pose and mouth without identity."""
    colours = {name: torch.tensor([rgb], device=drive.device) for name, rgb in _PUPPET.items()}
    plain = torch.ones(len(drive), device=drive.device)
    return _draw(colours, 0.78 * plain, 0.7 * plain, drive, size)


def labels(who: Identity, drive: Tensor, size: int = 64) -> Tensor:
    """Where each of the identity's colours is seen, [B, 5, T, size, size] bool in the order of skin, hair, eyes, shirt and
    wall; mixed pixels and darkened parts are left out."""
    names = (*_TABLES, *_FIXED)
    hot = torch.eye(len(names), device=drive.device)
    seen = _draw({name: hot[i:i + 1] for i, name in enumerate(names)}, who["width"], who["jaw"], drive, size)
    return seen[:, :len(_TABLES)] > 0.8


def mouth_window(drive: Tensor, size: int = 64) -> Tensor:
    """Where a mouth can be, [B, T, size, size] bool: what the widest opening covers, moved with the head."""
    lips = PARTS[-2]
    yaw, pitch = drive[:, 0, :, None, None], drive[:, 1, :, None, None]
    _, (x, y) = _grids(drive[:, 2], size)
    x = (x - lips.z * yaw.sin()) / lips.rx
    y = (y - lips.y * pitch.cos() - lips.z * pitch.sin()) / (lips.ry + lips.open)
    return x.square() + y.square() < 1
