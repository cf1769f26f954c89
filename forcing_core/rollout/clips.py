"""Clips: a bidirectional model makes one clip of latent frames at a time, and each begins with the end of the one before.

Neighbouring clips share `overlap` latent frames. They are handed over as latents - nothing is decoded and encoded again -
and stand in the first places of the next clip before every forward. Of those the newest `knot` are still open: both clips
make them, and they become the mean of the two. Every frame is given out once, when the last clip that makes it is done.
Networks with a place of their own for what came before (`history`) share no frames; they are shown the newest latents.

What a clip gets of conditioning that was made for the whole video is said by a `Lane`, in latent frames of the video.

Source: arXiv 2512.21734 (Knot Forcing), Eq. 5, here for clips of any length. Axis legend of latents: [B, C, F, H, W].
"""
from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..conditioning import Slices, Source
from ..errors import ForcingError


@dataclass(frozen=True)
class Clips:
    """length: latent frames of a clip. overlap: of those, how many are handed over from the clip before. knot: the newest
    of the overlap, which both clips make. history: latent frames that the network is shown instead of an overlap, or 0.

    Raises ForcingError for what makes no sense.
    """

    length: int = 21
    overlap: int = 2
    knot: int = 0
    history: int = 0

    def __post_init__(self):
        if self.length < 1 or min(self.overlap, self.knot, self.history) < 0:
            raise ForcingError(f"Clips of {self.length} latent frames, an overlap of {self.overlap} and a knot of {self.knot} "
                               "make no sense. Use at least 1, 0 and 0.")
        if self.overlap >= self.length:
            raise ForcingError(f"An overlap of {self.overlap} latent frames leaves nothing to make in a clip of {self.length} "
                               f"({pixels(self.length)} frames of video). Use an overlap of at most {self.length - 1}, or "
                               "longer clips.")
        if self.knot > self.overlap:
            raise ForcingError(f"A knot of {self.knot} latent frames is longer than the overlap of {self.overlap} that it is "
                               "part of. Use a smaller knot or a larger overlap.")
        if self.history and self.overlap:
            raise ForcingError("Clips that are shown what came before share no frames. Set the overlap to 0.")

    @property
    def stride(self) -> int:
        """Latent frames that a further clip adds."""
        return self.length - self.overlap

    def fitting(self, frames: int) -> int:
        """The number of latent frames nearest to `frames`, at least one clip, that whole clips make."""
        return self.length + max(0, round((frames - self.length) / self.stride)) * self.stride


@dataclass(frozen=True)
class Clip:
    """One clip: latent frames first .. first + frames - 1 of the video. given: leading ones that the clip before made.
    closing: the newest of those, which become final now. open: trailing ones that the next clip finishes."""

    index: int
    first: int
    frames: int
    given: int = 0
    closing: int = 0
    open: int = 0

    @property
    def final(self) -> slice:
        """Which of its frames are given out."""
        return slice(self.given - self.closing, self.frames - self.open)


def pixels(latents: int) -> int:
    """Frames of video that a clip of so many latent frames stands for when it is looked at alone."""
    return 4 * latents - 3


