"""Stages "student" (Self Forcing) and "long" (Self-Forcing++) of the micro model: distribution matching on own rollouts.

The teacher is causal and knows clean histories only, so it scores a generated clip as it was trained: every block,
noised, given the clean generated blocks before it; the critic does the same. The published teachers are bidirectional
and see the whole noised clip.

Both stages are one trainer: "long" rolls out more frames than the teacher's clips have, and the loss is taken in a
window at a random block of the rollout. A window's first frame, where it is not the video's, is made what the teacher
knows there: the latent of a single image.

Sources: arXiv 2506.08009 (Self Forcing), 2510.02283 (Self-Forcing++), 2509.22622 (LongLive: the first frame of a
window), 2602.02214 (Causal Forcing: causal teachers).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..micro import captions as words
from ..micro import world
from ..micro.bundle import SIZE
from ..micro.code import CELL, LinearCode
from ..noise import BlockNoise, mix
from ..plan import layout
from ..policies import WindowOptions
from ..schedule import levels
from ..wan import TextState, WanModel
from . import dmd
from .distil import DistilSettings, DistilTrainer
from .extended import rollout_window
from .flow import own_text
from .network import per_cell
from .parallel import teacher_forced_velocity, teacher_forcing
from .pixels import foreground
from .self_rollout import random_exit

BLOCK, STEP_LIST, SHIFT = 3, (1000, 750, 500, 250), 5.0


@dataclass(frozen=True)
class StudentSettings(DistilSettings):
    """A step makes one rollout of `batch` clips and trains the critic on it; every `critic_steps`-th trains the
    student too, after `ahead` steps in which the critic gets to know it.

    frames: latent frames of a rollout; window: of the loss and of the memory. guidance: extra, see `dmd.DmdOptions`.
    critic_rate: the critic's learning rates, in those of the student. real: weight of a consistency loss on true
    clips beside the student's own; 0 leaves it out.
    """

    frames: int = 21
    window: int = 21
    steps: int = 1500
    critic_steps: int = 3
    ahead: int = 30
    guidance: float = 0.15
    critic_rate: float = 2.0
    real: float = 0.0
    muon_lr: float = 0.001
    adamw_lr: float = 2.5e-4
    average: float = 0.98


@dataclass(frozen=True)
class LongSettings(StudentSettings):
    frames: int = 63
    steps: int = 600


QUICK = StudentSettings(frames=6, window=6, batch=2, lengths=(9, 21), steps=4, critic_steps=2, ahead=1, real=1.0,
                        code_clips=16)
LONG_QUICK = LongSettings(frames=9, window=6, batch=2, lengths=(9, 21), steps=4, critic_steps=2, ahead=1, code_clips=16)


def forced_score(net: WanModel, history: Tensor, block: int = BLOCK) -> dmd.Velocity:
    """A causal network as teacher or critic of the clip `history` [B, C, F, h, w]: teacher forcing on that clip."""
    history = history.detach()
    mask = teacher_forcing(history.shape[2], block)

    def velocity(x: Tensor, timesteps: Tensor, text: TextState) -> Tensor:
        return teacher_forced_velocity(net, history, x.to(history.dtype), timesteps, own_text(text, x), mask)
    return velocity


@torch.no_grad()
def as_image(code: LinearCode, latent: Tensor) -> Tensor:
    """The latent [B, 16, 1, h, w] of four frames as that of the last of them alone."""
    return code.encode(code.decode(torch.cat([latent, latent], 2))[:, :, -1:])


class StudentTrainer(DistilTrainer):
    name, stream, settings_type = "student", 12, StudentSettings
    losses = ("critic", "student")
    settings: StudentSettings

    def __init__(self, settings: StudentSettings, device: str = "cpu", code: LinearCode | None = None):
        super().__init__(settings, device, code)
        self.nets["critic"] = self.new_net()
        self.optimisers["critic_optimiser"] = self.new_optimiser(self.nets["critic"], settings.critic_rate)
        self.dmd = dmd.DmdOptions(guidance=settings.guidance, shift=SHIFT)
        self.levels, self.blocks = levels(STEP_LIST, SHIFT), layout(settings.frames, BLOCK)

    def sources(self, student: WanModel, teacher: WanModel) -> dict[str, WanModel]:
        return {**super().sources(student, teacher), "critic": teacher}

    def captions(self) -> Tensor:
        """Conditioning [B, 24, 4096] of the step's rollout."""
        s = self.settings
        attributes = world.draw(mix(s.seed, self.stream + 2, self.clock.total), s.batch, s.level, device=self.device)
        return self.codec.embed(words.tokens(attributes))

    def rollout(self, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(clip [B, 16, window, h, w], the frames [window] whose loss counts) of a rollout with the current weights."""
        s = self.settings
        places = (s.frames - s.window) // BLOCK + 1
        offset = BLOCK * int(torch.randint(places, (), generator=generator, device=self.device))
        noise = BlockNoise(mix(s.seed, self.stream + 3, self.clock.total), (s.batch, self.net.config.in_channels),
                           (SIZE[1] // CELL, SIZE[0] // CELL), self.device)
        clip = rollout_window(self.net, self.blocks, self.levels, noise, TextState(text),
                              random_exit(len(self.levels), generator), offset, s.window,
                              cache=WindowOptions(window=s.window, block=BLOCK))
        counts = torch.ones(s.window, dtype=torch.bool, device=self.device)
        if offset:
            clip, counts[0] = torch.cat([as_image(self.code, clip[:, :, :1]), clip[:, :, 1:]], 2), False
        return clip, counts

    @torch.no_grad()
    def weights(self, clip: Tensor) -> Tensor:
        """Weight of every cell of a made clip, [B, 1, F, h, w]: the foreground that the code shows counts more."""
        return 1 + self.settings.shapes * per_cell(foreground(self.code.decode(clip)))

    def step(self) -> dict[str, Tensor]:
        """One step of the critic, and of the student where it is due; the losses, still on the device."""
        s, generator, text = self.settings, self.generator(), self.captions()
        turn, waiting = divmod(self.clock.total - s.ahead, s.critic_steps)
        due = turn >= 0 and not waiting
        with torch.set_grad_enabled(due):
            clip, counts = self.rollout(text, generator)
        scored = {"weights": self.weights(clip.detach()), "frames": counts}
        critic = forced_score(self.nets["critic"], clip)
        losses = {}
        if due:
            teacher, empty = forced_score(self.nets["teacher"], clip), TextState(torch.zeros_like(text))
            losses["student"] = value = dmd.generator_loss(clip, TextState(text), empty, teacher, critic, self.dmd,
                                                           generator, **scored)
            self.move(value + s.real * self.agreement(generator) if s.real else value, turn)
        losses["critic"] = dmd.critic_loss(clip, TextState(text), critic, self.dmd, generator, **scored)
        losses["critic"].backward()
        self.optimisers["critic_optimiser"].step(self.rate())
        return self.noted(losses)


class LongTrainer(StudentTrainer):
    name, stream, settings_type = "long", 16, LongSettings
