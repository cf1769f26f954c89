"""Measures over time: drift, motion at block seams, loops, smoothness. Nothing here knows the caption.

A video of F latent frames has 1 + 4 * (F - 1) pixel frames. Axes: B clips, T frames, K things.
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, max_pool1d, softshrink

from ..errors import ForcingError
from .observe import NONE, Observation

SECOND = 16
_STILL = 0.05  # px/frame^2: what noise of the measured centres does; floor of both sides of seam_ratio
_SAME = 0.004  # RMS over a 16x16 picture in [-1, 1]: frames that cannot be told apart
_NOISE = 0.1  # on that scale: what differs less from the background is noise
_LAG = SECOND  # a loop is at least this many frames long
_SPAN = 8  # frames that have to match on end


def seam_frames(blocks: Sequence[int]) -> list[int]:
    """First pixel frame of every block but the first: [3, 3, 3] -> [9, 21]."""
    ends = torch.tensor(blocks).cumsum(0)[:-1].tolist()
    return [4 * latents - 3 for latents in ends]


def first_run(good: Sequence[bool], hold: int) -> int | None:
    """Index of the first run of `hold` true values (or of true values up to the end); None if there is none."""
    run = 0
    for index, ok in enumerate(good):
        run = run + 1 if ok else 0
        if run == hold:
            return index - hold + 1
    return len(good) - run if run else None


def _seconds(values: Tensor) -> Tensor:
    """[B, T, ...] -> [B, seconds, ...], mean of each second that has a value (NaN: none); the last may be short."""
    return torch.stack([part.nanmean(1) for part in values.split(SECOND, 1)], 1)


def drift_curves(seen: Observation) -> dict[str, Tensor]:
    """[B, seconds] each, against the first second: `colour` and `background`, RGB distance (0 .. 1.73), `area`,
    relative change, all of the first thing; `lost`, share of frames without a thing.

    A second without a thing counts as a colour distance of 1 and a change of area of 1.
    """
    tint, wall = _seconds(seen.tint[:, :, 0]), _seconds(seen.background)
    area = _seconds(torch.where(seen.area > 0, seen.area, torch.nan)[:, :, 0])
    return {"colour": (tint - tint[:, :1]).norm(dim=-1).nan_to_num(1.0),
            "background": (wall - wall[:, :1]).norm(dim=-1),
            "area": (area / area[:, :1] - 1).abs().nan_to_num(1.0),
            "lost": _seconds((seen.objects == 0).float())}


def drift(seen: Observation) -> dict[str, Tensor]:
    """[B] each, at the end of the clip (last second and, if that is cut short, the one before): `drift`, colour
    plus background distance; `area_drift`; `lost`, over the whole clip."""
    curves = drift_curves(seen)
    last = 1 if seen.objects.shape[1] % SECOND == 0 else 2
    end = {name: curve[:, -last:].mean(1) for name, curve in curves.items()}
    return {"drift": end["colour"] + end["background"], "area_drift": end["area"],
            "lost": (seen.objects == 0).float().mean(1)}


def acceleration(seen: Observation) -> Tensor:
    """[B, T] px/frame^2, |c[t+1] - 2 c[t] + c[t-1]| of the first thing; NaN at both ends, where things are missing or
    overlap, and within two frames of touching the border, where bounces are."""
    c = seen.centre[:, :, 0]
    out = torch.full(c.shape[:2], torch.nan, device=c.device)
    out[:, 1:-1] = (c[:, 2:] - 2 * c[:, 1:-1] + c[:, :-2]).norm(dim=-1)
    unclear = seen.edge[..., 0] | (seen.objects < seen.edge.shape[-1])
    near = max_pool1d(unclear[:, None].float(), 5, 1, 2)[:, 0] > 0
    return out.masked_fill(near, torch.nan)


def seam_ratio(seen: Observation, blocks: Sequence[int], same_phase: bool = False) -> float:
    """Mean acceleration at the two frames next to a seam over that inside blocks, all clips pooled, both plus
    0.05 px/frame^2; 1 is seamless, NaN without a seam.

    same_phase: compare only with the frames next to the other latent boundaries, which leaves out what the VAE
    does to every fourth frame; blocks of one latent have none.
    """
    rough = acceleration(seen)
    seams = seam_frames(blocks)
    t = rough.shape[1]
    _fits(blocks, t)
    at = torch.zeros(t, dtype=torch.bool)
    at[[f + d for f in seams for d in (-1, 0)]] = True
    inside = ~at
    if same_phase:
        phase = torch.arange(t) % 4
        inside &= (phase == 0) | (phase == 1)
    seam, rest = (rough[:, where.to(rough.device)].nanmean() + _STILL for where in (at, inside))
    return (seam / rest).item()


def _fits(blocks: Sequence[int], frames: int) -> None:
    expected = 4 * sum(blocks) - 3
    if expected != frames:
        raise ForcingError(f"Blocks of {list(blocks)} latents make {expected} frames, but the clip has {frames}. "
                           "Pass the block structure the clip was made with.")


class Pixels:
    """All that the measures of pixels need of a clip that is seen piece by piece: 3 KB a frame, whatever its size."""

    def __init__(self):
        self._steps: list[Tensor] = []
        self._small: list[Tensor] = []
        self._last: Tensor | None = None

    def push(self, part: Tensor) -> Pixels:
        """The next frames [B, t, 3, H, W], in [-1, 1]."""
        joined = (part if self._last is None else torch.cat([self._last, part], 1)).float()
        self._steps.append((joined[:, 1:] - joined[:, :-1]).abs().mean((-3, -2, -1)))
        self._small.append(torch.stack([_small(frames.float()) for frames in part]))
        self._last = part[:, -1:].clone()
        return self

    @property
    def frames(self) -> int:
        """How many were seen."""
        return sum(part.shape[1] for part in self._small)

    @property
    def steps(self) -> Tensor:
        """[B, T - 1]: mean difference of each frame from the one before."""
        return torch.cat(self._steps, 1)

    @property
    def small(self) -> Tensor:
        """[B, T, 768]: what `repeats` compares."""
        return torch.cat(self._small, 1)


def _seen(clip: Tensor | Pixels) -> Pixels:
    return clip if isinstance(clip, Pixels) else Pixels().push(clip)


def seam_change(clip: Tensor | Pixels, blocks: Sequence[int]) -> float:
    """Mean difference of neighbouring frames at seams over that inside blocks (jumps of brightness or place);
    1 is seamless. clip [B, T, 3, H, W], or what was seen of it."""
    step = _seen(clip).steps
    _fits(blocks, step.shape[1] + 1)
    at = torch.zeros(step.shape[1], dtype=torch.bool, device=step.device)
    at[[f - 1 for f in seam_frames(blocks)]] = True
    return ((step[:, at].mean() + 1e-4) / (step[:, ~at].mean() + 1e-4)).item()


def _small(frames: Tensor) -> Tensor:
    """frames [T, 3, H, W] -> [T, 3 * 16 * 16], what differs from each frame's background, without noise."""
    pooled = adaptive_avg_pool2d(frames, 16).flatten(2)
    return softshrink(pooled - pooled.median(2, keepdim=True).values, _NOISE).flatten(1)


