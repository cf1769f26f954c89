"""LIVE in small: a world model of the steerable micro world (`steer`), frame by frame in the latents of the micro VAE.

Every frame is a picture of its own to the VAE, which knows the first frame of a video as one. Axes: N pictures,
[N, 3, 64, 64] in -1..1, latents [N, 16, 8, 8].
"""
from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ForcingError
from ..live.config import LiveConfig
from ..live.model import LiveModel
from . import bundle
from .code import CELL, LinearCode
from .steer import NAMES
from .vae import Z_DIM, MicroVAE

HEAD, ROPE = 32, (4, 14, 14)
WINDOW = 8
STEPS = 3  # of the solver: the keys leave nothing open, and more steps only let single cells go astray
CONTEXT = 0.15  # sigma of a context's noise, as trained
AT_ONCE = 64  # pictures that go through the VAE together
CHOICE = "micro LIVE"  # what a list of checkpoints calls it
# name -> what it is
NETWORKS = {"live_plain": "trained on true clips alone", "live_cycle": "trained with cycle consistency as well"}
SHIPPED = "live_cycle"  # what nodes offer: the one that obeys for longer


def live_config(dim: int, layers: int) -> LiveConfig:
    """The shape of a micro LIVE."""
    return LiveConfig(dim=dim, layers=layers, heads=dim // HEAD, channels=Z_DIM, latent=(8, 8), window=WINDOW, rope=ROPE,
                      condition="action", condition_dim=25, cell=CELL, actions=tuple(NAMES.values()), context=CONTEXT)


def path(name: str = SHIPPED, folder: Path | None = None) -> Path:
    """The file of one of NETWORKS, by default among the package's own weights. Raises ForcingError for another name and where
    the file is missing."""
    if name not in NETWORKS:
        raise ForcingError(f"There is no micro LIVE called {name!r}. Choose one of {', '.join(NETWORKS)}.")
    folder = folder or bundle.WEIGHTS
    file = folder / f"micro_{name}.safetensors"
    if not file.is_file():
        raise ForcingError(f"{file} is missing. Make the file with "
                           f"'python -m forcing_core train live --out {folder}'.")
    return file


def bundled() -> bool:
    """Whether the network that nodes offer, the default of `path`, is there."""
    return (bundle.WEIGHTS / f"micro_{SHIPPED}.safetensors").is_file()


def read(file: Path) -> LiveModel:
    """The network of a file in float32, without gradients."""
    with safe_open(file, "pt") as opened:
        told = json.loads((opened.metadata() or {})["forcing.training"])["settings"]
        state = {name: opened.get_tensor(name).float() for name in opened.keys()}
    net = LiveModel(live_config(told["dim"], told["layers"]))
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def encode(code: LinearCode, video: Tensor) -> Tensor:
    """Latents [B, 16, F, 8, 8] of a video [B, 3, F, 64, 64], each frame as a picture, by the linear code of the training."""
    pictures = video.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    return code.encode(pictures)[:, :, 0].unflatten(0, (video.shape[0], -1)).transpose(1, 2)


class PictureVAE(nn.Module):
    """The micro VAE with the methods of LIVE's own autoencoder."""

    def __init__(self, vae: MicroVAE):
        super().__init__()
        self.vae = vae

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """[N, 3, 64, 64] -> [N, 16, 8, 8]."""
        return torch.cat([self.vae.encode(part.unsqueeze(2).to(self._like))[:, :, 0] for part in pictures.split(AT_ONCE)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[N, 16, 8, 8] -> [N, 3, 64, 64], not clamped."""
        return torch.cat([self.vae.decode(part.unsqueeze(2).to(self._like))[:, :, 0] for part in latents.split(AT_ONCE)])

    @property
    def _like(self) -> Tensor:
        return self.vae.conv2.weight
