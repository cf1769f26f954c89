"""The micro portrait: a network that moves a drawn face from one picture, the linear code of faces, and its denoiser.

The network is a plain Wan network with 32 input channels: 16 of the latents and 16 of the driving video's, a faceless
puppet (`face.driver`) in the same code. Who it is comes from the reference in memory (`plan.REFERENCE`). There is no
prompt: its layers are zeros and no part of the file.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool1d, interpolate, pad

from ..denoiser import Condition, NetworkDenoiser
from ..errors import ForcingError
from ..memory import make_memory
from ..plan import REFERENCE, Phase
from ..schedule import Level
from ..wan import WanConfig, WanModel
from .bundle import TEXT_DIM, WEIGHTS
from .code import GROUP, LinearCode
from .temporal import SECOND
from .vae import Z_DIM

NAME = "portrait"
FILE = f"micro_{NAME}.safetensors"
ROWS = 1  # of an empty prompt
GRID = (4, 4)  # tokens of a frame
HUM = 140.0  # Hz
CODE = "code."  # before the names of the code's tensors
SILENT = ("text_embedding.", ".cross_attn.", ".norm3.")  # parts of the names of what only a prompt needs


def config(dim: int, layers: int) -> WanConfig:
    """The shape of the network."""
    return WanConfig(dim=dim, ffn_dim=3 * dim, heads=dim // 128, layers=layers, in_channels=2 * Z_DIM, text_dim=TEXT_DIM,
                     text_len=ROWS)


def is_silent(name: str) -> bool:
    """Whether a parameter belongs to the prompt's layers, which are zero."""
    return any(part in name for part in SILENT)


@torch.no_grad()
def silence(net: WanModel) -> WanModel:
    """The network without a prompt: its layers give zeros, and no gradients."""
    for name, parameter in net.named_parameters():
        if is_silent(name):
            parameter.zero_().requires_grad_(False)
    return net


@dataclass(frozen=True)
class Portrait:
    """net: float32, without gradients. code: of faces and puppets."""

    net: WanModel
    code: LinearCode


def state_dict(net: WanModel, code: LinearCode) -> dict[str, Tensor]:
    """What a file holds: the network in bfloat16 without its silent layers, the code in float16."""
    weights = {name: value.to(torch.bfloat16) for name, value in net.state_dict().items() if not is_silent(name)}
    return weights | {CODE + name: value.half() for name, value in code.state_dict().items()}


def load(file: Path = WEIGHTS / FILE) -> Portrait:
    """Raises ForcingError where the file is missing or holds something else."""
    if not file.is_file():
        raise ForcingError(f"{file} is missing. Make it with 'python -m forcing_core train {NAME} --out {file.parent}'.")
    state = {name: value.float() for name, value in load_file(file).items()}
    code = {name.removeprefix(CODE): state.pop(name) for name in [*state] if name.startswith(CODE)}
    try:
        dim = state["patch_embedding.bias"].shape[0]
        layers = sum(name.endswith("self_attn.q.weight") for name in state)
        net = silence(WanModel(config(dim, layers)))
        silent = {name: value for name, value in net.state_dict().items() if is_silent(name)}
        net.load_state_dict({**silent, **state})
        return Portrait(net.eval().requires_grad_(False), LinearCode.from_state_dict(code))
    except (KeyError, RuntimeError) as error:
        raise ForcingError(f"{file} holds no micro portrait. Choose the file that 'train {NAME}' wrote.") from error


@dataclass(frozen=True)
class Drive:
    """Driving latents [B, 16, F, 8, 8] of a video. first: which of them belongs to frame 0 of a rollout; -1 where a given
    frame comes before them. The first one is at rest, and serves the reference, too."""

    latents: Tensor
    first: int = 0

    def of(self, first: int, frames: int) -> Tensor:
        """Of a forward's frames; the last goes on where there are no more, the first where there were none yet."""
        start = 0 if first >= REFERENCE else first + self.first
        numbers = torch.arange(start, start + frames).clamp(0, self.latents.shape[2] - 1)
        return self.latents[:, :, numbers]


def loudness(wave: Tensor, rate: int, frames: int) -> Tensor:
    """Mouth opening [frames] in 0 .. 1 of a voice [channels, n]: its loudness at 16 pictures a second, smoothed over a
    latent frame, 1 where it is nearly loudest; 0 behind its end. Raises ForcingError for a sound that is too short."""
    samples = wave.shape[-1]
    if rate < SECOND or samples * SECOND < rate:
        raise ForcingError(f"A sound of {samples} samples, {rate} a second, is shorter than a picture. Connect a longer "
                           "one.")
    # the samples of each picture, which for 44.1 kHz are not always as many
    edges = torch.arange(min(frames, samples * SECOND // rate) + 1) * rate // SECOND
    energy = torch.cat([torch.zeros(1, dtype=torch.float64), wave.double().mean(0).square().cumsum(0)])[edges]
    power = (energy.diff() / edges.diff()).clamp_min(0).sqrt().float()
    smooth = avg_pool1d(power[None, None], GROUP + 1, 1, GROUP // 2, count_include_pad=False)[0, 0]
    loud = smooth.quantile(0.95).clamp_min(1e-4)
    return pad((smooth / loud).clamp(0, 1), (0, frames - len(smooth)))


def voice(opening: Tensor, rate: int = 16000) -> Tensor:
    """A hum [1, rate / 16 * frames] in -1 .. 1 that is as loud as a mouth [frames] is open."""
    size = rate // SECOND
    envelope = interpolate(opening[None, None], scale_factor=size, mode="linear")[0, 0]
    turns = torch.arange(len(envelope)) * (HUM / rate)
    return (envelope * sum((2 * math.pi * n * turns).sin() / n for n in (1, 2, 3, 5)) / 3)[None]


@dataclass
class Driven(NetworkDenoiser):
    """A `NetworkDenoiser` that adds the driving latents of a forward's frames to its input."""

    drive: Drive | None = None

    @torch.no_grad()
    def _velocity(self, condition: Condition, x: Tensor, levels: Sequence[Level], first: int, phase: Phase) -> Tensor | None:
        memory = condition.memory.begin(first, x.shape[2], phase, max(level.sigma for level in levels))
        return self._forward(condition, torch.cat([x, self.drive.of(first, x.shape[2]).to(x)], 1), levels, memory)


def driven(portrait: Portrait, options: Any, frames: int, drive: Drive, ahead: int = 0) -> Driven:
    """A denoiser of 64x64 pictures with an empty memory. frames: latent frames of the video; ahead: of a knot."""
    shape = portrait.net.config
    memory = make_memory(options, frames, layers=shape.layers, grid=GRID, head_dim=shape.dim // shape.heads,
                         heads=shape.heads, device="cpu", ahead=ahead)
    prompt = torch.zeros(len(drive.latents), ROWS, TEXT_DIM)
    return Driven(portrait.net, [Condition([prompt], memory)], drive=drive)