def _nearest_past(small: Tensor) -> tuple[Tensor, Tensor]:
    """small [T, D] -> RMS distance to the most similar moment at least _LAG frames ago [T], each moment being the
    last _SPAN frames, and the RMS change from the frame before [T]; infinite where there is no such past."""
    t, d = small.shape
    apart = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / d ** 0.5
    step = apart.diagonal(1)
    span = apart[_SPAN - 1:, _SPAN - 1:].clone()
    for back in range(1, _SPAN):
        span = torch.maximum(span, apart[_SPAN - 1 - back:t - back, _SPAN - 1 - back:t - back])
    later = torch.arange(len(span), device=small.device)
    span = span.masked_fill(later[:, None] - later < _LAG, torch.inf)
    infinite = torch.full((_SPAN - 1,), torch.inf, device=small.device)
    return torch.cat([infinite, span.min(1).values]), torch.cat([infinite[:1], step])


def repeats(clip: Tensor | Pixels) -> dict[str, Tensor]:
    """clip [B, T, 3, H, W], or what was seen of it -> [B] each. `repeats`: share of the frames (from the second second on)
    whose last half second has been shown before, each of its 8 frames within half a frame's motion; `frozen`: share of
    frames equal to the one before. Backgrounds are left out, so that their drift hides no loop.

    A thing that bounces straight to and fro does repeat: compare with the value of rendered clips.
    """
    looped, frozen = [], []
    for small in _seen(clip).small:
        past, step = _nearest_past(small)
        usual = step[1:].median()
        seen = past[_LAG + _SPAN - 1:] < torch.clamp_min(0.5 * usual, _SAME)
        looped.append(seen.float().mean())
        frozen.append((step[1:] < _SAME / 4).float().mean())
    return {"repeats": torch.stack(looped), "frozen": torch.stack(frozen)}


def motion(seen: Observation) -> dict[str, Tensor]:
    """[B] each: `speed`, median px/frame of the first thing; `jitter`, mean acceleration away from the border in
    px/frame^2 (a straight path at constant speed has less than 0.1); `shape_changes`, share of frames whose shape differs
    from the one before."""
    c = seen.centre[:, :, 0]
    shape = seen.shape[:, :, 0]
    changed = (shape[:, 1:] != shape[:, :-1]) | (shape[:, 1:] == NONE)
    return {"speed": (c[:, 1:] - c[:, :-1]).norm(dim=-1).nanmedian(1).values,
            "jitter": acceleration(seen).nanmean(1), "shape_changes": changed.float().mean(1)}
