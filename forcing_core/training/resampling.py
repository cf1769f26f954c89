"""Resampling Forcing: flow matching on a history that carries the student's own errors, with no teacher.

Axis legend: B batch, C channel, F latent frame. The true history is noised to a level t_s, the student takes it
back to clean without gradient, and the true frames are then learned on top of that, teacher-forced.

Source: arXiv 2512.15702.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from ..errors import ForcingError
from ..memory import make_memory
from ..plan import Block, layout
from ..policies import WindowOptions
from ..schedule import TRAIN_STEPS
from ..wan import Ops, TextState, WanModel, forward
from .flow import CausalOptions, add_noise, draw_noise, draw_rows, noised, own_text, weighted_mse
from .parallel import teacher_forced_velocity


@dataclass(frozen=True)
class ResamplingOptions(CausalOptions):
    """block: latent frames a block, 1 in the paper. mode: "autoregressive" (each block on the resampled ones before
    it: errors add up as in a rollout) or "parallel" (each on the true ones). strength: shift of t_s; the paper found
    0.1 to let errors pile up and 3.0 to let the content drift. steps: Euler steps back to clean, our choice.
    bias: of the levels the loss is taken at, see `flow.draw_rows`.
    """

    block: int = 1
    mode: str = "autoregressive"
    strength: float = 0.6
    steps: int = 4
    bias: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in MODES:
            raise ForcingError(f"mode = {self.mode!r} is not known. Use one of {', '.join(MODES)}.")
        if self.steps < 1 or self.strength <= 0:
            raise ForcingError(f"{self.steps} steps from a level of shift {self.strength} resample nothing. Use at "
                               "least 1 step and a positive strength.")

    def blocks(self, frames: int) -> tuple[Block, ...]:
        return layout(frames, self.block, independent_first=self.independent_first)


def draw_strength(batch: int, strength: float, generator: torch.Generator) -> Tensor:
    """t_s of every sample, [B] in 0..1: logit-normal(0, 1), shifted."""
    t = torch.sigmoid(torch.randn(batch, generator=generator, device=generator.device))
    return strength * t / (1 + (strength - 1) * t)


@torch.no_grad()
def resample(net: WanModel, history: Tensor, text: TextState, options: ResamplingOptions,
             generator: torch.Generator) -> Tensor:
    """`history` [B, C, F, h, w] as the student would remember it; no gradient."""
    start = draw_strength(history.shape[0], options.strength, generator).to(history.device)
    noisy = add_noise(history, draw_noise(history, generator), start[:, None])
    return MODES[options.mode](net, history, noisy, start, own_text(text, history), options)


def loss(student: WanModel, clean: Tensor, text: TextState, options: ResamplingOptions, generator: torch.Generator, *,
         cells: Tensor | Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Flow matching of the true frames on the resampled ones. clean: [B, C, F, h, w]; cells: weights [B, 1, F, h, w], or a
    function of the drawn sigmas [B, F] that gives them.

    The last block is nobody's history and is not resampled. Raises ForcingError where there is only one block.
    """
    frames = clean.shape[2]
    last = options.blocks(frames)[-1].first
    if not last:
        raise ForcingError(f"A clip of {frames} latent frames is one block of {options.block} and has no history. "
                           "Use longer clips or smaller blocks.")
    past = torch.cat([resample(student, clean[:, :, :last], text, options, generator), clean[:, :, last:]], 2)
    rows = draw_rows(clean, TRAIN_STEPS, generator, block=options.block,
                     independent_first=options.independent_first, bias=options.bias)
    noisy = noised(clean, rows, options.shift, generator)
    velocity = teacher_forced_velocity(student, past, noisy.x, noisy.timesteps, own_text(text, clean),
                                       options.teacher_forcing_mask(frames))
    return weighted_mse(velocity, noisy.noise - clean, cells=cells(noisy.sigmas) if callable(cells) else cells)


def _autoregressive(net: WanModel, history: Tensor, noisy: Tensor, start: Tensor, text: TextState,
                    options: ResamplingOptions) -> Tensor:
    """Block by block through the KV memory of a rollout."""
    grid = history.shape[3] // net.patch_size[1], history.shape[4] // net.patch_size[2]
    cache = WindowOptions(options.window, options.sink, options.block)
    memory = make_memory(cache, history.shape[2], layers=net.config.layers, grid=grid,
                         head_dim=net.config.dim // net.config.heads, device=history.device)
    made = []
    for block in options.blocks(history.shape[2]):
        def run(x: Tensor, sigma: Tensor, phase: str = "noisy", block: Block = block) -> Tensor | None:
            return forward(net, x, _timesteps(sigma, x), text, memory.begin(block.first, block.frames, phase), Ops())

        made.append(_euler(noisy[:, :, block.first:block.end], start, options.steps, run))
        run(made[-1], torch.zeros_like(start), "clean")
    return torch.cat(made, 2)


def _parallel(net: WanModel, history: Tensor, noisy: Tensor, start: Tensor, text: TextState,
              options: ResamplingOptions) -> Tensor:
    """All blocks at once, each on the true frames before it."""
    mask = options.teacher_forcing_mask(history.shape[2])
    return _euler(noisy, start, options.steps,
                  lambda x, sigma: teacher_forced_velocity(net, history, x, _timesteps(sigma, x), text, mask))


# name -> (net, true history, noised history, t_s [B], text, options) -> resampled history
MODES = {"autoregressive": _autoregressive, "parallel": _parallel}


def _euler(x: Tensor, start: Tensor, steps: int, velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """From sigma `start` [B] to 0 in equal steps; `velocity(x, sigma [B])`."""
    stride = (start / steps).view(-1, 1, 1, 1, 1).to(x)
    for step in range(steps):
        x = x - stride * velocity(x, start * (1 - step / steps))
    return x


def _timesteps(sigma: Tensor, x: Tensor) -> Tensor:
    """[B, F] of one sigma [B] for all frames of x."""
    return (sigma * TRAIN_STEPS)[:, None].expand(-1, x.shape[2])
