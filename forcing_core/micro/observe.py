"""What is seen in the frames of a clip, without a learned judge: background, things, their colour, shape, place.

Made for decoded pictures as well as clean ones: soft edges, a few per cent of noise and of colour error.

Axes: [..., T, K] = clips, frames, things (largest first). Lengths in pixels, colours RGB in [0, 1].
"""
from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from .names import COLOURS, rgb

SEEN = 0.2  # RGB distance from the background (0 .. 1.73) from which a pixel belongs to a thing
LEAST = 12  # pixels; smaller spots are noise
NONE = -1  # no colour, no shape
_CHUNK = {"cpu": 64}  # frames worked on at once; 1024 on other devices
_COLOUR_LIMIT = 0.30
_SHAPE_LIMIT = 0.25
# (triangularity, squareness, compactness) of circle, square, triangle: order of names.SHAPES.
_PROTOTYPES = ((0.0, 0.0, 1.0), (0.0, 0.36, 0.96), (0.72, 0.0, 0.85))


@dataclass(frozen=True)
class Observation:
    """background [..., T, 3]; objects [..., T] how many separate things; and per thing [..., T, K], NaN or NONE
    where there is none: centre [..., 2] (x, y); area px; tint [..., 3] mean RGB; colour and shape indices;
    purity: share of its pixels that have its colour's name; edge: it touches the border of the frame."""

    background: Tensor
    objects: Tensor
    centre: Tensor
    area: Tensor
    tint: Tensor
    colour: Tensor
    shape: Tensor
    purity: Tensor
    edge: Tensor


def frames_of(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] (as networks and renderers have it) -> [B, T, 3, H, W] (as this module has it)."""
    return video.transpose(-4, -3)


def components(mask: Tensor) -> Tensor:
    """Connected regions of mask [N, H, W] (8 neighbours) -> label [N, H*W]: 0 outside, else 1 + index of a pixel of
    the region, the same all over it.

    The largest index spreads by 3x3 maxima, and every pixel then takes the label of its label, so that distances
    double: a few rounds where plain spreading needs one a pixel.
    """
    n, h, w = mask.shape
    inside = mask.flatten(1)
    start = torch.arange(1, h * w + 1, device=mask.device, dtype=torch.float32)
    label = start * inside
    while True:
        before = label
        for _ in range(3):
            label = max_pool2d(label.view(n, h, w), 3, 1, 1).flatten(1) * inside
            label = torch.maximum(label, label.gather(1, (label.long() - 1).clamp_min(0)) * inside)
        if torch.equal(before, label):
            return label.long()


def _regions(mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """mask [N, H, W] -> how many regions of LEAST pixels or more [N], and the k largest [N, k, H, W]."""
    label = components(mask)
    sizes = label.new_zeros(label.shape[0], label.shape[1] + 1)
    sizes.scatter_add_(1, label, torch.ones_like(label))
    sizes[:, 0] = 0
    count, which = sizes.topk(k, 1)
    region = (label.unsqueeze(1) == which.unsqueeze(2)) & (count >= LEAST).unsqueeze(2)
    return (sizes >= LEAST).sum(1), region.unflatten(2, mask.shape[1:])


def background_of(frames: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 3], the median of a two-pixel border: things cover less than half of it."""
    rows = torch.cat([frames[:, :, :2].flatten(2), frames[:, :, -2:].flatten(2),
                      frames[:, :, 2:-2, :2].flatten(2), frames[:, :, 2:-2, -2:].flatten(2)], 2)
    return rows.median(2).values


def _named(device: torch.device) -> tuple[Tensor, Tensor]:
    """The named colours in (half lightness, red-green, yellow-blue), where hue counts more than brightness:
    [6, 3], and the matrix [3, 3] from RGB columns to that space."""
    space = torch.tensor([[1 / 6, 1 / 6, 1 / 6], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]], device=device)
    return rgb(COLOURS, device) @ space.T, space


def colour_names(colour: Tensor) -> Tensor:
    """RGB [..., 3] -> index of the nearest named colour, NONE where none is near."""
    named, space = _named(colour.device)
    distance, index = ((colour @ space.T).unsqueeze(-2) - named).square().sum(-1).min(-1)
    return torch.where(distance.sqrt() < _COLOUR_LIMIT, index, NONE)


def _pixel_names(frames: Tensor) -> Tensor:
    """frames [N, 3, H, W] -> [N, H, W] index of the nearest named colour, however far."""
    named, space = _named(frames.device)
    score = torch.einsum("kc,nchw->nkhw", named @ space, frames) - 0.5 * named.square().sum(1)[:, None, None]
    return score.argmax(1)


def _powers(offset: Tensor) -> Tensor:
    """[N, K, n] -> [N, K, n, 5], powers 0 .. 4."""
    return torch.stack([torch.ones_like(offset), offset, offset ** 2, offset ** 3, offset ** 4], -1)


