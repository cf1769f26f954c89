"""DPM-Solver++ of order 2, multistep, for rectified flow; the first and the last step are of order 1.

With lambda = log(1-sigma) - log(sigma), h the step in lambda and phi = expm1(-h):
x' = (s'/s)*x - (1-s')*phi*(m + (m - m_prev)*h/(2*h_prev)).
Sources: arXiv 2211.01095 (DPM-Solver++); settings of public repo Junchao-cs/LIVE (arXiv 2602.03747).
"""
from __future__ import annotations

import math
from typing import Callable, Sequence

from torch import Tensor

from ..schedule import Level


def _lambda(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(sigma)


def dpm(x: Tensor, levels: Sequence[Level], predict: Callable[[Tensor, Level], Tensor],
        fresh: Callable[[int], Tensor]) -> Tensor:
    """Deterministic: `fresh` is not used. The first level has to be below 1. The state of the solver is new for every
    block."""
    before = None  # (lambda, x0 prediction) of the level before
    for level, following in zip(levels, levels[1:]):
        now, to = _lambda(level.sigma), _lambda(following.sigma)
        predicted = direction = predict(x, level)
        if before is not None:
            direction = predicted + (predicted - before[1]) * ((to - now) / (2 * (now - before[0])))
        x = (following.sigma / level.sigma) * x - (1 - following.sigma) * math.expm1(now - to) * direction
        before = now, predicted
    return predict(x, levels[-1])  # the step of order 1 to sigma 0 is the prediction itself