def latents_of(frames: int) -> int:
    """Latent frames of a clip of `frames` frames of video. Raises ForcingError for those that are no 4n + 1."""
    if frames < 1 or frames % 4 != 1:
        below = max(1, (frames - 1) // 4 * 4 + 1)
        raise ForcingError(f"A clip of {frames} frames is not what a Wan VAE makes, which is 4n + 1 frames. Use {below} or "
                           f"{below + 4}.")
    return (frames + 3) // 4


def lay(frames: int, options: Clips) -> Iterator[Clip]:
    """The clips of a video of `frames` latent frames, one after the other; the last one is as long as what is left."""
    for index in count():
        first = index * options.stride
        last = first + options.length >= frames
        yield Clip(index, first, min(options.length, frames - first), options.overlap if index else 0,
                   options.knot if index else 0, 0 if last else options.knot)
        if last:
            return


# makes the x0 [B, C, clip.frames, H, W] of a clip, from what is handed over: latents [B, C, k, H, W], or None at first
Make = Callable[[Clip, Tensor | None], Tensor]


def clip_rollout(make: Make, clips: Iterable[Clip], options: Clips) -> Iterator[tuple[Clip, Tensor]]:
    """Yield (clip, latents [B, C, n, H, W]) with the frames that became final; all of them together are the video."""
    handed: Tensor | None = None
    for clip in clips:
        x0 = make(clip, handed)
        if clip.given:
            x0 = joined(clip, handed, x0)
        handed = _newest(handed, x0, options)
        yield clip, x0[:, :, clip.final]


def joined(clip: Clip, handed: Tensor, x0: Tensor) -> Tensor:
    """A clip with the frames that were handed over to it in their places, the closing ones as the mean of both versions."""
    settled, now = clip.given - clip.closing, slice(clip.given - clip.closing, clip.given)
    return torch.cat([handed[:, :, :settled], (handed[:, :, now] + x0[:, :, now]) / 2, x0[:, :, clip.given:]], dim=2)


def _newest(handed: Tensor | None, x0: Tensor, options: Clips) -> Tensor | None:
    """What the next clip gets; a copy, since a view would keep the whole clip alive."""
    if not options.history:
        return x0[:, :, x0.shape[2] - options.overlap:].clone() if options.overlap else None
    past = x0 if handed is None else torch.cat([handed, x0], dim=2)
    return past[:, :, -options.history:].clone()


# -- conditioning ------------------------------------------------------------------------------------------------

# What follows the last entry where the conditioning ends before a clip does: (that entry, how many are missing, axis)
FILLS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "hold": lambda last, missing, dim: _repeated(last, missing, dim),
    "zeros": lambda last, missing, dim: torch.zeros_like(_repeated(last, missing, dim)),
    "short": lambda last, missing, dim: last.narrow(dim, 0, 0),
}


def _repeated(last: Tensor, count: int, dim: int) -> Tensor:
    return last.expand(*(count if axis == dim else -1 for axis in range(last.ndim)))


@dataclass(frozen=True)
class Lane:
    """How a value runs along the video. dim: its axis. rate: entries a latent frame. single: the first latent frame of a
    clip has one entry only, as with frames of video. lead: entries before the video's that belong to a reference and go with
    every clip. still: every clip gets those of the video's beginning. fill: key of FILLS. ends: a clip for which nothing is
    left gets nothing, instead of the filling."""

    dim: int
    rate: int = 1
    single: bool = False
    lead: int = 0
    still: bool = False
    fill: str = "hold"
    ends: bool = False

    def span(self, clip: Clip) -> tuple[int, int]:
        """(first, number) of the entries of a clip."""
        first = self.lead + (0 if self.still else self.rate * clip.first)
        return first, self.rate * (clip.frames - 1) + 1 if self.single else self.rate * clip.frames


@dataclass
class Cuts:
    """What every clip gets of a value. Streamed sources are read in order, each entry once.

    Raises ForcingError for a source without entries behind its lead.
    """

    source: Source
    lane: Lane
    _slices: Slices = field(init=False, repr=False)
    _lead: Tensor | None = field(init=False, default=None, repr=False)

    def __post_init__(self):
        if self.source.frames <= self.lane.lead:
            raise ForcingError(f"The conditioning has {self.source.frames} frames, {self.lane.lead} of them a reference, and "
                               "none for the video. Connect a longer one, or leave it out.")
        self._slices = Slices(self.source, self.lane.dim)
        self._lead = self._slices.of(0, self.lane.lead) if self.lane.lead else None

    def of(self, clip: Clip) -> Tensor | None:
        """The value for a clip, its lead included, or None where there is nothing left."""
        lane, (first, wanted) = self.lane, self.lane.span(clip)
        there = max(0, min(wanted, self.source.frames - first))
        if not there and lane.ends:
            return None
        part = self._slices.of(first, max(1, there))
        parts = [part.narrow(lane.dim, 0, there)] if there else []
        if there < wanted:
            last = part.narrow(lane.dim, part.shape[lane.dim] - 1, 1)
            parts.append(FILLS[lane.fill](last, wanted - there, lane.dim))
        if self._lead is not None:
            parts.insert(0, self._lead)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=lane.dim)
