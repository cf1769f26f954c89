"""Training of the micro VAE, in two phases.

- "code": the encoder learns to write the fixed linear code of `micro/code.py`, the decoder to read it, each on
  its own gradients;
- "joint": both are tuned together on the pixels, held near the code.

The weights that count are an average over steps. At the end they are stored in float16, loaded again and measured on
clips that were never trained on. Their latents stay those of the code, so that a diffusion
model can be trained on the code at the same time.

All randomness follows from (seed, step), so a resumed run on one machine equals an uninterrupted one, bit for
bit on the CPU; under a time limit only as far as the clock allows.

Axes: B clips, T frames, F latent frames; videos [B, 3, T, 64, 64] in [-1, 1].
"""
from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor

from ..micro import world
from ..micro.code import LinearCode, of_world
from ..micro.vae import MicroVAE, load_vae, vae_bytes
from ..noise import mix
from . import history
from .loop import Stage, finite
from .muon import MuonAdamW
from .pixels import ErrorSums, foreground, pixel_loss
from .state import Average, Clock, Phase, learning_rate, write_whole

CHECKPOINT, WEIGHTS, REPORT = "vae.checkpoint.pt", "micro_vae.safetensors", "vae_report.json"
# Streams of seeds that never meet.
TRAIN, HELD_OUT, NOISE = 0, 3, 4
LAYOUTS = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class VaeSettings:
    """dim: width of the VAE. batch: clips of lengths[0] frames a step; a step takes the next of `lengths` (pixel
    frames) with about as many frames in all, and the next of `levels` of the world. minutes: time limit of both
    phases together, instead of their steps. foreground: weight of a shape's pixel against a background's 1;
    l1: share of absolute error beside the squared one; noise: standard deviation on the decoder's input;
    pull: weight of staying near the code; average: decay of the averaged weights."""

    dim: int = 8
    seed: int = 0
    batch: int = 4
    lengths: tuple[int, ...] = (17, 17, 33, 17, 17, 81)
    levels: tuple[str, ...] = ("full", "plain")
    code_clips: int = 256
    code_steps: int = 3000
    joint_steps: int = 1500
    minutes: float | None = None
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    weight_decay: float = 0.01
    foreground: float = 8.0
    l1: float = 0.1
    noise: float = 0.05
    pull: float = 0.1
    average: float = 0.999
    precision: str = "bfloat16"
    held_out: int = 16
    held_out_frames: int = 81

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("code", self.code_steps, 0.65, 1.0, 0.4), Phase("joint", self.joint_steps, 0.35, 0.4, 0.01))


QUICK = VaeSettings(dim=8, batch=2, lengths=(9,), code_clips=16, code_steps=6, joint_steps=4, held_out=2,
                    held_out_frames=17)


@dataclass(frozen=True)
class Progress:
    """For whoever shows it. loss without unit; psnr and shape_psnr of the last batch in dB; the rest in seconds."""

    phase: str
    step: int
    loss: float
    psnr: float
    shape_psnr: float
    seconds_per_step: float
    seconds_left: float | None

    def __str__(self) -> str:
        return (f"{self.phase}  step {self.step}  loss {self.loss:.4f}  psnr {self.psnr:.1f} dB  "
                f"shapes {self.shape_psnr:.1f} dB  {self.seconds_per_step:.3f} s/step")


