"""AR diffusion with teacher forcing: denoise every block given the true clean blocks before it.

One forward over [clean | noisy] trains all blocks at once; every block has a noise level of its own. Stage 1 of
Causal Forcing (arXiv 2602.02214): uniform rows of the shift-5 table, flow matching, the published training weight.
Axis legend as in `flow`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from ..errors import ForcingError
from ..schedule import TRAIN_STEPS, table
from ..wan import TextState, WanModel
from .flow import CausalOptions, draw_rows, noised, own_text, training_weights, weighted_mse
from .parallel import teacher_forced_velocity


@dataclass(frozen=True)
class TeacherForcingOptions(CausalOptions):
    """bias: of the drawn levels to high noise, see `flow.draw_rows`; weighted: with the published training weight.

    context_timestep: what the clean half is told, without noise, as the clean passes of inference do.
    context_noise: highest timestep of light noise on the clean half; every block draws one at or below it and is
    told so (the public code's noise augmentation, off in its configurations). 0: none.
    """

    bias: float = 1.0
    weighted: bool = True
    context_timestep: float = 0.0
    context_noise: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        least = float(table(self.shift)[0][-1])
        if self.context_noise and not least <= self.context_noise < TRAIN_STEPS:
            raise ForcingError(f"A context noise of {self.context_noise} is not usable. Use 0 for none, or a timestep "
                               f"from {least:.2f} to below {TRAIN_STEPS}.")
        if self.context_noise and self.context_timestep:
            raise ForcingError("With context noise the clean half is told the timesteps of that noise. "
                               "Set context_timestep to 0.")


def context(clean: Tensor, options: TeacherForcingOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(clean half [B, C, F, h, w], its timesteps [B, F])."""
    if not options.context_noise:
        shape = clean.shape[0], clean.shape[2]
        return clean, torch.full(shape, float(options.context_timestep), device=clean.device)
    first = int((table(options.shift)[0] > options.context_noise).sum())
    rows = draw_rows(clean, TRAIN_STEPS - first, generator, block=options.block,
                     independent_first=options.independent_first)
    light = noised(clean, first + rows, options.shift, generator)
    return light.x, light.timesteps


def loss(student: WanModel, clean: Tensor, text: TextState, options: TeacherForcingOptions,
         generator: torch.Generator, *, cells: Tensor | Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Weighted flow-matching error of the noisy half. clean: [B, C, F, h, w]; cells: weights [B, 1, F, h, w], or a
    function of the drawn sigmas [B, F] that gives them."""
    rows = draw_rows(clean, TRAIN_STEPS, generator, block=options.block,
                     independent_first=options.independent_first, bias=options.bias)
    noisy = noised(clean, rows, options.shift, generator)
    before, told = context(clean, options, generator)
    velocity = teacher_forced_velocity(student, before, noisy.x, noisy.timesteps, own_text(text, clean),
                                       options.teacher_forcing_mask(clean.shape[2]), clean_timesteps=told)
    weights = training_weights(options.shift).to(clean.device)[rows] if options.weighted else None
    return weighted_mse(velocity, noisy.noise - clean, frames=weights,
                        cells=cells(noisy.sigmas) if callable(cells) else cells)
