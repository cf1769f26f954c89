"""What the training objectives share: levels and noise from a generator, noised clips, weighted errors, guidance.

Axis legend: B batch, C latent channel, F latent frame, h/w latent size. A row is an entry of `schedule.table`, 0 being
the noisiest. Flow convention: x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0.

Sources: arXiv 2506.08009 (Self Forcing), 2412.07772 (CausVid), 2602.02214 (Causal Forcing); the training weight as in
the public repo thu-ml/Causal-Forcing.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from ..errors import ForcingError
from ..plan import layout
from ..policies import WindowOptions
from ..schedule import TRAIN_STEPS, table
from ..wan import TextState
from .parallel import block_causal, teacher_forcing


@dataclass(frozen=True)
class CausalOptions:
    """What a causal network may see while it trains, and the flow shift of its noise levels.

    block: latent frames a block; window, sink: as in `WindowOptions`, None sees everything before.
    independent_first: the first frame is a block of its own.
    """

    block: int = 3
    window: int | None = None
    sink: int = 0
    independent_first: bool = False
    shift: float = 5.0

    def __post_init__(self):
        WindowOptions(self.window, self.sink, self.block)  # what inference refuses is refused here
        if self.shift <= 0:
            raise ForcingError(f"A flow shift of {self.shift} is not usable. Use a positive one; the family has 5.")

    def causal_mask(self, frames: int) -> Tensor:
        """[F, F], see `parallel.block_causal`."""
        return block_causal(frames, self.block, window=self.window, sink=self.sink,
                            independent_first=self.independent_first)

    def teacher_forcing_mask(self, frames: int) -> Tensor:
        """[2F, 2F], see `parallel.teacher_forcing`."""
        return teacher_forcing(frames, self.block, window=self.window, sink=self.sink,
                               independent_first=self.independent_first)


class Noised(NamedTuple):
    """A clip with noise mixed in: x and noise [B, C, F, h, w], timesteps and sigmas float32 [B, F]."""

    x: Tensor
    noise: Tensor
    timesteps: Tensor
    sigmas: Tensor


def draw_rows(clip: Tensor, count: int, generator: torch.Generator, *, block: int, independent_first: bool = False,
              bias: float = 1.0) -> Tensor:
    """Whole numbers [B, F] in 0..count-1, one for every block of the clip [B, C, F, h, w].

    A block of 1 draws for every frame, one of F for every clip. bias: the share of rows below r is
    (r / count)^(1 / bias): 1 is uniform, more draws more of the first rows, the noisy ones.
    """
    if bias <= 0:
        raise ForcingError(f"A noise bias of {bias} is not usable. Use 1 for uniform levels, 2 for noisier ones.")
    sizes = [b.frames for b in layout(clip.shape[2], block, independent_first=independent_first)]
    u = torch.rand(clip.shape[0], len(sizes), generator=generator, device=generator.device, dtype=torch.float64)
    rows = (count * u ** bias).long().clamp_max(count - 1)
    return rows.repeat_interleave(torch.tensor(sizes, device=rows.device), dim=1).to(clip.device)


def draw_noise(clip: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise like the clip; the numbers depend on the generator's device only."""
    return torch.randn(clip.shape, generator=generator, device=generator.device).to(clip)


def per_frame(values: Tensor) -> Tensor:
    """[B, F] to [B, 1, F, 1, 1]."""
    return values[:, None, :, None, None]


def add_noise(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(1 - sigma) clean + sigma noise in the dtype of `clean`; clips [B, C, F, h, w], sigmas [B, F]."""
    s = per_frame(sigmas)
    return ((1 - s) * clean + s * noise).to(clean.dtype)


def noised(clean: Tensor, rows: Tensor, shift: float, generator: torch.Generator) -> Noised:
    """The clip [B, C, F, h, w] with fresh noise at these rows [B, F] of the training table."""
    timesteps, sigmas = (values.to(clean.device)[rows] for values in table(shift))
    noise = draw_noise(clean, generator)
    return Noised(add_noise(clean, noise, sigmas), noise, timesteps, sigmas)


@lru_cache(maxsize=None)
def training_weights(shift: float) -> Tensor:
    """Published weight of the flow loss for every row, [1000], of mean 1.

    With y = exp(-2 ((t - 500) / 1000)^2): (y - min y) * 1000 / sum(y - min y). It is 0 at t = 1000.
    """
    y = torch.exp(-2 * ((table(shift)[0] - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
    return (y - y.min()) * (TRAIN_STEPS / (y - y.min()).sum())


def x0_of(x: Tensor, velocity: Tensor, sigmas: Tensor) -> Tensor:
    """x - sigma velocity in float64, in the dtype of x. Exactly x where sigma is 0. Clips [B, C, F, h, w], sigmas
    [B, F]."""
    return (x.double() - per_frame(sigmas).double() * velocity.double()).to(x.dtype)


def weighted_mse(made: Tensor, target: Tensor, *, frames: Tensor | None = None, cells: Tensor | None = None) -> Tensor:
    """Mean squared error of clips [B, C, F, h, w] in float32.

    frames: factors [B, F], as they are. cells: weights [B, 1, F, h, w] (or broadcast to it), divided by their mean,
    so equal ones change nothing; 0 everywhere gives 0.
    """
    error = (made.float() - target.float()).square().mean(1, keepdim=True)
    if frames is not None:
        error = error * per_frame(frames)
    if cells is None:
        return error.mean()
    cells = cells.to(error).expand_as(error)
    return (error * cells).mean() / cells.mean().clamp_min(torch.finfo(error.dtype).tiny)


def own_text(text: TextState, clip: Tensor) -> TextState:
    """The prompts for one forward: a state caches projections of the first network that used it, and their graph.

    One prompt serves a whole batch.
    """
    if text.context.shape[0] not in (1, clip.shape[0]):
        raise ForcingError(f"There are {text.context.shape[0]} prompts for {clip.shape[0]} clips. "
                           "Give one prompt, or one for each clip.")
    return TextState(text.context.expand(clip.shape[0], -1, -1))


def guided(predict: Callable[[TextState], Tensor], text: TextState, negative: TextState | None,
           guidance: float) -> Tensor:
    """Velocity with classifier-free guidance, v_neg + guidance (v_pos - v_neg); at guidance 1 one forward."""
    positive = predict(text)
    if guidance == 1:
        return positive
    if negative is None:
        raise ForcingError(f"A guidance of {guidance} needs a negative prompt. Give one, or set guidance to 1.")
    other = predict(negative)
    return other + guidance * (positive - other)


@lru_cache(maxsize=None)
def euler_sigmas(steps: int, shift: float) -> Tensor:
    """Sigmas of an Euler schedule, float32 [steps + 1] from 1 to 0: the shift applied to 1 - i / steps."""
    if steps < 1:
        raise ForcingError(f"A schedule of {steps} steps is empty. Use at least 1.")
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return (shift * u / (1 + (shift - 1) * u)).float()
