"""Is a clip what its caption says, in every frame? Measured from pixels; see `temporal.py` for motion and drift.

    scores = report(video, captions, blocks=[3] * 7)      # video [B, 3, T, H, W] in [-1, 1]

A frame is right when it shows exactly the captioned number of things, each of the captioned colour and shape; a
clip is right when all its frames are. Where the border of the frame cuts a thing (it touches the border and lacks
5 % of its usual area) its shape is not held against it. A caption of two things is judged in the frames in which
the two are apart, which has to be a quarter of them at least.

Axes: B clips, T frames, K things in the order of the caption.
"""
from __future__ import annotations

from dataclasses import fields, replace
from typing import Sequence, Union

import torch
from torch import Tensor

from . import temporal
from .captions import Caption, parse
from .names import BACKGROUNDS, DIRECTIONS, rgb
from .observe import NONE, Observation, frames_of, observe
from .world import ClipSpec, caption

PURITY = 0.8  # share of a thing's pixels that must have its colour's name
START = 8  # frames from which the direction is read
Wanted = Union[str, Caption, ClipSpec]


def wanted(captions: Sequence[Wanted]) -> list[Caption]:
    """Captions as text, parsed, or the clips they describe. ForcingError for a text that is no caption."""
    texts = [caption(c) if isinstance(c, ClipSpec) else c for c in captions]
    return [parse(c) if isinstance(c, str) else c for c in texts]


def _noun(captions: Sequence[Caption], name: str, things: int, like: Tensor) -> Tensor:
    """[B, 1, K] attribute of the captioned things, -2 for slots that a caption does not fill."""
    rows = [[getattr(noun, name) for noun in c.things] + [-2] * (things - len(c.things)) for c in captions]
    return torch.tensor(rows, device=like.device).unsqueeze(1)


def align(seen: Observation, captions: Sequence[Caption]) -> Observation:
    """The same with things in the order of the caption (by colour) instead of by size; K is 1 or 2."""
    if seen.colour.shape[-1] == 1:
        return seen
    want = _noun(captions, "colour", 2, seen.colour)
    swapped = (seen.colour.flip(-1) == want).sum(-1) > (seen.colour == want).sum(-1)
    out = {}
    for f in fields(Observation):
        value = getattr(seen, f.name)
        if f.name not in ("background", "objects"):
            where = swapped.view(*swapped.shape, *[1] * (value.dim() - 2))
            value = torch.where(where, value.flip(2), value)
        out[f.name] = value
    return replace(seen, **out)


def _cut(seen: Observation) -> Tensor:
    """[B, T, K]: touches the border and is smaller than usual."""
    return seen.edge & (seen.area < 0.95 * seen.area.median(1, keepdim=True).values)


def _background_right(seen: Observation, captions: Sequence[Caption]) -> Tensor:
    """[B, T]: the background's nearest name is the captioned one, or none is captioned."""
    want = torch.tensor([c.background for c in captions], device=seen.background.device)[:, None]
    name = torch.cdist(seen.background, rgb(BACKGROUNDS, seen.background.device)).argmin(-1)
    return (name == want) | (want == NONE)


def right(seen: Observation, captions: Sequence[Caption]) -> dict[str, Tensor]:
    """[B, T] each: `one_object` (the captioned number of things), `colour`, `shape`, `background`, and `judged`:
    false where two things overlap and nothing is to be said. `seen` [B, T, K] is aligned."""
    k = seen.colour.shape[-1]
    count = torch.tensor([len(c.things) for c in captions], device=seen.colour.device)[:, None]
    unused = torch.arange(k, device=count.device) >= count[..., None]
    colour = (seen.colour == _noun(captions, "colour", k, seen.colour)) & (seen.purity >= PURITY)
    shape = (seen.shape == _noun(captions, "shape", k, seen.colour)) | _cut(seen)
    apart = seen.objects >= count
    enough = apart.float().mean(1, keepdim=True) >= 0.25
    return {"one_object": seen.objects == count, "colour": (colour | unused).all(-1), "shape": (shape | unused).all(-1),
            "background": _background_right(seen, captions), "judged": apart | ~enough | (count == 1)}


