"""Distribution matching on long rollouts: a teacher of short clips corrects any part of a long video.

Axis legend of latents: [B, C, F, h, w]; K frames of a window, N frames of a rollout.

The student rolls out N frames, more than the teacher can see. A window of K frames at a uniform offset is re-noised
from the student's own clean latents, x_t = (1 - sigma) x0 + sigma noise (backward noise initialisation), so that
teacher and critic see a middle of a video with all the errors that grew up to there. Frames behind the window
are not made, and frames before it leave no graph.

Source: arXiv 2510.02283 (Self-Forcing++).
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from ..noise import Noise
from ..plan import Block
from ..policies import WindowOptions
from ..schedule import Level
from ..wan import TextState
from .dmd import DmdOptions, Velocity, generator_loss
from .self_rollout import random_exit, self_rollout


@dataclass(frozen=True)
class ExtendedOptions:
    """window: K, latent frames that the teacher was trained on. dmd: of the loss in the window."""

    window: int = 21
    dmd: DmdOptions = field(default_factory=DmdOptions)

    def __post_init__(self):
        if self.window < 1:
            raise ForcingError(f"A window of {self.window} frames is empty. Use at least 1.")


def window_offset(frames: int, window: int, generator: torch.Generator) -> int:
    """First frame of a window in a rollout of `frames`: uniform over 0..N-K. Raises ForcingError for N < K."""
    if frames < window:
        raise ForcingError(f"A rollout of {frames} frames has no window of {window}. Roll out at least {window}, or "
                           "use a smaller window.")
    return int(torch.randint(frames - window + 1, (), generator=generator, device=generator.device))


def rollout_window(net: Any, blocks: Sequence[Block], levels: Sequence[Level], noise: Noise, text: TextState,
                   exit_step: int, offset: int, window: int, *, cache: WindowOptions, **settings: Any) -> Tensor:
    """Frames offset .. offset + window - 1 of a self-rollout, [B, C, K, h, w], with the graph of their blocks.

    blocks: of the whole rollout; offset: counted from its first frame. settings: of `block_rollout`.
    """
    first = blocks[0].first + offset
    needed = [block for block in blocks if block.first < first + window]
    live = next(block.first for block in needed if block.end > first)
    made = self_rollout(net, needed, levels, noise, text, exit_step, live, cache=cache, **settings)
    return made[:, :, offset:offset + window]


def random_window(net: Any, blocks: Sequence[Block], levels: Sequence[Level], noise: Noise, text: TextState,
                  options: ExtendedOptions, generator: torch.Generator, *, cache: WindowOptions,
                  **settings: Any) -> Tensor:
    """`rollout_window` at a random offset and exit step. Under no_grad: what `dmd.critic_loss` trains the critic on."""
    offset = window_offset(blocks[-1].end - blocks[0].first, options.window, generator)
    return rollout_window(net, blocks, levels, noise, text, random_exit(len(levels), generator), offset,
                          options.window, cache=cache, **settings)


def loss(net: Any, blocks: Sequence[Block], levels: Sequence[Level], noise: Noise, text: TextState,
         negative: TextState | None, teacher: Velocity, critic: Velocity, options: ExtendedOptions,
         generator: torch.Generator, *, cache: WindowOptions, **settings: Any) -> Tensor:
    """The student's loss in a random window of its rollout; the window is re-noised inside `generator_loss`.

    blocks: N frames, more than the teacher's window. noise: new for every iteration. cache: the rolling window of
    inference (published: 21 frames, no sink).
    """
    clip = random_window(net, blocks, levels, noise, text, options, generator, cache=cache, **settings)
    return generator_loss(clip, text, negative, teacher, critic, options.dmd, generator)
