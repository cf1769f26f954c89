"""What the demo shows by default: a trained micro network, its captions and its VAE."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from torch import Tensor

from ..denoiser import NetworkDenoiser
from ..presets import Preset
from ..saved import Saved, Tree
from ..standalone import conditions, latent_size, make_denoiser
from . import bundle
from .vae import Z_DIM, DecodeStream, MicroVAE

if TYPE_CHECKING:
    from numpy import ndarray

PROMPT = "a red circle moving left on a dark background"
ENLARGED = 4
TRAINED = 21  # latent frames of a training clip


@dataclass(frozen=True)
class MicroSource:
    """A `demo.Source`. prompt: a caption of the micro world, "" for any clip. network: a key of bundle.NETWORKS.
    folder: of the weights.

    Raises ForcingError for words outside the vocabulary; `denoiser` and `decoder` for files that are missing.
    """

    prompt: str = PROMPT
    network: str = "student"
    folder: Path = bundle.WEIGHTS
    size: tuple[int, int] = bundle.SIZE
    channels: int = Z_DIM
    notice: str = (f"A small model, trained on generated clips of coloured shapes, {bundle.SIZE[0]}x{bundle.SIZE[1]} pixels, "
                   f"shown {ENLARGED} times as large.")

    def __post_init__(self):
        bundle.known(self.prompt)

    def usual_preset(self, frames: int) -> str:
        """Beyond the training length, positions stay inside the window: further ones were never trained."""
        if self.network == "teacher":
            return "causal-forcing-ar-teacher-chunkwise"
        return "micro" if frames <= TRAINED else "micro-endless"

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        return latent_size(width, height)

    def denoiser(self, preset: Preset, options: Any, frames: int, size: tuple[int, int]) -> NetworkDenoiser:
        captions = [self.prompt, ""][:conditions(preset)]
        prompts = [bundle.prompt([caption]) for caption in captions]
        return make_denoiser(bundle.network(self.network, self.folder), options, frames, size, prompts, preset.cfg)

    def decoder(self) -> Pictures:
        return Pictures(bundle.vae(self.folder))


class Pictures:
    """Decodes block by block. Every pixel becomes a square, so that edges stay sharp in any player."""

    enlarged = ENLARGED

    def __init__(self, vae: MicroVAE):
        self._stream = DecodeStream(vae)

    def __call__(self, latents: Tensor) -> Iterator[ndarray]:
        """x0 [1, 16, n, h, w] -> uint8 [32h, 32w, 3] frames."""
        video = self._stream.push(latents)[0].clamp(-1, 1).add(1).mul(127.5).round().byte()
        for picture in video.permute(1, 2, 3, 0):
            yield picture.repeat_interleave(ENLARGED, 0).repeat_interleave(ENLARGED, 1).numpy()

    def state(self) -> Tree:
        return self._stream.state()

    def load(self, saved: Saved, latents: Tensor) -> None:
        """latents: an example of the next ones."""
        self._stream.load(saved, latents)
