"""Stage "resampled" of the micro model: the teacher learns to go on from a history with its own errors in it.

Teacher forcing shows clean histories only, so the network trusts what it sees and hands every flaw on to the next
block. Here the history is taken through the network itself, and the true frames stay the target (Resampling Forcing,
arXiv 2512.15702). Published settings are for single frames and many steps; the block size and the one Euler step from
a stronger noise are our choices for a model that makes whole blocks in four steps.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..micro.code import LinearCode
from ..wan import TextState, WanModel
from .network import NetSettings, NetTrainer
from .resampling import ResamplingOptions, loss
from .state import Average


@dataclass(frozen=True)
class ResampledSettings(NetSettings):
    """strength: shift of the level that a history is resampled from; euler: steps back to clean.

    empty: share of steps without a caption; shapes: extra weight of the foreground at zero noise.
    """

    steps: int = 1000
    hold: float = 0.3
    muon_lr: float = 0.008
    adamw_lr: float = 1.2e-3
    average: float = 0.99
    empty: float = 0.1
    shapes: float = 6.0
    strength: float = 1.5
    euler: int = 1


QUICK = ResampledSettings(layers=2, batch=2, lengths=(33,), steps=4, code_clips=16)


class ResampledTrainer(NetTrainer):
    """Starts from the weights of the teacher, see `begin`."""

    name, stream, settings_type = "resampled", 40, ResampledSettings
    settings: ResampledSettings

    def __init__(self, settings: ResampledSettings, device: str = "cpu", code: LinearCode | None = None):
        super().__init__(settings, device, code)
        self.options = ResamplingOptions(block=3, strength=settings.strength, steps=settings.euler)

    def begin(self, student: WanModel, teacher: WanModel) -> None:
        """Put the weights to start from in place, before the first step. There is no teacher beside them."""
        self.net.load_state_dict(student.state_dict())
        self.average = Average(self.net, self.settings.average)

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the loss, still on the device."""
        clean, shapes, text = self.batch()
        if self.clock.total % round(1 / self.settings.empty) == 0:
            text = torch.zeros_like(text)

        def cells(sigmas: Tensor) -> Tensor:
            return 1 + self.settings.shapes * shapes * (1 - sigmas).square()[:, None, :, None, None]

        value = loss(self.net, clean, TextState(text), self.options, self.generator(), cells=cells)
        value.backward()
        self.optimisers["optimiser"].step(self.rate())
        self.average.update(self.net, self.clock.total + 1000)  # grown up: it starts from averaged weights
        return self.noted({"loss": value})
