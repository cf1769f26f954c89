"""Distribution matching distillation: a teacher and a critic tell a generated clip in which direction to move.

Axis legend: latents [B, C, F, h, w], timesteps [B, F] in 0..1000, sigma = timestep / 1000.

At one noise level for the whole clip, the teacher's x0 is where real clips are and the critic's x0 is where the
student's clips are; the student moves along their difference. The critic follows the student by flow matching
on the student's clips, several steps for each step of the student.

Sources: arXiv 2311.18828 (DMD, equations 7 and 8), 2405.14867 (DMD2), 2506.08009 (Self Forcing); constants of the
public repo guandeh17/Self-Forcing.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from ..errors import ForcingError
from ..schedule import TRAIN_STEPS
from ..wan import TextState
from .flow import add_noise, draw_noise, draw_rows, own_text, x0_of
from .parallel import parallel_velocity

# (noisy latents, timesteps, prompt) -> velocity like the latents
Velocity = Callable[[Tensor, Tensor, TextState], Tensor]


@dataclass(frozen=True)
class DmdOptions:
    """guidance: g of cond + g (cond - uncond), which is a classifier-free guidance of 1 + g; 0 is none.
    shift: flow shift of the drawn timesteps. low, high: timesteps they are clamped to.
    """

    guidance: float = 3.0
    shift: float = 5.0
    low: float = 20.0
    high: float = 980.0

    def __post_init__(self):
        if not 0 < self.low <= self.high <= TRAIN_STEPS:
            raise ForcingError(f"Timesteps from {self.low} to {self.high} cannot be drawn. "
                               f"Use limits with 0 < low <= high <= {TRAIN_STEPS}.")


def score(net: Any, mask: Tensor | None = None) -> Velocity:
    """A network as teacher or critic. mask: [F, F] of parallel.py for a causal one, None for a bidirectional one.

    The prompt is wrapped anew in every call: a TextState caches what one network made of it. Its dtype is the
    compute dtype.
    """
    def velocity(x: Tensor, timesteps: Tensor, text: TextState) -> Tensor:
        frames = x.shape[2]
        visible = torch.ones(frames, frames, dtype=torch.bool) if mask is None else mask
        return parallel_velocity(net, x.to(text.context.dtype), timesteps, own_text(text, x), visible)
    return velocity


def draw_timesteps(x: Tensor, options: DmdOptions, generator: torch.Generator) -> Tensor:
    """float32 [B, F]: one level a sample, uniform over the 1000 steps, warped by the shift, clamped."""
    u = draw_rows(x, TRAIN_STEPS, generator, block=x.shape[2]).float() / TRAIN_STEPS
    warped = TRAIN_STEPS * options.shift * u / (1 + (options.shift - 1) * u)
    return warped.clamp(options.low, options.high)


def predicted(velocity: Velocity, noisy: Tensor, timesteps: Tensor, text: TextState) -> Tensor:
    """float64 x0 of a velocity function."""
    return x0_of(noisy.double(), velocity(noisy, timesteps, text), timesteps / TRAIN_STEPS)


@torch.no_grad()
def direction(x: Tensor, noise: Tensor, timesteps: Tensor, text: TextState, negative: TextState | None,
              teacher: Velocity, critic: Velocity, guidance: float) -> Tensor:
    """float64 like x: (x0_critic - x0_teacher) / mean |x - x0_teacher| of the sample. The student goes against it."""
    noisy = add_noise(x, noise, timesteps / TRAIN_STEPS)
    real = predicted(teacher, noisy, timesteps, text)
    if guidance:
        if negative is None:
            raise ForcingError("A guided teacher needs a negative prompt. Give one, or set guidance to 0.")
        real = real + guidance * (real - predicted(teacher, noisy, timesteps, negative))
    size = (x.double() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    difference = predicted(critic, noisy, timesteps, text) - real
    return difference / size.clamp_min(1e-8)  # a student that is its teacher gets 0, not 0 / 0


def generator_loss(x: Tensor, text: TextState, negative: TextState | None, teacher: Velocity, critic: Velocity,
                   options: DmdOptions, generator: torch.Generator, *, weights: Tensor | None = None,
                   frames: Tensor | None = None) -> Tensor:
    """float64 scalar whose gradient in x is `direction`, averaged: 0.5 mean (x - stopgrad(x - direction))^2.

    x: generated clip with its graph. negative: prompt of the unconditional teacher, not needed without guidance.
    weights: [B, 1, F, h, w]. frames: bool [F] or [B, F], those that get a gradient.
    """
    timesteps = draw_timesteps(x, options, generator)
    move = direction(x, draw_noise(x, generator), timesteps, text, negative, teacher, critic, options.guidance)
    target = x.detach().double() - move
    return 0.5 * weighted_mean((x.double() - target).square(), weights, frames)


def critic_loss(x: Tensor, text: TextState, critic: Velocity, options: DmdOptions, generator: torch.Generator, *,
                weights: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
    """Flow matching of the critic on generated clips: mean (v - (noise - x))^2. The student gets no gradient."""
    x = x.detach()
    timesteps, noise = draw_timesteps(x, options, generator), draw_noise(x, generator)
    velocity = critic(add_noise(x, noise, timesteps / TRAIN_STEPS), timesteps, text)
    return weighted_mean((velocity.float() - (noise - x).float()).square(), weights, frames)


def weighted_mean(error: Tensor, weights: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
    """Mean of error [B, C, F, h, w], cells counting by weights [B, 1, F, h, w], frames (bool [F] or [B, F]) or none.

    Raises ForcingError where no frame counts.
    """
    if weights is None and frames is None:
        return error.mean()
    cells = torch.ones_like(error[:, :1]) if weights is None else weights.to(error)
    if frames is not None:
        if not frames.any():
            raise ForcingError("No frame is left for the loss. Give a mask with at least one frame.")
        cells = cells * frames.to(error).reshape(-1, 1, frames.shape[-1], 1, 1)
    cells = cells.expand_as(error)
    return (error * cells).sum() / cells.sum()
