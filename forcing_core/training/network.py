"""What all stages that train a network of the micro world share: clips, clock, weights, checkpoints, files.

Latents are those of the fixed linear code, so that no VAE runs in the loop; the trained VAE reads and writes nearly
the same numbers. Captions have `ROWS` rows of conditioning, here and wherever a network is used.

All randomness follows from (seed, step), so a resumed run on one machine equals an uninterrupted one, bit for bit on
the CPU; under a time limit only as far as the clock allows.
"""
from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from ..micro import world
from ..micro.bundle import ROWS, TEXT_DIM, micro_config
from ..micro.code import LinearCode, of_world
from ..micro.text import TextCodec
from ..noise import mix
from ..wan import WanConfig, WanModel
from . import history
from .loop import Stage, finite
from .muon import MuonAdamW
from .pixels import foreground
from .state import Average, Clock, Phase, learning_rate, write_whole


@dataclass(frozen=True)
class NetSettings:
    """dim, layers: of the network; level: of the world.

    A step takes the next of `lengths` (pixel frames) and as many clips as have the frames of `batch` of the longest:
    short clips show more beginnings, where caption and noise have to become a picture; long ones what follows.

    steps or minutes: length of the run; hold: share of it at the full learning rate, which then falls to zero.
    average: decay of the averaged weights. code_clips, code_seed: of the linear code, None being `seed`.
    """

    dim: int = 128
    layers: int = 6
    batch: int = 8
    lengths: tuple[int, ...] = (33, 33, 33, 81)
    level: str = "plain"
    steps: int = 1000
    hold: float = 0.4
    minutes: float | None = None
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    average: float = 0.995
    code_clips: int = 256
    code_seed: int | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        hold = round(self.steps * self.hold)
        return (Phase("hold", hold, self.hold, 1.0, 1.0), Phase("fall", self.steps - hold, 1 - self.hold, 1.0, 0.01))

    @property
    def config(self) -> WanConfig:
        return micro_config(self.dim, self.layers)


@dataclass(frozen=True)
class Progress:
    """What a run shows: phase, steps done, the smoothed losses, and seconds."""

    phase: str
    step: int
    losses: dict[str, float]
    seconds_per_step: float
    seconds_left: float | None

    def __str__(self) -> str:
        losses = "  ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        return f"{self.phase}  step {self.step}  {losses}  {self.seconds_per_step:.3f} s/step"


def per_cell(mask: Tensor) -> Tensor:
    """Share of every latent cell that is foreground, [B, 1, F, h, w], from a mask [B, 1, 1 + 4n, H, W]."""
    first, rest = mask[:, :, :1].float(), mask[:, :, 1:].float()
    return torch.cat([F.avg_pool3d(first, (1, 8, 8)), F.avg_pool3d(rest, (4, 8, 8))], dim=2)


def pixel_latents(frames: int) -> int:
    """Latent frames of 1 + 4n pixel frames."""
    return 1 + (frames - 1) // 4


