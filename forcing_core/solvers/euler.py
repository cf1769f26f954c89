"""Euler steps of the probability flow, and the levels of the scheduler that Live Avatar runs them with.

Source: public repo Alibaba-Quark/LiveAvatar (arXiv 2512.04677), with the flow-matching Euler scheduler of diffusers.
"""
from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from ..schedule import TRAIN_STEPS, Level


def euler(x: Tensor, levels: Sequence[Level], predict: Callable[[Tensor, Level], Tensor],
          fresh: Callable[[int], Tensor]) -> Tensor:
    """Deterministic: `fresh` is not used. The last step, to sigma 0, is the prediction itself."""
    for level, following in zip(levels, levels[1:]):
        share = following.sigma / level.sigma
        x = share * x + (1 - share) * predict(x, level)
    return predict(x, levels[-1])


def euler_levels(count: int, shift: float) -> tuple[Level, ...]:
    """`count` levels from 1 down to the least of the 1000 training steps, evenly spaced in the shifted sigma, and shifted once
    more: the scheduler does so when it is told a number of steps, and the model was distilled on that."""
    def shifted(u: Tensor) -> Tensor:
        return shift * u / (1 + (shift - 1) * u)

    least = shifted(torch.tensor(1 / TRAIN_STEPS, dtype=torch.float64))
    sigmas = shifted(torch.linspace(1.0, float(least), count, dtype=torch.float64)).float()
    return tuple(Level(float(TRAIN_STEPS * s), float(s)) for s in sigmas)
