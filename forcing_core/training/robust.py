"""Stage "resampled" of the micro model: the teacher learns to go on from a history with its own errors in it.

Teacher forcing shows clean histories only, so the network trusts what it sees and hands every flaw on to the next
block. Here the history is taken through the network itself, and the true frames stay the target (Resampling Forcing,
arXiv 2512.15702). Published settings are for single frames and many steps; the block size and the one Euler step from
a stronger noise are our choices for a model that makes whole blocks in four steps.
"""
from __future__ import annotations

from dataclasses import dataclass

from ..micro.code import LinearCode
from ..wan import WanModel
from .dit import DitSettings, DitTrainer
from .resampling import ResamplingOptions, loss
from .state import Average


@dataclass(frozen=True)
class ResampledSettings(DitSettings):
    """strength: shift of the level that a history is resampled from; euler: steps back to clean."""

    steps: int = 1000
    hold: float = 0.3
    muon_lr: float = 0.008
    adamw_lr: float = 1.2e-3
    average: float = 0.99
    strength: float = 1.5
    euler: int = 1


QUICK = ResampledSettings(layers=2, batch=2, lengths=(33,), steps=4, code_clips=16)


class ResampledTrainer(DitTrainer):
    """Starts from the weights of the teacher, see `begin`."""

    name, stream, settings_type = "resampled", 40, ResampledSettings
    settings: ResampledSettings
    objective, age = staticmethod(loss), 1000

    def __init__(self, settings: ResampledSettings, device: str = "cpu", code: LinearCode | None = None):
        super().__init__(settings, device, code)
        self.options = ResamplingOptions(block=3, strength=settings.strength, steps=settings.euler)

    def begin(self, student: WanModel, teacher: WanModel) -> None:
        """Put the weights to start from in place, before the first step. There is no teacher beside them."""
        self.net.load_state_dict(student.state_dict())
        self.average = Average(self.net, self.settings.average)
