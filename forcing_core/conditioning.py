"""Conditioning with a value for every latent frame - control video, masks, camera, channels of given frames - by forward.

A rollout asks for the frames of one forward at a time: of a block, and of the knot behind it. What is streamed is read
once, in order, and only the newest slice is kept, so a video may be longer than memory. Where conditioning ends before
the video does, its last frame goes on; a reference, which stands outside of the video, gets the first one.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Protocol

import torch
from torch import Tensor

from .errors import ForcingError
from .plan import REFERENCE


class Source(Protocol):
    """`frames`: latent frames that there are. `read(first, count)`: a tensor with that many frames, all of them inside."""

    frames: int

    def read(self, first: int, count: int) -> Tensor: ...


class Reader(Protocol):
    """`of(first, count, prompt)`: per-frame values of one run under the prompt [1, n, d] that rules. They are asked for in
    order, several times each; what lies before the newest ones is to be as it was."""

    def of(self, first: int, count: int, prompt: Tensor) -> Tensor: ...


class Directed(Protocol):
    """A source that follows the prompt. `frames`: as of a `Source`. `begin()`: a reader for one run."""

    frames: int

    def begin(self) -> Reader: ...


@dataclass(frozen=True)
class Held:
    """A tensor in memory. dim: its axis of latent frames."""

    tensor: Tensor
    dim: int

    @property
    def frames(self) -> int:
        return self.tensor.shape[self.dim]

    def read(self, first: int, count: int) -> Tensor:
        return self.tensor.narrow(self.dim, first, count)


@dataclass(frozen=True)
class Streamed:
    """Frames that somebody makes when they are asked for: decoded, encoded, loaded. make(first, count) -> tensor. They are
    asked for in order, each once, unless a recache goes back."""

    make: Callable[[int, int], Tensor]
    frames: int

    def read(self, first: int, count: int) -> Tensor:
        return self.make(first, count)


@dataclass
class Slices:
    """What every forward gets of a source. dim: the axis of latent frames.

    Raises ForcingError for sources without frames, and for those that give other numbers of frames than they say.
    """

    source: Source
    dim: int
    _first: int = field(init=False, default=0)
    _kept: Tensor | None = field(init=False, default=None, repr=False)

    def __post_init__(self):
        if self.source.frames < 1:
            raise ForcingError("The conditioning has no frames. Connect a video, or leave it out.")

    def of(self, first: int, count: int) -> Tensor:
        """The conditioning of latent frames first .. first + count - 1, the last one held where there are no more."""
        first, count, wanted = (0, 1, count) if first >= REFERENCE else (first, count, count)
        start = min(first, self.source.frames - 1)
        part = self._read(start, min(first + count, self.source.frames) - start if start == first else 1)
        missing = wanted - part.shape[self.dim]
        if not missing:
            return part
        last = part.narrow(self.dim, part.shape[self.dim] - 1, 1)
        return torch.cat([part, last.expand(*_sizes(last, self.dim, missing))], dim=self.dim)

    def _read(self, first: int, count: int) -> Tensor:
        """Frames inside the source; those of the newest slice are not read again."""
        kept = 0 if self._kept is None else self._kept.shape[self.dim]
        if not kept or not self._first <= first <= self._first + kept:
            self._kept, self._first = self._new(first, count), first
            return self._kept
        inside = min(count, self._first + kept - first)
        parts = [self._kept.narrow(self.dim, first - self._first, inside)] if inside else []
        if inside < count:
            parts.append(self._new(first + inside, count - inside))
            self._kept, self._first = torch.cat(parts, dim=self.dim), first
            return self._kept
        return parts[0]

    def _new(self, first: int, count: int) -> Tensor:
        part = self.source.read(first, count)
        if part.shape[self.dim] != count:
            came = part.shape[self.dim]
            raise ForcingError(f"{count} latent frames of conditioning were asked for at frame {first}, and {came} came. "
                               f"Connect a source that has all {self.source.frames} that it names.")
        return part


def _sizes(last: Tensor, dim: int, count: int) -> list[int]:
    return [count if axis == dim % last.ndim else -1 for axis in range(last.ndim)]


def with_given(concat: Tensor, given: Tensor, at: int, channels: int) -> Tensor:
    """Channels of given frames [B, m + channels, n, H, W], m of them a mask and 1 where a frame is given, with the latents
    `given` [B, channels, k, H, W] written in from frame `at` on."""
    out = concat.clone()
    inside = slice(max(0, at), min(out.shape[2], at + given.shape[2]))
    part = given[:, :, inside.start - at:inside.stop - at].to(out)
    out[:, :-channels, inside] = 1
    out[:, -channels:, inside] = part.expand(out.shape[0], -1, -1, -1, -1)
    return out
