"""Causal ODE initialisation: learn the end of a many-step teacher's trajectory from a few points on it.

CausVid (arXiv 2412.07772) and Self Forcing (2506.08009) solve a bidirectional teacher and regress under a block-causal
mask, a random kept point for every block. Causal Forcing (2602.02214) solves a teacher-forced causal teacher and
teacher-forces the student too, one kept point for a clip: what the student regresses is then a function of what it
sees. Axis legend as in `flow`; K kept points of a trajectory.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ForcingError
from ..schedule import TRAIN_STEPS
from ..wan import TextState, WanModel
from .flow import CausalOptions, draw_rows, euler_sigmas, guided, own_text, per_frame, weighted_mse, x0_of
from .parallel import parallel_velocity, teacher_forced_velocity


@dataclass(frozen=True)
class CausalOdeOptions(CausalOptions):
    """Defaults: Causal Forcing.

    steps, shift, guidance: of the teacher's Euler solution; keep: steps whose input is kept, rising.
    teacher_forced: teacher and student see clean blocks; else the teacher sees everything at once and the student
    its own noisy past. per_block: draw a point for every block, not for every clip. clean_blocks: the end itself may be
    drawn too, as a clean block without a loss that others see (CausVid's step list ends with 0).
    """

    steps: int = 48
    keep: tuple[int, ...] = (0, 12, 24, 36)
    guidance: float = 6.0
    teacher_forced: bool = True
    per_block: bool = False
    clean_blocks: bool = False

    def __post_init__(self):
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.keep, self.keep[1:]))
        if not self.keep or not rising or not 0 <= self.keep[0] <= self.keep[-1] < self.steps:
            raise ForcingError(f"The kept steps {self.keep} of {self.steps} are not usable. "
                               f"Give rising whole numbers from 0 to {self.steps - 1}.")

    def sigmas(self) -> Tensor:
        """Of the kept points and of the end, [K + 1]."""
        return euler_sigmas(self.steps, self.shift)[[*self.keep, self.steps]]


CAUSAL_FORCING = CausalOdeOptions()
CAUSVID = CausalOdeOptions(shift=8.0, steps=50, keep=(0, 36, 44), teacher_forced=False, per_block=True,
                           clean_blocks=True)
SELF_FORCING = CausalOdeOptions(shift=8.0, teacher_forced=False, per_block=True)


def velocity(net: WanModel, x: Tensor, timesteps: Tensor, text: TextState, options: CausalOdeOptions, mask: Tensor,
             clean: Tensor | None) -> Tensor:
    """Velocity of x [B, C, F, h, w] at timesteps [B, F]; after the clean half where the options say so."""
    state = own_text(text, x)
    if not options.teacher_forced:
        return parallel_velocity(net, x, timesteps, state, mask)
    if clean is None:
        raise ForcingError("A teacher-forced trajectory needs the clean clip. Give it as `clean`.")
    return teacher_forced_velocity(net, clean, x, timesteps, state, mask)


@torch.no_grad()
def trajectory(teacher: WanModel, noise: Tensor, text: TextState, negative: TextState | None,
               options: CausalOdeOptions, *, clean: Tensor | None = None) -> Tensor:
    """Kept points and the end of the teacher's solution from `noise`, [B, K + 1, C, F, h, w], noisiest first.

    noise, clean: [B, C, F, h, w]. Two forwards a step, one where guidance is 1.
    """
    batch, frames = noise.shape[0], noise.shape[2]
    sigmas = euler_sigmas(options.steps, options.shift).tolist()
    mask = options.teacher_forcing_mask(frames) if options.teacher_forced else torch.ones(frames, frames).bool()
    x, kept = noise, []
    for step, (now, to) in enumerate(zip(sigmas, sigmas[1:])):
        if step in options.keep:
            kept.append(x)
        timesteps = torch.full((batch, frames), TRAIN_STEPS * now, device=x.device)
        v = guided(lambda side, x=x, t=timesteps: velocity(teacher, x, t, side, options, mask, clean), text, negative,
                   options.guidance)
        x = x - (now - to) * v
    return torch.stack([*kept, x], dim=1)


def pick(states: Tensor, options: CausalOdeOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(x [B, C, F, h, w], sigmas [B, F]): a random point of the trajectory for every block or clip."""
    frames, points = states.shape[3], len(options.keep) + 1
    if states.shape[1] != points:
        raise ForcingError(f"The trajectory has {states.shape[1]} points and the options {points} with the end. "
                           "Make the trajectory with the same `keep`.")
    block, first = (options.block, options.independent_first) if options.per_block else (frames, False)
    count = points if options.clean_blocks else points - 1
    rows = draw_rows(states[:, 0], count, generator, block=block, independent_first=first)
    index = per_frame(rows)[:, None].expand(-1, 1, *states.shape[2:3], -1, *states.shape[4:])
    return states.gather(1, index).squeeze(1), options.sigmas().to(states.device)[rows]


def loss(student: WanModel, states: Tensor, text: TextState, options: CausalOdeOptions, generator: torch.Generator, *,
         clean: Tensor | None = None, cells: Tensor | None = None) -> Tensor:
    """Mean squared error of the student's x0 against the trajectory's end; blocks drawn clean do not count.

    states: of `trajectory`, [B, K + 1, C, F, h, w]; clean: the clip it was teacher-forced with; cells: weights
    [B, 1, F, h, w].
    """
    frames = states.shape[3]
    x, sigmas = pick(states, options, generator)
    mask = options.teacher_forcing_mask(frames) if options.teacher_forced else options.causal_mask(frames)
    made = x0_of(x, velocity(student, x, TRAIN_STEPS * sigmas, text, options, mask, clean), sigmas)
    counts = per_frame((sigmas > 0).float())
    return weighted_mse(made, states[:, -1], cells=counts if cells is None else counts * cells)
