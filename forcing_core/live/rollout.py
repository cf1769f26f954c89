"""LIVE from start to end: start frames and a track in, frames out, through the block rollout.

Source: arXiv 2602.03747, public repo Junchao-cs/LIVE @20c82a9: frame by frame, 18 steps of DPM-Solver++ on a grid shifted by
3, a context of 32 frames (the new one included) at the noise of the last step.
"""
from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from ..errors import ForcingError
from ..noise import Noise
from ..plan import Block, layout
from ..rollout import RolloutState, block_rollout
from ..rollout.block import Steer
from ..schedule import TRAIN_STEPS, Level
from ..solvers import dpm
from ..streaming import ENDLESS, EndlessBlocks
from .conditions import Track, check_track
from .config import LiveConfig
from .denoiser import LiveDenoiser
from .model import LiveModel, check_latents

STEPS, SHIFT = 18, 3.0


def live_levels(steps: int = STEPS, shift: float = SHIFT) -> tuple[Level, ...]:
    """Levels of a frame, noisiest first: sigmas of an even grid from 0.999 down, shifted, the final 0 left out; the network
    is told whole timesteps. Raises ForcingError for less than two steps."""
    if steps < 2:
        raise ForcingError(f"LIVE cannot be sampled in {steps} steps: the last one is also the noise of the context. Use 18 as "
                           "published, at least 2.")
    # float32 as in the public code: timesteps are cut off, so the last digit counts
    u = (1.0 - torch.linspace(1.0, 1.0 / TRAIN_STEPS, steps + 1)).flip(0)[:-1]
    sigmas = shift * u / (1 + (shift - 1) * u)
    return tuple(map(told, sigmas))


def told(sigma: Tensor | float) -> Level:
    """The level of a sigma: its timestep without the fraction, in the precision of the sigma."""
    return Level(float(int(TRAIN_STEPS * sigma)), float(sigma))


def context_noise(config: LiveConfig, steps: int = STEPS) -> Level:
    """Noise of the context in a rollout of so many steps."""
    return live_levels(steps)[-1] if config.context is None else told(config.context)


def live_rollout(net: LiveModel, track: Track, given: Tensor, frames: int, noise: Noise, *, window: int | None = None,
                 steps: int = STEPS, block: int = 1, context_level: Level | None = None, dtype: torch.dtype = torch.float32,
                 resume: RolloutState | None = None, denoiser: LiveDenoiser | None = None,
                 steer: Steer | None = None) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) of `frames` frames that follow the `given` ones [B, C, M, H, W].

    track: as long as given and new frames together. window: frames of a sequence, by default the network's. block: frames
    made together, 1 as published. context_level: noise of the context, by default the network's. dtype: of the weights.
    denoiser: one that is kept by the caller, for its state. steer: called before every block, see `block_rollout`; with
    frames=ENDLESS it ends the rollout. Raises ForcingError for tracks, lengths and windows that do not
    fit, before anything runs.
    """
    levels = live_levels(steps)
    if given.ndim != 5 or given.shape[2] < 1:
        raise ForcingError("LIVE goes on from pictures and got none. Give at least one start picture.")
    check_latents(net.config, given)
    check_track(track, net.config, given.shape[2] + frames)
    start = given.shape[2]
    blocks = EndlessBlocks(block, start) if frames == ENDLESS else layout(frames, block, given=start)
    context = context_level or context_noise(net.config, steps)
    denoiser = denoiser or LiveDenoiser(net, track, noise, context, window or net.config.window, dtype)
    if block >= denoiser.window:
        raise ForcingError(f"Blocks of {block} frames leave no room for a context in a window of {denoiser.window}. Use "
                           "blocks of 1 frame, as published.")
    return block_rollout(denoiser, blocks, levels, noise, context=given, block=block, solver=dpm, resume=resume, steer=steer)
