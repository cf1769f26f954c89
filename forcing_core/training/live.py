"""Stages "live_base", "live_plain" and "live_cycle": LIVE in small on the steerable micro world.

All begin with diffusion forcing on true clips. From the same weights, one then goes on so for as many steps, and the other
takes every second step on a rollout of its own, by cycle consistency: what the second adds is what differs between them.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ForcingError
from ..live.config import LiveConfig
from ..live.model import LiveModel
from ..micro import steer
from ..micro.code import CELL
from ..micro.live import CONTEXT, WINDOW, encode, live_config, read
from ..noise import mix
from . import cycle
from .distil import origin
from .network import NetSettings, NetTrainer
from .pixels import foreground
from .state import Average

# Norms are rounded to float16, backwards too; gradients that small would lose their digits. Neither Muon nor Adam depends on
# their size.
GRADIENT_SCALE = 4096.0


@dataclass(frozen=True)
class LiveSettings(NetSettings):
    """batch: clips of WINDOW frames a step. shapes: extra weight of the cells that show the shape."""

    dim: int = 96
    layers: int = 4
    batch: int = 16
    lengths: tuple[int, ...] = (WINDOW,)
    steps: int = 26000
    hold: float = 0.6
    shapes: float = 5.0
    average: float = 0.98

    @property
    def config(self) -> LiveConfig:
        return live_config(self.dim, self.layers)


@dataclass(frozen=True)
class LaterSettings(LiveSettings):
    """The learning rates are a quarter of the first stage's: its weights have come to rest.

    given: true frames of a rollout, see `cycle.CycleOptions`, by the share of `steps` that are done; rollout_steps: of each of
    its frames."""

    steps: int = 4800
    muon_lr: float = 0.005
    adamw_lr: float = 8e-4
    given: tuple[int, ...] = (4, 2, 1)
    rollout_steps: int = 4


QUICK = LiveSettings(dim=32, layers=1, batch=2, steps=6, code_clips=16)
LATER_QUICK = LaterSettings(dim=32, layers=1, batch=2, steps=4, code_clips=16)


class Clips(NamedTuple):
    """Latents [B, 16, F, 8, 8], weights of their cells [B, 1, F, 8, 8], actions there and back [B, F, 25]."""

    latents: Tensor
    cells: Tensor
    forward: Tensor
    backward: Tensor


def start(net: nn.Module) -> None:
    """Weights to begin with: Xavier, zero biases, and layers and a head that do nothing yet."""
    for name, parameter in net.named_parameters():
        if "modulation" in name or name.startswith("final_layer") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() >= 2:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
    nn.init.normal_(net.c_embedder.mlp[0].weight)  # an action is one 1 among zeros: at Xavier's scale it is hardly heard


class LiveTrainer(NetTrainer):
    """Diffusion forcing on true clips."""

    name, stream, settings_type = "live_base", 50, LiveSettings
    settings: LiveSettings

    def __init__(self, settings: LiveSettings, device: str = "cpu", code=None):
        super().__init__(settings, device, code)
        self.options = cycle.CycleOptions()
        self.age = 0

    def new_net(self) -> LiveModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            net = LiveModel(self.settings.config)
            start(net)
        return net.to(self.device)

    def clips(self) -> Clips:
        """The batch of this step."""
        s = self.settings
        seed, frames = mix(s.seed, self.stream, self.clock.total), s.lengths[self.clock.total % len(s.lengths)]
        worlds, play = steer.draw(seed, s.batch), steer.keys(seed, s.batch, frames)
        places = steer.walk(worlds.start, play)
        video = steer.paint(worlds, places)
        shapes = F.avg_pool3d(foreground(video).float(), (1, CELL, CELL))
        back = steer.backwards(steer.taken(places, play))
        parts = (encode(self.code, video.to(self.device)), 1 + s.shapes * shapes, steer.rows(play), steer.rows(back))
        return Clips(*(part.to(self.device) for part in parts))

    def objective(self, clips: Clips) -> tuple[str, Tensor]:
        """The name of this step's loss, and the loss."""
        return "loss", cycle.forcing_loss(self.net, clips.latents, clips.forward, self.options, self.generator(),
                                          cells=clips.cells)

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the loss, still on the device."""
        name, value = self.objective(self.clips())
        (GRADIENT_SCALE * value).backward()
        self.optimisers["optimiser"].step(self.rate())
        self.average.update(self.net, self.clock.total + self.age)
        return self.noted({name: value})

    @torch.no_grad()
    def finished(self) -> LiveModel:
        net = LiveModel(self.settings.config).to(self.device)
        self.average.copy_to(net)
        return net.eval().requires_grad_(False)


class PlainTrainer(LiveTrainer):
    """More of the same, from the weights of the first stage."""

    name, stream, settings_type = "live_plain", 60, LaterSettings
    settings: LaterSettings

    def __init__(self, settings: LaterSettings, device: str = "cpu", code=None):
        super().__init__(settings, device, code)
        self.options = cycle.CycleOptions(given=settings.given, steps=settings.rollout_steps, context=CONTEXT)
        self.age = 1000

    def begin(self, net: LiveModel) -> None:
        """Put the weights to start from in place, before the first step."""
        self.net.load_state_dict(net.state_dict())
        self.average = Average(self.net, self.settings.average)


class CycleTrainer(PlainTrainer):
    """The same clips, but every second step recovers the beginning of a rollout from its end."""

    name, losses = "live_cycle", ("loss", "cycle")

    def objective(self, clips: Clips) -> tuple[str, Tensor]:
        if self.clock.total % 2 == 0:
            return super().objective(clips)
        given = cycle.given_at(self.options, self.clock.total / self.settings.steps)
        return "cycle", cycle.loss(self.net, clips.latents, clips.forward, clips.backward, given, self.options,
                                   self.generator(), cells=clips.cells)


def begin(kind: type[PlainTrainer], settings: LaterSettings, file: Path, _: Path, device: str = "cpu") -> PlainTrainer:
    """A trainer that goes on from the file of the first stage; size and code of `settings` are replaced by its.

    Raises ForcingError where it is missing.
    """
    if not file.is_file():
        raise ForcingError(f"There is no {file} to start from. Train the stage live_base first, or name another file.")
    trainer = kind(replace(settings, **origin(file)), device)
    trainer.begin(read(file))
    return trainer