class NetTrainer(Stage):
    """The state of a run. A stage adds `step`, which does one optimiser step and returns its losses by name.

    name: of the stage and its files. stream: of the stage's random numbers. frozen: networks beside the trained one
    that never change. losses: the names of what `step` returns.
    """

    name: ClassVar[str]
    stream: ClassVar[int]
    settings_type: ClassVar[type[NetSettings]]
    frozen: ClassVar[tuple[str, ...]] = ()
    losses: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, settings: NetSettings, device: str = "cpu", code: LinearCode | None = None):
        self.settings, self.device = settings, torch.device(device)
        self.codec = TextCodec(TEXT_DIM, ROWS)
        self.nets = {name: self.new_net() for name in ("net", *self.frozen)}
        for name in self.frozen:
            self.nets[name].requires_grad_(False)
        self.optimisers = {"optimiser": self.new_optimiser(self.net, 1.0)}
        self.average = Average(self.net, settings.average)
        self.clock, self.phases = Clock(), settings.phases
        self.history, self.smooth = history.curves(self.losses), {}
        seed = settings.seed if settings.code_seed is None else settings.code_seed
        self.code = (code or of_world(settings.code_clips, seed)).to(self.device)

    @property
    def net(self) -> WanModel:
        """The network that is trained."""
        return self.nets["net"]

    def new_net(self) -> WanModel:
        """A network of the run's size on its device. Its weights follow from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return WanModel(self.settings.config).to(self.device)

    def new_optimiser(self, net: WanModel, factor: float) -> MuonAdamW:
        """factor: of the settings' learning rates."""
        s = self.settings
        return MuonAdamW(net.parameters(), factor * s.muon_lr, factor * s.adamw_lr, weight_decay=0.0)

    def generator(self) -> torch.Generator:
        """Of what this step draws besides its clips."""
        return torch.Generator(self.device).manual_seed(mix(self.settings.seed, self.stream + 1, self.clock.total))

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(latents [B, 16, F, h, w], foreground share of every cell, conditioning) of the step."""
        s, step = self.settings, self.clock.total
        frames = s.lengths[step % len(s.lengths)]
        clips = s.batch * pixel_latents(max(s.lengths)) // pixel_latents(frames)
        video, ids, _ = world.batch(mix(s.seed, self.stream, step), clips, frames, self.device, level=s.level)
        return self.code.encode(video), per_cell(foreground(video)), self.codec.embed(ids)

    def rate(self) -> float:
        """Factor of the learning rates in this step."""
        done = self.clock.progress(self.phases, self.settings.minutes)
        return learning_rate(self.phases[self.clock.phase], done, self.clock.total)

    def noted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a step, without graph, after they were added to the history."""
        losses = {name: value.detach() for name, value in losses.items()}
        for name, value in losses.items():
            self.history[name].add(self.clock.total, value)
        return losses

    def progress(self, result: dict[str, Tensor]) -> Progress:
        clock = self.clock
        for name, loss in result.items():
            value = finite(float(loss), clock.total)
            before = self.smooth.get(name, math.nan)
            self.smooth[name] = value if math.isnan(before) else 0.9 * before + 0.1 * value
        return Progress(self.phases[clock.phase].name, clock.total, dict(self.smooth),
                        clock.seconds / max(1, clock.step), self.seconds_left)

    def state_dict(self) -> dict[str, Any]:
        parts = {**self.nets, **self.optimisers}
        return {"settings": asdict(self.settings), "clock": asdict(self.clock), "code": self.code.state_dict(),
                "average": self.average.weights, "history": history.saved(self.history),
                **{name: part.state_dict() for name, part in parts.items()}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: str = "cpu", minutes: float | None = None) -> NetTrainer:
        """minutes: another time limit than the run began with, None to keep that one."""
        settings = cls.settings_type(**state["settings"])
        settings = settings if minutes is None else replace(settings, minutes=minutes)
        trainer = cls(settings, device, LinearCode.from_state_dict(state["code"]))
        for name, part in {**trainer.nets, **trainer.optimisers}.items():
            part.load_state_dict(state[name])
        trainer.average.weights = [weight.to(trainer.device) for weight in state["average"]]
        trainer.clock = Clock(**state["clock"])
        trainer.history = history.curves(cls.losses, state.get("history"))
        return trainer

    @torch.no_grad()
    def finished(self) -> WanModel:
        """A network of the averaged weights."""
        net = WanModel(self.settings.config).to(self.device)
        self.average.copy_to(net)
        return net.eval().requires_grad_(False)


def finish(trainer: NetTrainer, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the averaged weights (bfloat16) and the report to the folder `out`; returns the report."""
    settings = {"settings": asdict(trainer.settings), "steps": trainer.clock.total}
    state = {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in trainer.finished().state_dict().items()}
    file = out / f"micro_{trainer.name}.safetensors"
    report = {"stage": trainer.name, **settings, "file": file.name, **facts}
    data = save(state, {"forcing.training": json.dumps(settings)})
    report |= {"file_bytes": len(data), "losses": history.told(trainer.history)}
    write_whole(out / f"{trainer.name}_report.json", (json.dumps(report) + "\n").encode())
    write_whole(file, data)  # last: a stage whose weights are there is finished
    return report