def _signature(weight: Tensor, centre: Tensor) -> Tensor:
    """weight [N, K, H, W], centre [N, K, 2] -> [N, K, 4]: moments that no turn, shift or scale changes, 0 .. 1.

    With z = x + iy and |z|^2 = r^2: elongation |sum z^2| / sum r^2, triangularity |sum z^3| / (sum r^2)^1.5 *
    area^0.5, squareness |sum z^4| / sum r^4, and compactness area^2 / (2 pi sum r^2), which is 1 for a disc.
    """
    h, w = weight.shape[-2:]
    x = _powers(torch.arange(w, device=weight.device) + 0.5 - centre[..., :1])
    y = _powers(torch.arange(h, device=weight.device) + 0.5 - centre[..., 1:])
    m = (y.transpose(-1, -2) @ weight @ x).permute(3, 2, 0, 1)  # m[a, b]: sum of x^a y^b
    area, spread = m[0, 0], m[2, 0] + m[0, 2]
    two = torch.hypot(m[2, 0] - m[0, 2], 2 * m[1, 1]) / spread
    three = torch.hypot(m[3, 0] - 3 * m[1, 2], 3 * m[2, 1] - m[0, 3]) / spread ** 1.5 * area.sqrt()
    four = torch.hypot(m[4, 0] - 6 * m[2, 2] + m[0, 4], 4 * (m[3, 1] - m[1, 3]))
    four = four / (m[4, 0] + 2 * m[2, 2] + m[0, 4])
    return torch.stack([two, three, four, area.square() / (2 * torch.pi * spread)], -1)


def shape_names(signature: Tensor) -> Tensor:
    """[..., 4] -> index of the nearest shape, NONE where none is near (long, hollow, in pieces)."""
    known = signature.new_tensor(_PROTOTYPES)
    distance, index = (signature[..., 1:].unsqueeze(-2) - known).square().sum(-1).min(-1)
    near = (distance.sqrt() < _SHAPE_LIMIT) & (signature[..., 0] < _SHAPE_LIMIT)
    return torch.where(near, index, NONE)


def _colours(frames: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """frames [N, 3, H, W], core [N, K, H, W] 0/1 -> mean RGB [N, K, 3], its name and its purity [N, K]."""
    total = core.sum((-2, -1))
    tint = torch.einsum("nkhw,nchw->nkc", core, frames) / total.unsqueeze(-1)
    name = colour_names(tint)
    each = _pixel_names(frames).unsqueeze(1)
    return tint, name, (core * (each == name[..., None, None])).sum((-2, -1)) / total


def _touches(solid: Tensor) -> Tensor:
    """solid [N, K, H, W] bool -> [N, K]: within a pixel of the frame's border."""
    return (solid[..., :2, :].any(-1).any(-1) | solid[..., -2:, :].any(-1).any(-1)
            | solid[..., :2].any(-1).any(-1) | solid[..., -2:].any(-1).any(-1))


def _observe(frames: Tensor, k: int) -> Observation:
    """frames [N, 3, H, W] in [0, 1]."""
    background = background_of(frames)
    smooth = avg_pool2d(pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    distance = (smooth - background[..., None, None]).square().sum(1).sqrt()
    objects, region = _regions(distance > SEEN, k)
    inside = distance.unsqueeze(1) * region
    strong = inside > 0.6 * inside.amax((-2, -1), keepdim=True)
    height = (inside * strong).sum((-2, -1)) / strong.sum((-2, -1))
    relative = inside / height[..., None, None]
    weight = ((relative - 0.3) / 0.4).clamp(0, 1)
    area = weight.sum((-2, -1))
    h, w = weight.shape[-2:]
    ruler = torch.arange(max(h, w), device=frames.device) + 0.5
    centre = torch.stack([(weight.sum(-2) * ruler[:w]).sum(-1), (weight.sum(-1) * ruler[:h]).sum(-1)], -1)
    centre = centre / area.unsqueeze(-1)
    tint, colour, purity = _colours(smooth, (relative > 0.8).float())
    shape = shape_names(_signature(weight, centre))
    return Observation(background, objects, centre, area.nan_to_num(0), tint, colour, shape, purity,
                       _touches(relative > 0.5))


def observe(clip: Tensor, things: int = 1) -> Observation:
    """clip [..., T, 3, H, W] in [-1, 1] (`frames_of` turns a video) -> what the `things` largest regions are."""
    lead = clip.shape[:-3]
    frames = clip.flatten(0, -4).float().clamp(-1, 1) * 0.5 + 0.5
    parts = [_observe(chunk, things) for chunk in frames.split(_CHUNK.get(clip.device.type, 1024))]
    joined = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Observation)}
    return Observation(**{name: value.unflatten(0, lead) for name, value in joined.items()})
