"""Diffusion forcing: every block at a noise level of its own, under a block-causal mask.

A block sees the blocks before it as noisy as they happen to be. The causal pre-training of CausVid (arXiv 2412.07772)
and the baseline of Self Forcing (2506.08009); window and sink make the masks of a local model, an independent first
frame those of an image-to-video one. Axis legend as in `flow`.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import TRAIN_STEPS
from ..wan import TextState, WanModel
from .flow import CausalOptions, draw_rows, noised, own_text, training_weights, weighted_mse
from .parallel import parallel_velocity


@dataclass(frozen=True)
class DiffusionForcingOptions(CausalOptions):
    """bias: of the drawn levels to high noise, see `flow.draw_rows`; weighted: with the published training weight."""

    bias: float = 1.0
    weighted: bool = True


def loss(student: WanModel, clean: Tensor, text: TextState, options: DiffusionForcingOptions,
         generator: torch.Generator, *, cells: Tensor | None = None) -> Tensor:
    """Weighted flow-matching error of all frames. clean: [B, C, F, h, w]; cells: weights [B, 1, F, h, w]."""
    rows = draw_rows(clean, TRAIN_STEPS, generator, block=options.block,
                     independent_first=options.independent_first, bias=options.bias)
    noisy = noised(clean, rows, options.shift, generator)
    velocity = parallel_velocity(student, noisy.x, noisy.timesteps, own_text(text, clean),
                                 options.causal_mask(clean.shape[2]))
    weights = training_weights(options.shift).to(clean.device)[rows] if options.weighted else None
    return weighted_mse(velocity, noisy.noise - clean, frames=weights, cells=cells)
