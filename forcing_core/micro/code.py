"""The fixed linear code of the micro world: what the VAE is taught to write and to read before it learns freely.

Every latent cell, 8x8 pixels of one frame (the video's first) or of four, becomes 16 numbers by a principal
component analysis of world clips. They have mean 0, and variance 1 on average; a strong direction keeps more of it
than a weak one (the strongest is 36 times the weakest in pixels, 6 times in the code). With equal variances, noise
would hide brightness and a shape's last corner alike, and a denoiser's error would weigh them alike. Learning a fixed
code first is what makes the VAE quick and stable to train; learning code and picture together from the start was
neither.

The two kinds of cells have a basis each. The first frame's is turned so that a picture has nearly the same code
as a video that stands still on it: a rotation costs nothing, since the numbers are already uncorrelated.

Axes: B batch, T = 1 + 4 (F - 1) frames, n cells, p numbers in a cell.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable

import torch
from torch import Tensor

from ..errors import ForcingError
from ..noise import mix
from . import world
from .vae import Z_DIM

CELL, GROUP, COLOURS = 8, 4, 3
CODE = 1  # stream of random numbers
# Directions in which the world does not vary are not blown up to variance 1.
FLOOR = 1e-6
# A number's standard deviation is its direction's to this power: 0 makes all equal, 1 leaves them as they are.
EMPHASIS = 0.5


def cells(frames: Tensor, group: int) -> Tensor:
    """[B, 3, F group, H, W] -> [B, F, H/8, W/8, p] with p = 3 * group * 64."""
    x = frames.unflatten(2, (-1, group)).unflatten(4, (-1, CELL)).unflatten(6, (-1, CELL))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # from b c F g h y w x


def uncells(x: Tensor, group: int) -> Tensor:
    """The inverse of `cells`."""
    x = x.unflatten(4, (COLOURS, group, CELL, CELL)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class Basis:
    """mean [p]; write [16, p] turns cells into code; read [p, 16] turns code into cells."""

    mean: Tensor
    write: Tensor
    read: Tensor

    def turned(self, rotation: Tensor) -> Basis:
        return Basis(self.mean, rotation @ self.write, self.read @ rotation.T)

    def scaled(self, factor: Tensor) -> Basis:
        """factor: [16], of the code's numbers."""
        return Basis(self.mean, factor[:, None] * self.write, self.read / factor)

    def to(self, device: torch.device | str) -> Basis:
        return Basis(self.mean.to(device), self.write.to(device), self.read.to(device))


class Moments:
    """Sums of x and x x^T, added up in float64, over cells of one kind, seen a batch at a time."""

    def __init__(self):
        self.count, self.total, self.products = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """x: [..., p]."""
        x = x.flatten(0, -2)
        self.count += x.shape[0]
        self.total = self.total + x.sum(0).double()
        self.products = self.products + (x.T @ x).double()

    def basis(self) -> Basis:
        """The 16 strongest principal directions, scaled to variance 1, in float32."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values[-Z_DIM:].flip(0), vectors[:, -Z_DIM:].flip(1)
        # An eigenvector's sign is the solver's whim; fix it, so that machines agree.
        vectors = vectors * vectors[vectors.abs().argmax(0), torch.arange(Z_DIM, device=vectors.device)].sign()
        scale = values.clamp_min(FLOOR).sqrt()
        return Basis(mean.float(), (vectors / scale).T.float().contiguous(), (vectors * scale).float())


@dataclass(frozen=True)
class LinearCode:
    """first: the basis of the video's first frame; rest: that of four frames each."""

    first: Basis
    rest: Basis

    def scaled(self, factor: Tensor) -> LinearCode:
        """factor: [16], of the code's numbers."""
        return LinearCode(self.first.scaled(factor), self.rest.scaled(factor))

    def encode(self, video: Tensor) -> Tensor:
        """Code [B, 16, F, H/8, W/8] of a video [B, 3, T, H, W] in [-1, 1] with T = 1, 5, 9, ..."""
        parts = [_write(self.first, cells(video[:, :, :1], 1))]
        if video.shape[2] > 1:
            parts.append(_write(self.rest, cells(video[:, :, 1:], GROUP)))
        return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)

    def decode(self, code: Tensor) -> Tensor:
        """The video [B, 3, T, H, W], not clamped, that a code [B, 16, F, h, w] describes."""
        x = code.permute(0, 2, 3, 4, 1)
        parts = [uncells(_read(self.first, x[:, :1]), 1)]
        if x.shape[1] > 1:
            parts.append(uncells(_read(self.rest, x[:, 1:]), GROUP))
        return torch.cat(parts, dim=2)

    def to(self, device: torch.device | str) -> LinearCode:
        return LinearCode(self.first.to(device), self.rest.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{kind}.{name}": getattr(getattr(self, kind), name)
                for kind in ("first", "rest") for name in ("mean", "write", "read")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> LinearCode:
        return cls(*(Basis(*(state[f"{kind}.{name}"] for name in ("mean", "write", "read")))
                     for kind in ("first", "rest")))


def _write(basis: Basis, x: Tensor) -> Tensor:
    return (x - basis.mean) @ basis.write.T


def _read(basis: Basis, y: Tensor) -> Tensor:
    return y @ basis.read.T + basis.mean


def fit(clips: Iterable[Tensor]) -> LinearCode:
    """The code of videos [B, 3, T, H, W] in [-1, 1], T = 5, 9, ...; every batch is read once.

    Raises ForcingError where there are no clips or too short ones.
    """
    first, rest = Moments(), Moments()
    for video in clips:
        if video.shape[2] < 1 + GROUP:
            raise ForcingError(f"Clips of {video.shape[2]} frames show no motion to code. Use at least {1 + GROUP}.")
        # Any frame can be a first one, and a few of each clip say more than its first alone.
        for frame in video[:, :, ::GROUP].split(1, dim=2):
            first.add(cells(frame, 1))
        rest.add(cells(video[:, :, 1:], GROUP))
    if not first.count:
        raise ForcingError("There are no clips to compute a code from. Give at least one.")
    single, group = first.basis(), rest.basis()
    left, _, right = torch.linalg.svd(_agreement(first, single, group))
    return LinearCode(single.turned((left @ right).float()), group).scaled(_emphasis(group))


def of_world(clips: int = 256, seed: int = 0, levels: tuple[str, ...] = ("full", "plain")) -> LinearCode:
    """The code that all micro networks share: of `clips` clips of 33 frames, of all levels in turn."""
    return fit(world.batch(mix(seed, CODE, number), min(8, clips - start), 33, level=levels[number % len(levels)])[0]
               for number, start in enumerate(range(0, clips, 8)))


def _emphasis(group: Basis) -> Tensor:
    """Factors [16] of a basis of equal variances, whose squares have mean 1."""
    strength = group.read.norm(dim=0) ** EMPHASIS
    return strength / strength.square().mean().sqrt()


def _agreement(moments: Moments, single: Basis, group: Basis) -> Tensor:
    """[16, 16]: covariance of a still video's code (rows) with its picture's code (columns)."""
    mean = moments.total / moments.count
    covariance = moments.products / moments.count - torch.outer(mean, mean)
    # A still cell repeats the picture's numbers in each of its frames.
    still = group.write.double().unflatten(1, (COLOURS, GROUP, CELL * CELL)).sum(2).flatten(1)
    return still @ covariance @ single.write.double().T
