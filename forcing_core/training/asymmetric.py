"""Asymmetric distillation: a causal few-step student learns from a bidirectional many-step teacher.

Axis legend: latents [B, C, F, h, w], timesteps [B, F] in 0..1000.

The student's input is either a clip of data whose blocks are noised to random entries of the step list, seen under
the block-causal mask (diffusion forcing, as published), or its own rollout. What it makes of it is scored by
distribution matching; the teacher sees the whole clip.

Source: arXiv 2412.07772 (CausVid); constants of the public repo tianweiy/CausVid.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
from torch import Tensor

from ..noise import Noise
from ..plan import Block
from ..policies import WindowOptions
from ..schedule import CLEAN, Level, levels
from ..wan import TextState
from .dmd import DmdOptions, Velocity, generator_loss, score
from .flow import add_noise, draw_noise, draw_rows, x0_of
from .parallel import block_causal
from .self_rollout import first_gradient_frame, random_exit, self_rollout


@dataclass(frozen=True)
class AsymmetricOptions:
    """steps, shift, warp: the student's step list. clean_entry: the list ends with 0, so that some blocks are
    given clean (they get no gradient and are context of the others). block, independent_first: layout of the clip.
    """

    steps: tuple[int, ...] = (1000, 757, 522)
    shift: float = 8.0
    warp: bool = False
    clean_entry: bool = True
    block: int = 3
    independent_first: bool = False
    dmd: DmdOptions = field(default_factory=lambda: DmdOptions(guidance=3.5, shift=8.0))

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels of a rollout."""
        return levels(self.steps, self.shift, self.warp)

    @property
    def entries(self) -> tuple[Level, ...]:
        """Levels that a block of data may be noised to."""
        return self.levels + (CLEAN,) * self.clean_entry


def draw_entries(clips: Tensor, options: AsymmetricOptions, generator: torch.Generator) -> Tensor:
    """int64 [B, F]: for every block of every clip an entry of the list, uniform."""
    return draw_rows(clips, len(options.entries), generator, block=options.block,
                     independent_first=options.independent_first)


def forced_clip(student: Any, clips: Tensor, text: TextState, options: AsymmetricOptions,
                generator: torch.Generator) -> Tensor:
    """x0 like clips that the student predicts from clips of data, each block at a random entry, in one forward."""
    entries = draw_entries(clips, options, generator)
    timesteps, sigmas = (clips.new_tensor([getattr(level, name) for level in options.entries], dtype=torch.float32)
                         [entries] for name in ("timestep", "sigma"))
    noisy = add_noise(clips, draw_noise(clips, generator), sigmas)
    mask = block_causal(clips.shape[2], options.block, independent_first=options.independent_first)
    return x0_of(noisy, score(student, mask)(noisy, timesteps, text), sigmas)


def loss(student: Any, clips: Tensor, text: TextState, negative: TextState | None, teacher: Velocity,
         critic: Velocity, options: AsymmetricOptions, generator: torch.Generator, *,
         weights: Tensor | None = None) -> Tensor:
    """The student's loss on clips of data [B, C, F, h, w] (CausVid).

    teacher, critic: velocity functions, as `dmd.score` makes them. The critic learns by `dmd.critic_loss` on clips
    of `forced_clip`. weights: [B, 1, F, h, w].
    """
    made = forced_clip(student, clips, text, options, generator)
    return generator_loss(made, text, negative, teacher, critic, options.dmd, generator, weights=weights)


def rollout_loss(student: Any, blocks: Sequence[Block], noise: Noise, text: TextState, negative: TextState | None,
                 teacher: Velocity, critic: Velocity, options: AsymmetricOptions, generator: torch.Generator, *,
                 cache: WindowOptions, weights: Tensor | None = None) -> Tensor:
    """The student's loss on a rollout of its own, without data (Self Forcing)."""
    frames = blocks[-1].end - blocks[0].first
    made = self_rollout(student, blocks, options.levels, noise, text, random_exit(len(options.levels), generator),
                        blocks[0].first + first_gradient_frame(frames), cache=cache)
    return generator_loss(made, text, negative, teacher, critic, options.dmd, generator, weights=weights)
