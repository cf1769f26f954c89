"""Cycle consistency: roll out, turn time and conditions around, and recover the frames that were given.

A world that is driven there and back ends where it began. So a network's own rollout, read backwards under the conditions
that undo it, is a history whose true continuation is known: the frames it started from. Long rollouts get a target without
any long clip, and the network learns to go on from its own errors. The rollout carries no gradient; recovering is one
step of diffusion forcing, with a noise level for every frame, and the loss counts the true frames only. How many of them
are given falls during training, so that what is generated grows.

Where the public code (Junchao-cs/LIVE @20c82a9, `df_flow.py`) does otherwise: it makes all frames of a rollout as one chunk
with the 18 steps of sampling; recovers into extra slots behind the reversed rollout, each of which holds one true frame and
sees the rollout only, with logit-normal levels; gives fewer frames by the epoch (32, 8, then 2 for the rest); and takes
no step on true clips once rollouts begin. Ours is smaller: frame by frame in few steps, one sequence, every second step.

Axes: B batch, C latent channel, F frame, h/w latent size. Source: arXiv 2602.03747 (LIVE), section on cycle consistency.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from ..live.attention import Context
from ..live.model import LiveModel
from ..live.rollout import live_levels, told
from ..schedule import TRAIN_STEPS, Level, renoise, table, x0_from_velocity
from ..solvers import dpm
from .flow import Noised, add_noise, draw_noise, draw_rows, weighted_mse


@dataclass(frozen=True)
class CycleOptions:
    """given: true frames a rollout starts from, one number for each equal part of the run (published: 32, 8, 2).
    steps: of every generated frame. shift: of the noise levels. context: noise of a context frame while rolling out.
    light, light_sigma: share of frames in a training sequence that get at most this noise, as contexts have; so does every
    frame behind one that does not.

    Raises ForcingError for numbers that no rollout can have."""

    given: tuple[int, ...] = (32, 8, 2)
    steps: int = 4
    shift: float = 3.0
    context: float = 0.15
    light: float = 0.2
    light_sigma: float = 0.25

    def __post_init__(self):
        if not self.given or min(self.given) < 1:
            raise ForcingError(f"A rollout cannot start from {self.given} frames. Give at least one number, each at least 1.")
        if not (0 <= self.context < 1 and 0 <= self.light <= 1 and 0 < self.light_sigma < 1):
            raise ForcingError(f"context {self.context}, light {self.light} and light_sigma {self.light_sigma} have to lie "
                               "between 0 and 1. Use about 0.15, 0.2 and 0.25.")


def given_at(options: CycleOptions, progress: float) -> int:
    """True frames that a rollout starts from, when `progress` (0..1) of the run is done."""
    return options.given[min(len(options.given) - 1, int(progress * len(options.given)))]


def draw_levels(clip: Tensor, options: CycleOptions, generator: torch.Generator) -> Tensor:
    """Rows of the training table [B, F], one a frame: uniform, or for a share `light` of the frames among the clean ones, and
    always there for a frame behind a uniform one. In a rollout, what a frame follows is as good as clean; behind a noisy one,
    nobody could know where it has to be."""
    rows = draw_rows(clip, TRAIN_STEPS, generator, block=1)
    first = first_light(options)
    clean = first + rows * (TRAIN_STEPS - first) // TRAIN_STEPS
    light = torch.rand(rows.shape, generator=generator, device=generator.device).to(rows.device) < options.light
    for frame in range(1, rows.shape[1]):
        light[:, frame] |= ~light[:, frame - 1]
    return torch.where(light, clean, rows)


def first_light(options: CycleOptions) -> int:
    """The first row of the training table with at most the noise of a context."""
    return int((table(options.shift)[1] > options.light_sigma).sum())


def at_rows(clean: Tensor, rows: Tensor, shift: float, generator: torch.Generator) -> Noised:
    """The clip with fresh noise at these rows; timesteps are whole, as the network is told them."""
    timesteps, sigmas = (values.to(clean.device)[rows] for values in table(shift))
    noise = draw_noise(clean, generator)
    return Noised(add_noise(clean, noise, sigmas), noise, timesteps.floor(), sigmas)


def forcing_loss(net: LiveModel, clean: Tensor, condition: Tensor, options: CycleOptions, generator: torch.Generator, *,
                 last: int | None = None, cells: Tensor | None = None) -> Tensor:
    """Flow-matching error of a sequence [B, C, F, h, w] whose frames have noise levels of their own, each seeing those before
    it. last: count that many frames at the end only. cells: weights [B, 1, F, h, w]."""
    noisy = at_rows(clean, draw_levels(clean, options, generator), options.shift, generator)
    velocity = net(noisy.x, noisy.timesteps, condition)
    part = slice(-last if last else None, None)
    return weighted_mse(velocity[:, :, part], (noisy.noise - clean)[:, :, part],
                        cells=None if cells is None else cells[:, :, part])


def loss(net: LiveModel, clean: Tensor, forward: Tensor, backward: Tensor, given: int, options: CycleOptions,
         generator: torch.Generator, *, cells: Tensor | None = None) -> Tensor:
    """Error of recovering the first `given` frames of a clip [B, C, F, h, w] from the rest of the rollout they start.

    forward: conditions of the clip, [B, F, channels]. backward: those that lead from its last frame to its first.
    cells: weights [B, 1, F, h, w] in the order of the clip. Raises ForcingError where nothing is left to roll out.
    """
    if not 0 < given < clean.shape[2]:
        raise ForcingError(f"{given} of {clean.shape[2]} frames cannot be given: a rollout needs at least one and leaves at "
                           "least one. Use fewer given frames or longer clips.")
    walked = roll_out(net, clean[:, :, :given], forward, options, generator)
    cells = None if cells is None else cells.flip(2)
    return forcing_loss(net, walked.flip(2), backward, options, generator, last=given, cells=cells)


@torch.no_grad()
def roll_out(net: LiveModel, start: Tensor, condition: Tensor, options: CycleOptions, generator: torch.Generator) -> Tensor:
    """The frames `start` [B, C, M, h, w] and those that follow under the conditions [B, F, channels]: [B, C, F, h, w].

    All F frames fit in the window, so a frame's keys and values are computed once, at its own light noise."""
    context, frames = Context(), [start]
    level = told(options.context)
    remember(net, context, start, level, condition[:, :start.shape[2]], generator)
    levels = live_levels(options.steps, options.shift)
    for frame in range(start.shape[2], condition.shape[1]):
        own = condition[:, frame:frame + 1]
        made = _denoised(net, draw_noise(start[:, :, :1], generator), levels, own, context)
        frames.append(made)
        if frame + 1 < condition.shape[1]:
            remember(net, context, made, level, own, generator)
    return torch.cat(frames, dim=2)


def remember(net: LiveModel, context: Context, x: Tensor, level: Level, condition: Tensor, generator: torch.Generator) -> None:
    """Add frames, given noise of this level, to a context."""
    noisy = renoise(x, draw_noise(x, generator), level.sigma)
    added = net.remember(noisy, _timesteps(x, level), condition, context=context)
    context.frames, context.keys, context.values = added.frames, added.keys, added.values


def _denoised(net: LiveModel, x: Tensor, levels: Sequence[Level], condition: Tensor, context: Context) -> Tensor:
    def predict(x: Tensor, level: Level) -> Tensor:
        return x0_from_velocity(x, net(x, _timesteps(x, level), condition, context), [level.sigma])

    return dpm(x, levels, predict, lambda step: x)


def _timesteps(x: Tensor, level: Level) -> Tensor:
    return torch.full((x.shape[0], x.shape[2]), level.timestep, device=x.device)