def direction_right(seen: Observation, captions: Sequence[Caption]) -> Tensor:
    """[B]: the first thing's way over the first START frames is nearest to its captioned direction, or the caption
    names none."""
    last = min(START, seen.centre.shape[1] - 1)
    way = seen.centre[:, last, 0] - seen.centre[:, 0, 0]
    table = torch.tensor(list(DIRECTIONS.values()), device=way.device)
    want = torch.tensor([c.things[0].direction for c in captions], device=way.device)
    return ((way @ table.T).nan_to_num(-1e9).argmax(-1) == want) & ~way.isnan().any(-1) | (want == NONE)


def caption_scores(seen: Observation, captions: Sequence[Wanted]) -> dict[str, float]:
    """Shares of clips, 0 .. 1; `seen` [B, T, K] from `observe`, one caption per clip.

    caption_accuracy: colour, shape and count right in every frame; colour_accuracy: colour and count in every
    frame; colour, shape, one_object, background: that alone in every frame; direction: at the start of the clip;
    frame_accuracy: share of frames right in colour, shape and count.
    """
    captions = wanted(captions)
    seen = align(seen, captions)
    checks = right(seen, captions)
    skip = ~checks.pop("judged")
    whole = checks["one_object"] & checks["colour"]
    checks = {"caption_accuracy": whole & checks["shape"], "colour_accuracy": whole, **checks}
    out = {name: (ok | skip).all(1).float().mean().item() for name, ok in checks.items()}
    start = skip[:, :START + 1].any(1)
    out["direction"] = (direction_right(seen, captions) | start).float().mean().item()
    frames = checks["caption_accuracy"][~skip]
    out["frame_accuracy"] = frames.float().mean().item()
    return out


def switch_delay_frames(seen: Observation, captions: Sequence[Wanted], frame: int, hold: int = 8) -> list[int | None]:
    """Frames from `frame`, the first one made for the new captions, until colour, shape and count of those are
    right for `hold` frames on end (or up to the clip's end, if that is nearer); None where that never happens."""
    captions = wanted(captions)
    checks = right(align(seen, captions), captions)
    good = checks["one_object"] & checks["colour"] & checks["shape"] | ~checks["judged"]
    return [temporal.first_run(row, hold) for row in good[:, frame:].tolist()]


def look(video: Tensor, captions: Sequence[Wanted]) -> tuple[Observation, list[Caption]]:
    """video [B, 3, T, H, W] in [-1, 1] -> observation aligned with the captions, and the captions parsed."""
    captions = wanted(captions)
    seen = observe(frames_of(video), max(len(c.things) for c in captions))
    return align(seen, captions), captions


def report(video: Tensor, captions: Sequence[Wanted], blocks: Sequence[int]) -> dict[str, float]:
    """All figures of clips that were made in blocks of `blocks` latents, as plain floats.

    Those of `caption_scores`, then drift (RGB distance), area_drift (share), lost (share of frames), seam_ratio,
    seam_change (ratios), repeats, frozen (shares of frames), speed (px/frame), jitter (px/frame^2), averaged over
    the clips; NaN where there was nothing to measure.
    """
    return figures(*look(video, captions), frames_of(video), blocks)


def figures(seen: Observation, captions: Sequence[Wanted], clip: Tensor | temporal.Pixels,
            blocks: Sequence[int]) -> dict[str, float]:
    """`report` of a clip [B, T, 3, H, W] in [-1, 1], or of its `temporal.Pixels`, that has been looked at: `seen` is what
    `look` returns."""
    motion, drift = temporal.motion(seen), temporal.drift(seen)
    loops = temporal.repeats(clip)
    return {**caption_scores(seen, captions), **{name: v.nanmean().item() for name, v in drift.items()},
            "seam_ratio": temporal.seam_ratio(seen, blocks), "seam_change": temporal.seam_change(clip, blocks),
            **{name: v.nanmean().item() for name, v in {**loops, **motion}.items()}}
