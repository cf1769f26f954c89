"""Flow-matching schedules of the Self-Forcing family.

Axis legend: b batch, c latent channel, f latent frame, h/w latent height and width.

A model of this family is trained on a short *denoising step list*. Every entry becomes a `Level`: the
timestep that the network is told and the sigma that the arithmetic uses. They are kept apart because two
published systems break `timestep == 1000 * sigma` (CausVid's unwarped list, the UniPC teacher).

Sources: arXiv 2506.08009 (Self Forcing), 2412.07772 (CausVid), 2605.15141 (Causal Forcing++).
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Sequence

import torch
from torch import Tensor

from .errors import ForcingError

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Level:
    """One noise level: `timestep` is fed to the network (0..1000), `sigma` (0..1) is used in the arithmetic."""

    timestep: float
    sigma: float


CLEAN = Level(0.0, 0.0)


def clean(timestep: float = 0.0) -> Level:
    """The level of a clean pass. `timestep` is the context timestep; no noise is ever added for it."""
    return Level(float(timestep), 0.0)


@lru_cache(maxsize=None)
def table(shift: float) -> tuple[Tensor, Tensor]:
    """(timesteps, sigmas) of the 1000 training steps, float32, for one flow shift.

    u_i = 1 - i/1000; sigma_i = shift*u_i / (1 + (shift-1)*u_i); timestep_i = 1000*sigma_i.
    """
    u = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1, dtype=torch.float32)[:-1]
    sigmas = shift * u / (1 + (shift - 1) * u)
    return sigmas * TRAIN_STEPS, sigmas


def nearest_sigma(timestep: float, shift: float) -> float:
    """Sigma of the table entry whose timestep is nearest (first minimum); no interpolation, as published."""
    timesteps, sigmas = table(shift)
    return float(sigmas[torch.argmin((timesteps - timestep).abs())])


def warp_timestep(value: int, shift: float) -> float:
    """The timestep that entry `value` of an unwarped step list stands for (table row 1000 - value; 0 for 0)."""
    timesteps, _ = table(shift)
    row = TRAIN_STEPS - value
    return 0.0 if row == TRAIN_STEPS else float(timesteps[row])


def levels(steps: Sequence[int], shift: float, warp: bool = True) -> tuple[Level, ...]:
    """Levels of a denoising step list, noisiest first.

    steps: integers in 1..1000, strictly falling; a trailing 0 (CausVid's form) is dropped.
    warp: True maps every entry through the flow shift; False feeds it to the network as it is.
    Raises ForcingError for an empty, rising or out-of-range list.
    """
    steps = [int(s) for s in steps]
    if steps and steps[-1] == 0:
        steps.pop()
    if not steps or any(not 1 <= s <= TRAIN_STEPS for s in steps) or any(a <= b for a, b in zip(steps, steps[1:])):
        raise ForcingError(f"The denoising step list {steps} is not usable. "
                           "Give falling whole numbers between 1000 and 1, for example 1000, 750, 500, 250.")
    timesteps = [warp_timestep(s, shift) if warp else float(s) for s in steps]
    return tuple(Level(t, nearest_sigma(t, shift)) for t in timesteps)


def unipc_levels(count: int, shift: float) -> tuple[Level, ...]:
    """Levels of the many-step teacher: sigma_k = shift applied to 0.999*(1 - k/count), integer timesteps.

    The network is told the truncated 1000*sigma while the solver keeps its own sigma (first one 0.9998).
    Source: arXiv 2602.02214, public repo thu-ml/Causal-Forcing.
    """
    u = 0.999 * (1 - torch.arange(count, dtype=torch.float64) / count)
    sigmas = (shift * u / (1 + (shift - 1) * u)).to(torch.float32)
    return tuple(Level(float(int(s * TRAIN_STEPS)), float(s)) for s in sigmas)


def x0_from_velocity(x: Tensor, velocity: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x0 = x - sigma*v in float64, rounded to the dtype of `velocity`.

    x, velocity: [B, C, F, H, W]; sigmas: one per frame.
    """
    sigma = x.new_tensor(sigmas, dtype=torch.float64).view(1, 1, -1, 1, 1)
    return (x.double() - sigma * velocity.double()).to(velocity.dtype)


def renoise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma)*x0 + sigma*noise in the dtype of `noise`; all [B, C, F, H, W]."""
    s = torch.tensor(sigma, dtype=torch.float32, device=x0.device)
    return ((1 - s) * x0 + s * noise).to(noise.dtype)
