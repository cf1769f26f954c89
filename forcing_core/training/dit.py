"""Training of the micro network, stage "teacher": teacher-forced AR diffusion on the generated world.

Latents are those of the fixed linear code, so that no VAE runs in the loop; the trained VAE reads and writes nearly
the same numbers. Captions have `ROWS` rows of conditioning, here and wherever the network is used.

The foreground may weigh more than its 4 to 9 per cent of the picture, but only where the noise lets the network see
it: at high noise a weight that depends on the answer shifts the answer, and shapes grow block by block.
"""
from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ..micro import world
from ..micro.bundle import ROWS, TEXT_DIM, micro_config
from ..micro.code import LinearCode, of_world
from ..micro.text import TextCodec
from ..noise import mix
from ..wan import TextState, WanConfig, WanModel
from .loop import Stage, finite
from .muon import MuonAdamW
from .pixels import foreground
from .state import Average, Clock, Phase, learning_rate, write_whole
from .teacher_forcing import TeacherForcingOptions, loss

WEIGHTS, REPORT, CHECKPOINT = "micro_teacher.safetensors", "teacher_report.json", "teacher.checkpoint.pt"
TRAIN, DRAW = 2, 3  # streams of random numbers


@dataclass(frozen=True)
class DitSettings:
    """dim, layers: of the network; level: of the world.

    A step takes the next of `lengths` (pixel frames) and as many clips as have the frames of `batch` of the longest:
    short clips show more beginnings, where caption and noise have to become a picture; long ones what follows.

    steps or minutes: length of the run; hold: share of it at the full learning rate, which then falls to zero.
    empty: share of steps without a caption, for guidance; shapes: extra weight of the foreground at zero noise.
    """

    dim: int = 128
    layers: int = 6
    batch: int = 8
    lengths: tuple[int, ...] = (33, 33, 33, 81)
    level: str = "plain"
    steps: int = 4000
    hold: float = 0.4
    minutes: float | None = None
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    average: float = 0.995
    empty: float = 0.1
    shapes: float = 6.0
    code_clips: int = 256

    @property
    def phases(self) -> tuple[Phase, ...]:
        hold = round(self.steps * self.hold)
        return (Phase("hold", hold, self.hold, 1.0, 1.0), Phase("fall", self.steps - hold, 1 - self.hold, 1.0, 0.01))

    @property
    def config(self) -> WanConfig:
        return micro_config(self.dim, self.layers)


QUICK = DitSettings(layers=2, batch=2, lengths=(9, 21), steps=6, code_clips=16)


@dataclass(frozen=True)
class Progress:
    """What a run shows: phase, steps done, the smoothed loss, and seconds."""

    phase: str
    step: int
    loss: float
    seconds_per_step: float
    seconds_left: float | None


def start(net: nn.Module) -> None:
    """Weights to begin with: Xavier, zero biases, and a head that predicts nothing yet."""
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() >= 2 and "modulation" not in name:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
    nn.init.zeros_(net.head.head.weight)


def per_cell(mask: Tensor) -> Tensor:
    """Share of every latent cell that is foreground, [B, 1, F, h, w], from a mask [B, 1, 1 + 4n, H, W]."""
    first, rest = mask[:, :, :1].float(), mask[:, :, 1:].float()
    return torch.cat([F.avg_pool3d(first, (1, 8, 8)), F.avg_pool3d(rest, (4, 8, 8))], dim=2)


def pixel_latents(frames: int) -> int:
    """Latent frames of 1 + 4n pixel frames."""
    return 1 + (frames - 1) // 4


class DitTrainer(Stage):
    """The state of a run and its steps."""

    def __init__(self, settings: DitSettings, device: str = "cpu", code: LinearCode | None = None):
        self.settings, self.device = settings, torch.device(device)
        self.codec, self.options = TextCodec(TEXT_DIM, ROWS), TeacherForcingOptions(weighted=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.net = WanModel(settings.config)
            start(self.net)
        self.net.to(self.device)
        self.average = Average(self.net, settings.average)
        self.optimiser = MuonAdamW(self.net.parameters(), settings.muon_lr, settings.adamw_lr, weight_decay=0.0)
        self.clock, self.phases, self.smooth = Clock(), settings.phases, math.nan
        self.code = (code or of_world(settings.code_clips, settings.seed)).to(self.device)

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(latents, foreground share of every cell, conditioning) of the next step."""
        s, step = self.settings, self.clock.total
        frames = s.lengths[step % len(s.lengths)]
        clips = s.batch * pixel_latents(max(s.lengths)) // pixel_latents(frames)
        video, ids, _ = world.batch(mix(s.seed, TRAIN, step), clips, frames, self.device, level=s.level)
        text = self.codec.embed(ids)
        if step % round(1 / s.empty) == 0:
            text = torch.zeros_like(text)
        return self.code.encode(video), per_cell(foreground(video)), text

    def step(self) -> Tensor:
        """One optimiser step; the loss, still on the device."""
        clean, shapes, text = self._batch()
        generator = torch.Generator(self.device).manual_seed(mix(self.settings.seed, DRAW, self.clock.total))

        def cells(sigmas: Tensor) -> Tensor:
            return 1 + self.settings.shapes * shapes * (1 - sigmas).square()[:, None, :, None, None]

        value = loss(self.net, clean, TextState(text), self.options, generator, cells=cells)
        value.backward()
        phase = self.phases[self.clock.phase]
        progress = self.clock.progress(self.phases, self.settings.minutes)
        self.optimiser.step(learning_rate(phase, progress, self.clock.total))
        self.average.update(self.net, self.clock.total)
        return value.detach()

    def progress(self, result: Tensor) -> Progress:
        clock, value = self.clock, finite(float(result), self.clock.total)
        self.smooth = value if math.isnan(self.smooth) else 0.9 * self.smooth + 0.1 * value
        return Progress(self.phases[clock.phase].name, clock.total, self.smooth, clock.seconds / max(1, clock.step),
                        self.seconds_left)

    def state_dict(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "clock": asdict(self.clock), "code": self.code.state_dict(),
                "net": self.net.state_dict(), "average": self.average.weights,
                "optimiser": self.optimiser.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: str = "cpu", minutes: float | None = None) -> DitTrainer:
        settings = DitSettings(**state["settings"])
        settings = settings if minutes is None else replace(settings, minutes=minutes)
        trainer = cls(settings, device, LinearCode.from_state_dict(state["code"]))
        trainer.net.load_state_dict(state["net"])
        trainer.average.weights = [weight.to(trainer.device) for weight in state["average"]]
        trainer.optimiser.load_state_dict(state["optimiser"])
        trainer.clock = Clock(**state["clock"])
        return trainer

    @torch.no_grad()
    def finished(self) -> WanModel:
        """A network of the averaged weights."""
        net = WanModel(self.settings.config).to(self.device)
        self.average.copy_to(net)
        return net.eval().requires_grad_(False)


def finish(trainer: DitTrainer, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the averaged weights (bfloat16) and the report to the folder `out`; returns the report."""
    settings = {"settings": asdict(trainer.settings), "steps": trainer.clock.total}
    state = {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in trainer.finished().state_dict().items()}
    write_whole(out / WEIGHTS, save(state, {"forcing.training": json.dumps(settings)}))
    report = {"stage": "teacher", **settings, "file": WEIGHTS, "file_bytes": (out / WEIGHTS).stat().st_size, **facts}
    write_whole(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report
