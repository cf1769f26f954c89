"""Measures of a portrait video from its pixels, against the face that its identity and its driving track describe.

    seen = measure(video, truth(who, drive))
    figures = scores(seen, blocks)

Axes: B clips, T frames of 1 + 4 (F - 1), G the colours that make an identity (`face.labels`).
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from . import face
from .temporal import SECOND, seam_frames

FIRST = 5  # seconds that the rest of a video is compared with
_LEAST = 4  # pixels; fewer say nothing about a colour
_CALM = 2e-3  # RMS in [-1, 1]: changes of a picture that nobody sees; floor of both sides of seam_roughness
_PART = 64  # frames worked on at once


@dataclass(frozen=True)
class Truth:
    """video: uint8 [B, 3, T, H, W]; parts: bool [B, G, T, H, W]; window: bool [B, T, H, W], where the mouth is; opening:
    the driving signal [B, T]."""

    video: Tensor
    parts: Tensor
    window: Tensor
    opening: Tensor


@dataclass(frozen=True)
class Seen:
    """Per frame, [B, T]. identity: RGB distance (0 .. 1.73) of the mean colours of skin, hair, eyes, shirt and wall from the
    true ones, averaged over them; opening: of the mouth, as a share of the window that is not skin; driven: the signal;
    change: RMS over a picture in [-1, 1] of how much its error differs from that of the frame before, NaN for the first.
    """

    identity: Tensor
    opening: Tensor
    driven: Tensor
    change: Tensor


def truth(who: face.Identity, drive: Tensor, size: int = 64) -> Truth:
    """What a perfect video of people `who`, moved by `drive` [B, 4, T], shows."""
    parts = [(face.paint(who, d, size).add(1).mul(127.5).round().byte(), face.labels(who, d, size),
              face.mouth_window(d, size)) for d in drive.split(_PART, 2)]
    video, labels, window = zip(*parts)
    return Truth(torch.cat(video, 2), torch.cat(labels, 2), torch.cat(window, 1), drive[:, 3])


def measure(video: Tensor, true: Truth) -> Seen:
    """video: [B, 3, T, H, W] in [-1, 1], of any float type. Raises ForcingError for another size than the truth's."""
    if video.shape != true.video.shape:
        raise ForcingError(f"The video has the shape {[*video.shape]} and the truth {[*true.video.shape]}. Render the truth at "
                           "the video's length and size.")
    parts, before = [], None
    for start in range(0, video.shape[2], _PART):
        cut = slice(start, start + _PART)
        shown = video[:, :, cut].float().clamp(-1, 1)
        wanted = true.video[:, :, cut].float().div(127.5).sub(1)
        labels, window = true.parts[:, :, cut], true.window[:, cut]
        error = shown - wanted
        joined = torch.cat([torch.full_like(error[:, :, :1], torch.nan) if before is None else before, error], 2)
        parts.append(Seen(_identity(shown, wanted, labels), _opening(shown, labels[:, 0], window), true.opening[:, cut],
                          joined.diff(dim=2).square().mean((1, 3, 4)).sqrt()))
        before = error[:, :, -1:]
    return Seen(*(torch.cat([getattr(part, field.name) for part in parts], 1) for field in fields(Seen)))


def _means(video: Tensor, parts: Tensor) -> Tensor:
    """Mean colours [B, G, T, 3] in [0, 1] of parts [B, G, T, H, W], NaN for those that are hardly seen."""
    count = parts.sum((-2, -1))
    total = torch.einsum("bcthw,bgthw->bgtc", video, parts.float())
    return torch.where((count >= _LEAST)[..., None], total / count[..., None] / 2 + 0.5, torch.nan)


def _identity(shown: Tensor, wanted: Tensor, parts: Tensor) -> Tensor:
    return (_means(shown, parts) - _means(wanted, parts)).norm(dim=-1).nanmean(1)


def _opening(shown: Tensor, skin: Tensor, window: Tensor) -> Tensor:
    """Mean distance of the window's pixels from the skin around it, over that of a dark mouth."""
    tint = _means(shown, (skin & ~window)[:, None])[:, 0]  # [B, T, 3]
    away = (shown / 2 + 0.5 - tint.permute(0, 2, 1)[..., None, None]).norm(dim=1)
    dark = tint.norm(dim=-1).clamp_min(0.1)
    return (away * window).sum((-2, -1)) / window.sum((-2, -1)) / dark


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of signals [B, T] over the frames in which both are numbers: [B], NaN where one of them stands still."""
    both = ~(a.isnan() | b.isnan())
    a, b = (torch.where(both, x, torch.nan) for x in (a, b))
    a, b = (torch.where(both, x - x.nanmean(1, keepdim=True), 0.0) for x in (a, b))
    scale = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(scale > 1e-6, (a * b).sum(1) / scale, torch.nan)


def seam_roughness(seen: Seen, blocks: Sequence[int]) -> float:
    """How much more the error changes where two blocks meet than where two latent frames of one block do; 1: no more.

    blocks: latent frames of each. What the driving track itself moves is no error, so it does not count. NaN without seams
    or without blocks of several latent frames."""
    seams = seam_frames(blocks)
    inner = sorted({*range(1, 4 * sum(blocks) - 3, 4)} - {*seams})
    if not seams or not inner:
        return float("nan")
    at, between = (seen.change[:, frames].nanmean().item() for frames in (seams, inner))
    return (at + _CALM) / (between + _CALM)


def by_second(values: Tensor) -> list[float]:
    """Means over all clips of every second of [B, T]."""
    return [part.nanmean().item() for part in values.split(SECOND, 1)]


def scores(seen: Seen, blocks: Sequence[int]) -> dict[str, Any]:
    """Figures of a video made in blocks of `blocks` latents, averaged over the clips.

    identity_first, identity_last: error of the first and of the last 5 s; identity_worst: of the worst 5 s; identity_ratio:
    worst over first; mouth: correlation of opening and signal over the whole video; seam_roughness; curve: the identity
    error of every second.
    """
    curve = by_second(seen.identity)
    spans = [sum(part) / len(part) for first in range(0, len(curve), FIRST) if (part := curve[first:first + FIRST])]
    return {"identity_first": spans[0], "identity_last": spans[-1], "identity_worst": max(spans),
            "identity_ratio": max(spans) / spans[0] if spans[0] else float("nan"),
            "mouth": correlation(seen.opening, seen.driven).nanmean().item(),
            "seam_roughness": seam_roughness(seen, blocks), "curve": curve}
