"""Causal consistency distillation: the student agrees with itself along the teacher's trajectory.

One Euler step of the teacher-forced teacher leads from x_t to the next level; the student's x0 at x_t learns the x0
that its moving average gives there. No trajectories are stored. Causal Forcing++ (arXiv 2605.15141); constants of the
public repo thu-ml/Causal-Forcing. Axis legend as in `flow`.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ForcingError
from ..schedule import TRAIN_STEPS
from ..wan import TextState, WanModel
from .flow import (
    CausalOptions,
    add_noise,
    draw_noise,
    draw_rows,
    euler_sigmas,
    guided,
    own_text,
    weighted_mse,
    x0_of,
)
from .parallel import teacher_forced_velocity


@dataclass(frozen=True)
class ConsistencyOptions(CausalOptions):
    """steps, shift, guidance: of the teacher's Euler schedule.

    per_block: draw a level for every block, not for every clip. boundary: draw the last step too, whose end is the
    target itself, because x0 is x at sigma 0; the public code leaves it out.
    """

    steps: int = 48
    guidance: float = 3.0
    per_block: bool = False
    boundary: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 2 - self.boundary:
            raise ForcingError(f"A schedule of {self.steps} steps leaves none to draw. Use at least 2, or 1 with the "
                               "boundary.")


def draw_step(clean: Tensor, options: ConsistencyOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sigmas (now, next), [B, F] each: neighbours in the schedule."""
    block, first = (options.block, options.independent_first) if options.per_block else (clean.shape[2], False)
    count = options.steps if options.boundary else options.steps - 1
    rows = draw_rows(clean, count, generator, block=block, independent_first=first)
    sigmas = euler_sigmas(options.steps, options.shift).to(clean.device)
    return sigmas[rows], sigmas[rows + 1]


def forced(net: WanModel, clean: Tensor, x: Tensor, sigmas: Tensor, text: TextState,
           options: ConsistencyOptions) -> Tensor:
    """Teacher-forced velocity of x [B, C, F, h, w] at sigmas [B, F]."""
    return teacher_forced_velocity(net, clean, x, TRAIN_STEPS * sigmas, own_text(text, x),
                                   options.teacher_forcing_mask(x.shape[2]))


@torch.no_grad()
def target(teacher: WanModel, average: WanModel, clean: Tensor, x: Tensor, now: Tensor, to: Tensor, text: TextState,
           negative: TextState | None, options: ConsistencyOptions) -> Tensor:
    """x0 [B, C, F, h, w] of the averaged student after one guided teacher step from sigmas `now` to `to` [B, F]."""
    v = guided(lambda side: forced(teacher, clean, x, now, side, options), text, negative, options.guidance)
    after = x0_of(x, v, now - to)  # an Euler step is the same arithmetic
    return x0_of(after, forced(average, clean, after, to, text, options), to)


def loss(student: WanModel, average: WanModel, teacher: WanModel, clean: Tensor, text: TextState,
         negative: TextState | None, options: ConsistencyOptions, generator: torch.Generator, *,
         cells: Tensor | None = None) -> Tensor:
    """Mean squared error between the student's x0 at x_t and the average's x0 one teacher step later.

    clean: [B, C, F, h, w]; cells: weights [B, 1, F, h, w]. average: the student's moving average. Only the student
    gets a gradient.
    """
    now, to = draw_step(clean, options, generator)
    x = add_noise(clean, draw_noise(clean, generator), now)
    aim = target(teacher, average, clean, x, now, to, text, negative, options)
    made = x0_of(x, forced(student, clean, x, now, text, options), now)
    return weighted_mse(made, aim, cells=cells)