class VaeTrainer(Stage):
    """The state of a run and its steps. Raises ForcingError for settings that cannot be built."""

    name, settings_type = "vae", VaeSettings

    def __init__(self, settings: VaeSettings, device: str = "cpu", code: LinearCode | None = None):
        self.settings, self.device = settings, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.vae = MicroVAE(settings.dim).to(self.device)
        self.average = Average(self.vae, settings.average)
        self.optimiser = MuonAdamW(self.vae.parameters(), settings.muon_lr, settings.adamw_lr, settings.weight_decay)
        self.clock, self.phases, self.layout = Clock(), settings.phases(), "channels_last"
        self.history = history.curves(("loss",))
        self.code = (code or of_world(settings.code_clips, settings.seed)).to(self.device)

    def clips(self, stream: int, count: int, frames: int, split: str = "train", at_once: int = 8) -> Iterator[Tensor]:
        """Batches of videos, `count` clips in all, of all levels in turn."""
        levels = self.settings.levels
        for number, start in enumerate(range(0, count, at_once)):
            yield world.batch(mix(self.settings.seed, stream, number), min(at_once, count - start), frames,
                              self.device, level=levels[number % len(levels)], split=split)[0]

    def batch(self) -> Tensor:
        """The clips of the next step; they follow from the number of steps done."""
        settings, step = self.settings, self.clock.total
        frames = settings.lengths[step % len(settings.lengths)]
        count = max(1, round(settings.batch * settings.lengths[0] / frames))
        # Not in step with the lengths, so that every length meets every level.
        level = settings.levels[step // len(settings.lengths) % len(settings.levels)]
        return world.batch(mix(settings.seed, TRAIN, step), count, frames, self.device, level=level)[0]

    def _precision(self):
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.settings.precision))

    def losses(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, made video, foreground mask) of a batch, in the current phase."""
        settings, layout = self.settings, LAYOUTS[self.layout]
        target, mask = self.code.encode(video), foreground(video)
        generator = torch.Generator(self.device).manual_seed(mix(settings.seed, NOISE, self.clock.total))
        noise = settings.noise * torch.randn(target.shape, generator=generator, device=self.device)
        joint = self.phases[self.clock.phase].name == "joint"
        with self._precision():
            # Only the inputs are laid out: the layers follow them, and Muon needs contiguous weights.
            latents = self.vae.encode(video.contiguous(memory_format=layout))
            # Tuned together, the decoder goes on reading the code too: that is what the diffusion model writes.
            read = (latents if joint and self.clock.total % 2 else target) + noise
            made = self.vae.decode(read.contiguous(memory_format=layout))
        pull = (latents - target).square().mean() * (settings.pull if joint else 1.0)
        return pixel_loss(made, video, mask, settings.foreground, settings.l1) + pull, made, mask

    def step(self) -> tuple[Tensor, ErrorSums]:
        """One optimiser step: the loss and the errors of its batch, still on the device."""
        phase, total = self.phases[self.clock.phase], self.clock.total
        video = self.batch()
        loss, made, mask = self.losses(video)
        loss.backward()
        self.optimiser.step(learning_rate(phase, self.clock.progress(self.phases, self.settings.minutes), total))
        self.average.update(self.vae, total)
        self.history["loss"].add(total, loss)
        return loss.detach(), ErrorSums().add(made, video, mask)

    def progress(self, result: tuple[Tensor, ErrorSums]) -> Progress:
        loss, errors = result
        clock = self.clock
        return Progress(self.phases[clock.phase].name, clock.total, finite(float(loss), clock.total), *errors.psnr(),
                        clock.seconds / max(1, clock.step), self.seconds_left)

    def state_dict(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "clock": asdict(self.clock), "code": self.code.state_dict(),
                "vae": self.vae.state_dict(), "average": self.average.weights,
                "optimiser": self.optimiser.state_dict(), "history": history.saved(self.history)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: str = "cpu", minutes: float | None = None) -> VaeTrainer:
        """minutes: another time limit than the run began with, None to keep that one."""
        settings = VaeSettings(**state["settings"])
        settings = settings if minutes is None else replace(settings, minutes=minutes)
        trainer = cls(settings, device, LinearCode.from_state_dict(state["code"]).to(device))
        trainer.vae.load_state_dict(state["vae"])
        trainer.average.weights = [weight.to(trainer.device) for weight in state["average"]]
        trainer.optimiser.load_state_dict(state["optimiser"])
        trainer.clock = Clock(**state["clock"])
        trainer.history = history.curves(("loss",), state.get("history"))
        return trainer

    def prepare(self) -> None:
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        if not self.done:
            self.layout = faster_layout(self)

    @torch.no_grad()
    def finished(self) -> MicroVAE:
        """A VAE of the averaged weights."""
        vae = MicroVAE(self.settings.dim).to(self.device)
        self.average.copy_to(vae)
        return vae

    @torch.no_grad()
    def measure(self, vae: MicroVAE) -> dict[str, float]:
        """Quality on clips of the test split, in float32: dB of the VAE and of the linear code, and the latents."""
        made, plain, latents = ErrorSums(), ErrorSums(), []
        for video in self.clips(HELD_OUT, self.settings.held_out, self.settings.held_out_frames, "test"):
            mask = foreground(video)
            latents.append(vae.encode(video))
            made.add(vae.decode(latents[-1]).clamp(-1, 1), video, mask)
            plain.add(self.code.decode(self.code.encode(video)).clamp(-1, 1), video, mask)
        channels = _by_channel(latents)
        values = {"psnr": made.psnr()[0], "shape_psnr": made.psnr()[1], "code_psnr": plain.psnr()[0],
                  "code_shape_psnr": plain.psnr()[1], "shape_share": made.share(),
                  "latent_mean_max": channels.mean(1).abs().max(), "latent_std_min": channels.std(1).min(),
                  "latent_std_max": channels.std(1).max(), "latent_max": channels.abs().max()}
        return {name: round(float(value), 4) for name, value in values.items()}


def _by_channel(latents: list[Tensor]) -> Tensor:
    """Latents [B, 16, F, h, w] of many batches -> [16, n]."""
    return torch.cat([x.transpose(0, 1).flatten(1) for x in latents], dim=1)


def faster_layout(trainer: VaeTrainer, runs: int = 3) -> str:
    """The memory layout in which losses and gradients take less time here; changes nothing else.

    On a CPU channels last is known to win in bfloat16; a GPU's kernels for few channels differ by generation.
    """
    seconds = {}
    for name in LAYOUTS if trainer.device.type == "cuda" else ():
        trainer.layout = name
        for run in range(runs + 1):
            if run == 1:  # the first one chooses kernels
                torch.cuda.synchronize(trainer.device)
                begin = time.perf_counter()
            trainer.losses(trainer.batch())[0].backward()
            trainer.optimiser.zero_grad()
        torch.cuda.synchronize(trainer.device)
        seconds[name] = time.perf_counter() - begin
    return min(seconds, key=seconds.get, default="channels_last")


def finish(trainer: VaeTrainer, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the weights (float16) and the report to the folder `out`; returns the report.

    facts: what else the report shall tell, such as the machine and the seconds.
    """
    settings = {"settings": asdict(trainer.settings), "steps": trainer.clock.total}
    vae = trainer.finished()
    write_whole(out / WEIGHTS, vae_bytes(vae, {"forcing.training": json.dumps(settings)}))
    held_out = trainer.measure(load_vae(out / WEIGHTS).to(trainer.device))
    report = {"stage": "vae", **settings, "held_out": held_out, "file": WEIGHTS, "layout": trainer.layout, **facts,
              "file_bytes": (out / WEIGHTS).stat().st_size, "losses": history.told(trainer.history)}
    write_whole(out / REPORT, (json.dumps(report) + "\n").encode())
    return report
