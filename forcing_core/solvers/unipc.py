"""UniPC of order 2 (bh2, x0 prediction, lower order at the end), for the many-step autoregressive teacher.

With lambda = log(1-sigma) - log(sigma), h the step in lambda and phi = expm1(-h):
predictor  x' = (s'/s)*x - (1-s')*phi*(m + 1/2*(m_prev - m)/r)
corrector  the same step again from the last corrected sample, once the new m is known.
Sources: arXiv 2302.04867 (UniPC); settings of public repo thu-ml/Causal-Forcing (arXiv 2602.02214).
"""
from __future__ import annotations

import math
from typing import Callable, Sequence

from torch import Tensor

from ..schedule import Level


def _lambda(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)


def _base(x: Tensor, m: Tensor, now: float, to: float) -> tuple[Tensor, float, float]:
    """First-order step from sigma `now` to `to`: (x', weight of corrections, h)."""
    h = _lambda(to) - _lambda(now)
    phi = math.expm1(-h)
    return (to / now) * x - (1 - to) * phi * m, -(1 - to) * phi, h


def _corrector_weights(h: float, ratio: float) -> tuple[float, float]:
    """Solution rho of the 2x2 system of order 2, for points at `ratio` and 1 (in units of h)."""
    hh = -h
    b_h = math.expm1(hh)
    g1 = b_h / hh - 1
    g2 = g1 / hh - 0.5
    b1, b2 = g1 / b_h, 2 * g2 / b_h
    rho = (b1 - b2) / (1 - ratio)  # rows [1, 1] and [ratio, 1]
    return rho, b1 - rho


def unipc(x: Tensor, levels: Sequence[Level], predict: Callable[[Tensor, Level], Tensor],
          fresh: Callable[[int], Tensor]) -> Tensor:
    """Deterministic: `fresh` is not used. The state of the solver is new for every block."""
    sigmas = [level.sigma for level in levels] + [0.0]
    history: list[tuple[float, Tensor]] = []  # (lambda, x0 prediction), newest last
    corrected, order = x, 0
    for i, level in enumerate(levels):
        m = predict(x, level)
        if i:
            x = _correct(corrected, m, history, sigmas[i - 1], level.sigma, order)
        history = [*history, (_lambda(level.sigma), m)][-2:]
        corrected, order = x, min(2, len(levels) - i, i + 1)
        x = _predict(corrected, history, level.sigma, sigmas[i + 1], order)
    return x


def _predict(x: Tensor, history: list[tuple[float, Tensor]], now: float, to: float, order: int) -> Tensor:
    at, m = history[-1]
    step, weight, h = _base(x, m, now, to)
    if order == 1:
        return step
    before, m_prev = history[-2]
    return step + weight * 0.5 * (m_prev - m) / ((before - at) / h)


def _correct(x: Tensor, m: Tensor, history: list[tuple[float, Tensor]], now: float, to: float, order: int) -> Tensor:
    at, m_prev = history[-1]
    step, weight, h = _base(x, m_prev, now, to)
    if order == 1:
        return step + weight * 0.5 * (m - m_prev)
    before, m_old = history[-2]
    ratio = (before - at) / h
    rho, rho_last = _corrector_weights(h, ratio)
    return step + weight * (rho * (m_old - m_prev) / ratio + rho_last * (m - m_prev))
