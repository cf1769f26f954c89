"""Rolling Forcing: as many blocks as steps are denoised jointly, each at its own level.

Axis legend: B batch, C channel, F latent frame, n frames of a window. Windows of one random phase do not overlap and
hold every block once, so one forward of [clean | noisy] trains a whole clip: a noisy frame sees the noisy frames of
its window and the clean ones before it. Positions are absolute; the published inference moves the sink along, which
a mask cannot say.

Source: arXiv 2509.25161.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from ..plan import Block, layout
from ..rollout.windows import Window, of_phase, single_windows, windows
from ..schedule import Level, levels, renoise
from ..wan import TextState, WanModel
from .flow import CausalOptions, add_noise, draw_noise, own_text, weighted_mse, x0_of
from .parallel import parallel_velocity, teacher_forced_velocity


@dataclass(frozen=True)
class RollingOptions(CausalOptions):
    """steps: the levels, as in `schedule.levels`. window: includes the frames that are denoised jointly.
    single_share: share of the draws in which blocks are denoised one by one, as in plain Self Forcing.
    grad_frames: newest frames of a rollout that get gradients.
    """

    window: int | None = 21
    sink: int = 3
    steps: tuple[int, ...] = (1000, 800, 600, 400, 200)
    single_share: float = 0.5
    grad_frames: int = 21

    def __post_init__(self):
        super().__post_init__()
        need = self.block * len(self.levels) + self.sink
        if self.window is not None and self.window < need:
            raise ForcingError(f"{len(self.levels)} blocks of {self.block} and a sink of {self.sink} frames do not "
                               f"fit into a window of {self.window}. Use a window of at least {need} frames.")

    @property
    def levels(self) -> tuple[Level, ...]:
        return levels(self.steps, self.shift)

    def blocks(self, frames: int) -> tuple[Block, ...]:
        return layout(frames, self.block, independent_first=self.independent_first)


@dataclass(frozen=True)
class Draw:
    """schedule: all windows of a rollout, rolling or single; chosen: those of one phase, every block once."""

    schedule: tuple[Window, ...]
    chosen: tuple[Window, ...]


@dataclass(frozen=True)
class Joint:
    """A clip predicted in one forward: x0 and velocity with their graph, and its noise; all [B, C, F, h, w]."""

    x0: Tensor
    velocity: Tensor
    noise: Tensor


def draw_windows(blocks: int, options: RollingOptions, generator: torch.Generator) -> Draw:
    """A random phase of the rolling schedule, or of the plain one with probability `single_share`."""
    steps = len(options.levels)
    single = float(torch.rand((), generator=generator, device=generator.device)) < options.single_share
    phase = int(torch.randint(steps, (), generator=generator, device=generator.device))
    schedule = (single_windows if single else windows)(blocks, steps)
    return Draw(schedule, of_phase(schedule, steps, phase))


def rolling_mask(frames: int, chosen: Sequence[Window], options: RollingOptions) -> Tensor:
    """[2F, 2F] for [clean | noisy] under the chosen windows; the clean half is block-causal."""
    blocks = options.blocks(frames)
    spans = [(blocks[w.start].first, blocks[w.end - 1].end) for w in chosen]
    noisy = torch.zeros(frames, 2 * frames, dtype=torch.bool)
    for first, end in spans:
        noisy[first:end, :first] = _visible(first, end, options)
        noisy[first:end, frames + first:frames + end] = True
    clean = torch.cat([options.causal_mask(frames), torch.zeros(frames, frames, dtype=torch.bool)], 1)
    return torch.cat([clean, noisy])


def predict(net: WanModel, clean: Tensor, text: TextState, options: RollingOptions, chosen: Sequence[Window],
            generator: torch.Generator, context: Tensor | None = None) -> Joint:
    """Noise every block of `clean` [B, C, F, h, w] to the level of its window and denoise all in one forward.

    context: what the windows see as past instead of `clean`, for example a resampled or generated clip.
    """
    timesteps, sigmas = _levels(clean, options.blocks(clean.shape[2]), chosen, options)
    noise = draw_noise(clean, generator)
    noisy = add_noise(clean, noise, sigmas)
    velocity = teacher_forced_velocity(net, clean if context is None else context, noisy, timesteps,
                                       own_text(text, clean), rolling_mask(clean.shape[2], chosen, options))
    return Joint(x0_of(noisy, velocity, sigmas), velocity, noise)


def loss(student: WanModel, clean: Tensor, text: TextState, options: RollingOptions, generator: torch.Generator, *,
         cells: Tensor | None = None, context: Tensor | None = None) -> Tensor:
    """Flow matching of a clip [B, C, F, h, w] at the levels of random windows. cells: weights [B, 1, F, h, w]."""
    chosen = draw_windows(len(options.blocks(clean.shape[2])), options, generator).chosen
    joint = predict(student, clean, text, options, chosen, generator, context)
    return weighted_mse(joint.velocity, joint.noise - clean, cells=cells)


def rollout(student: WanModel, noise: Tensor, text: TextState, options: RollingOptions, generator: torch.Generator,
            draw: Draw | None = None) -> Tensor:
    """The clip that the student rolls out from `noise` [B, C, F, h, w]: what DMD is taken of.

    Every frame is the x0 of its chosen window, so frames stand at different levels of the schedule. The last
    `grad_frames` carry gradients; what becomes past or is noised again carries none. The past is encoded inside
    each forward, whose weights so get gradients for that too, as in teacher forcing.
    """
    blocks, steps = options.blocks(noise.shape[2]), options.levels
    draw = draw or draw_windows(len(blocks), options, generator)
    current, past, clip = noise.clone(), torch.zeros_like(noise), []
    live_from = noise.shape[2] - options.grad_frames
    for window in draw.schedule:
        inside, chosen = blocks[window.start:window.end], window in draw.chosen
        with torch.set_grad_enabled(chosen and inside[-1].end > live_from and torch.is_grad_enabled()):
            made = _window_x0(student, past, current, blocks, window, text, options)
        for block, level, x0 in zip(inside, window.levels, made.split([b.frames for b in inside], 2)):
            here = slice(block.first, block.end)
            if chosen:
                clip.append(x0 if block.end > live_from else x0.detach())
            if level == len(steps) - 1:
                past[:, :, here] = x0.detach()
            else:
                current[:, :, here] = renoise(x0.detach(), draw_noise(x0, generator), steps[level + 1].sigma)
    return torch.cat(clip, 2)  # chosen windows come in the order of their blocks


def _window_x0(net: WanModel, past: Tensor, current: Tensor, blocks: Sequence[Block], window: Window,
               text: TextState, options: RollingOptions) -> Tensor:
    """x0 [B, C, n, h, w] of one window over the finished frames before it."""
    first, end = blocks[window.start].first, blocks[window.end - 1].end
    noisy = current[:, :, first:end]
    timesteps, sigmas = _levels(noisy, blocks, [window], options)
    mask = torch.ones(end, end, dtype=torch.bool)
    mask[first:, :first] = _visible(first, end, options)
    if first:
        mask[:first, :first], mask[:first, first:] = options.causal_mask(first), False
    told = torch.cat([timesteps.new_zeros(timesteps.shape[0], first), timesteps], 1)
    x = torch.cat([past[:, :, :first], noisy], 2)
    return x0_of(noisy, parallel_velocity(net, x, told, own_text(text, x), mask)[:, :, first:], sigmas)


def _visible(first: int, end: int, options: RollingOptions) -> Tensor:
    """[first] bool: which frames before a window of frames first..end-1 it sees."""
    key = torch.arange(first)
    if options.window is None:
        return torch.ones_like(key, dtype=torch.bool)
    return (key < options.sink) | (key >= end - (options.window - options.sink))


def _levels(like: Tensor, blocks: Sequence[Block], chosen: Sequence[Window],
            options: RollingOptions) -> tuple[Tensor, Tensor]:
    """(timesteps, sigmas) of the frames of these windows, float32 [B, n]."""
    steps = [options.levels[level] for window in chosen for block, level in
             zip(blocks[window.start:window.end], window.levels) for _ in range(block.frames)]
    told, used = ([getattr(step, name) for step in steps] for name in ("timestep", "sigma"))
    return tuple(torch.tensor(values, device=like.device).expand(like.shape[0], -1) for values in (told, used))
