"""The few-step sampler of all distilled models of the family: predict x0, mix in fresh noise, repeat.

Source: arXiv 2506.08009 (Self Forcing), algorithm 2.
"""
from __future__ import annotations

from typing import Callable, Sequence

from torch import Tensor

from ..schedule import Level, renoise


def consistency(x: Tensor, levels: Sequence[Level], predict: Callable[[Tensor, Level], Tensor],
                fresh: Callable[[int], Tensor]) -> Tensor:
    x0 = predict(x, levels[0])
    for step, level in enumerate(levels[1:]):
        x0 = predict(renoise(x0, fresh(step), level.sigma), level)
    return x0
