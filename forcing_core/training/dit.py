"""Stage "teacher" of the micro model: teacher-forced AR diffusion on the generated world.

The foreground may weigh more than its 4 to 9 per cent of the picture, but only where the noise lets the network see
it: at high noise a weight that depends on the answer shifts the answer, and shapes grow block by block.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..micro.code import LinearCode
from ..wan import TextState, WanModel
from .network import NetSettings, NetTrainer
from .teacher_forcing import TeacherForcingOptions, loss


@dataclass(frozen=True)
class DitSettings(NetSettings):
    """empty: share of steps without a caption, for guidance; shapes: extra weight of the foreground at zero noise."""

    steps: int = 4000
    empty: float = 0.1
    shapes: float = 6.0


QUICK = DitSettings(layers=2, batch=2, lengths=(9, 21), steps=6, code_clips=16)


def start(net: nn.Module) -> None:
    """Weights to begin with: Xavier, zero biases, and a head that predicts nothing yet."""
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() >= 2 and "modulation" not in name:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
    nn.init.zeros_(net.head.head.weight)


class DitTrainer(NetTrainer):
    """The state of a run and its steps. objective: the loss; age: steps that the averaged weights have behind them."""

    name, stream, settings_type = "teacher", 2, DitSettings
    settings: DitSettings
    objective, age = staticmethod(loss), 0

    def __init__(self, settings: DitSettings, device: str = "cpu", code: LinearCode | None = None):
        super().__init__(settings, device, code)
        self.options = TeacherForcingOptions(weighted=False)

    def new_net(self) -> WanModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            net = WanModel(self.settings.config)
            start(net)
        return net.to(self.device)

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the loss, still on the device."""
        clean, shapes, text = self.batch()
        if self.clock.total % round(1 / self.settings.empty) == 0:
            text = torch.zeros_like(text)

        def cells(sigmas: Tensor) -> Tensor:
            return 1 + self.settings.shapes * shapes * (1 - sigmas).square()[:, None, :, None, None]

        value = self.objective(self.net, clean, TextState(text), self.options, self.generator(), cells=cells)
        value.backward()
        self.optimisers["optimiser"].step(self.rate())
        self.average.update(self.net, self.clock.total + self.age)
        return self.noted({"loss": value})
