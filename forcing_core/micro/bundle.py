"""The trained micro models that come with the package: a VAE, networks and the text path, with nothing to download.

    text, net, vae = bundle.codec(), bundle.network("student"), bundle.vae()

All were trained by the stages of `python -m forcing_core train` on the generated world of `world.py`; settings
and steps are in the metadata of every file. They make 64x64 pictures, 16 a second, of captions like "a red circle
moving left on a dark background".
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Sequence

import torch
from safetensors import safe_open

from ..checkpoints import load
from ..errors import ForcingError
from ..wan import WanConfig, WanModel
from .text import TextCodec
from .vae import MicroVAE, load_vae

WEIGHTS = Path(__file__).parent / "weights"
TEXT_DIM, ROWS = 4096, 24  # of the conditioning: every network here was trained with as many rows
SIZE = (64, 64)  # (width, height) in pixels
VAE = "micro_vae.safetensors"
# name -> what it is
NETWORKS = {
    "teacher": "many-step model, trained by teacher forcing",
    "consistency": "few-step model, distilled on true histories only",
    "student": "few-step model, trained on its own rollouts (Self Forcing)",
    "long": "few-step model, trained on rollouts longer than the teacher's clips (Self-Forcing++)",
}


def path(name: str, folder: Path = WEIGHTS) -> Path:
    """The file of a network, or of "vae". Raises ForcingError for another name and where the file is missing."""
    if name not in (*NETWORKS, "vae"):
        raise ForcingError(f"There is no micro model called {name!r}. Choose one of {', '.join(NETWORKS)} or vae.")
    file = folder / (VAE if name == "vae" else f"micro_{name}.safetensors")
    if not file.is_file():
        raise ForcingError(f"{file} is missing. Install the package again, or make the file with "
                           f"'python -m forcing_core train micro --out {folder}'.")
    return file


def vae(folder: Path = WEIGHTS) -> MicroVAE:
    """The VAE in float32, without gradients."""
    return load_vae(path("vae", folder)).float().eval().requires_grad_(False)


def network(name: str = "student", folder: Path = WEIGHTS) -> WanModel:
    """One of NETWORKS in float32, without gradients."""
    return read(path(name, folder))


def read(file: Path) -> WanModel:
    """The network of a file in float32, without gradients."""
    loaded = load(file)
    net = WanModel(micro_config(loaded.config.dim, loaded.config.num_layers))
    net.load_state_dict({key: value.float() for key, value in loaded.state_dict.items()})
    return net.eval().requires_grad_(False)


def micro_config(dim: int, layers: int) -> WanConfig:
    """The shape of a micro network; heads have 128 channels, as in all of Wan 2.1."""
    return WanConfig(dim=dim, ffn_dim=4 * dim, heads=dim // 128, layers=layers, text_dim=TEXT_DIM, text_len=ROWS)


def codec() -> TextCodec:
    """Captions -> conditioning [B, 24, 4096]."""
    return TextCodec(TEXT_DIM, ROWS)


def training(name: str, folder: Path = WEIGHTS) -> dict:
    """The settings that a file was trained with, from its metadata."""
    with safe_open(path(name, folder), framework="pt") as file:
        return json.loads((file.metadata() or {}).get("forcing.training", "{}"))


def known(caption: str) -> str:
    """The caption itself. Raises ForcingError, with the vocabulary, for words that no network here was shown."""
    if complaint := codec().explain(caption):
        raise ForcingError(complaint)
    return caption


def prompt(captions: Sequence[str]) -> torch.Tensor:
    """Conditioning [B, 24, 4096] of captions, zeros for an empty one. Raises ForcingError as `known` does."""
    return codec().encode([known(caption) for caption in captions])
