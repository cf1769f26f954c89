"""The VAE side of `host`: decoding and encoding blocks as they come, while the diffusion model stays loaded.

What ComfyUI's `VAE.decode` and `VAE.encode` do around the network - load it, cast, scale to 0..1 - is done here for one
block.
"""
from __future__ import annotations

from typing import Iterable, Iterator

import comfy.model_management as mm
import torch
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.streaming import DecodeStream, EncodeStream, TinyDecodeStream

STEP = 4  # latent frames decoded at once
STEADY = 5  # latent frames from which ComfyUI's estimate counts the caches that a later block comes with
PIECE = 16  # frames of video encoded at once
# Which latents a tiny VAE takes, which its file does not say.
TINY = {
    "auto": lambda tae: tae.latent_format is not None,  # ComfyUI's guess from 16-bit floats, as taew2_1 is published
    "model": lambda tae: True,  # taew2_1: those of the diffusion model
    "vae": lambda tae: False,  # lighttaew2_1: those of the Wan VAE
}


def is_tiny(vae) -> bool:
    return type(vae.first_stage_model).__name__ == "TAEHV"


def _checked(vae) -> None:
    if not hasattr(vae, "first_stage_model"):
        raise ForcingError(f"A {type(vae).__name__} is no VAE of ComfyUI. Use Load VAE with the Wan 2.1 VAE.")
    vae.throw_exception_if_invalid()


def _stream(vae, rest: torch.device | None):
    """What decodes the blocks of a video with this VAE: its network's own way, if it has one (`portrait.CodeVAE`)."""
    network = vae.first_stage_model
    if hasattr(network, "stream"):
        return network.stream()
    return TinyDecodeStream(network) if is_tiny(vae) else DecodeStream(network, rest)


class BlockDecoder:
    """Frames of a video, block by block. vae: a ComfyUI VAE, of Wan or a tiny one; offload: keep what it remembers between
    blocks in host memory. tiny: key of TINY, in which scale a tiny one takes latents; others have no choice.

    beside: device bytes that weights and decoding take while a rollout runs. deep: frames have 16 bits a colour. aside: CUDA
    stream to decode on, or None for the current one. Raises ForcingError for other VAEs.
    """

    deep = False
    aside: torch.cuda.Stream | None = None

    def __init__(self, vae, patcher, latent_shape, offload: bool = False, tiny: str = "auto"):
        """patcher: of the diffusion model, which has to be loaded again should the VAE have pushed it out."""
        _checked(vae)
        self.vae, self.patcher, network = vae, patcher, vae.first_stage_model
        rest = torch.device("cpu") if offload and not mm.is_device_cpu(vae.device) else None
        self.stream = _stream(vae, rest)
        self.rescaled = is_tiny(vae) and TINY[tiny](network)
        self.channels = vae.latent_channels
        self.needed = vae.memory_used_decode((1, self.channels, STEADY, *latent_shape[3:]), vae.vae_dtype)

    @property
    def beside(self) -> int:
        return 0 if mm.is_device_cpu(self.vae.device) else int(self.needed + self.vae.patcher.model_size())

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """uint8 or uint16 [T, H, W, 3] on the CPU, in parts, of the next latents [1, C, F, h, w] in the VAE's scale."""
        self.load()
        yield from self.decoded(latents)
        self.give_way()

    def load(self) -> None:
        """Bring the VAE to its device, for `decoded`."""
        mm.load_models_gpu([self.vae.patcher], memory_required=max(0, self.needed - self.stream.nbytes),
                           force_full_load=self.vae.disable_offload)

    def give_way(self) -> None:
        """Bring the diffusion model back, should the VAE have pushed it out."""
        if not any(loaded.model is self.patcher for loaded in mm.current_loaded_models):
            mm.load_models_gpu([self.patcher])

    def ready_for(self, latents: Tensor) -> None:
        """Have `aside` wait for latents that the current stream still works on. Called where they were made."""
        if self.aside is not None:
            self.aside.wait_stream(torch.cuda.current_stream(self.aside.device))
            if latents.is_cuda:
                latents.record_stream(self.aside)

    def decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """As `frames`, by a VAE that is on its device: nothing is loaded or moved."""
        if latents.shape[1] != self.channels:
            raise ForcingError(f"The VAE takes {self.channels} channels, the model makes {latents.shape[1]}. Load the Wan 2.1 "
                               "VAE (wan_2.1_vae.safetensors).")
        for part in latents.split(STEP, dim=2):
            with torch.cuda.stream(self.aside):
                pixels = self._pixels(part)
            yield pixels

    def _pixels(self, latents: Tensor) -> Tensor:
        if self.rescaled:
            latents = self.patcher.model.process_latent_in(latents)
        video = self.stream.push(latents.to(device=self.vae.device, dtype=self.vae.vae_dtype))
        most, dtype = (65535, torch.uint16) if self.deep else (255, torch.uint8)
        pixels = self.vae.process_output(video[0, :3].float()).clamp_(0, 1).mul_(most).round_()
        return pixels.to(dtype).movedim(0, -1).contiguous().cpu()


@torch.no_grad()
def encode(vae, frames: Iterable[Tensor]) -> Tensor:
    """Latents [1, C, F, h, w] in the VAE's scale, on the CPU, of 1 + 4 n frames [H, W, 3] in 0..1, multiples of 16 pixels.
    No more of the video than PIECE frames is held. Raises ForcingError for VAEs that are not Wan's."""
    _checked(vae)
    stream, parts, waiting = EncodeStream(vae.first_stage_model), [], []
    for frame in frames:
        waiting.append(frame)
        if len(waiting) == (PIECE if parts else PIECE + 1):
            parts.append(_encoded(vae, stream, waiting))
            waiting = []
    parts += [_encoded(vae, stream, waiting)] if waiting else []
    return torch.cat(parts, dim=2)


def _encoded(vae, stream: EncodeStream, frames: list[Tensor]) -> Tensor:
    video = torch.stack(frames).movedim(-1, 0)[None]
    mm.load_models_gpu([vae.patcher], memory_required=vae.memory_used_encode(video.shape, vae.vae_dtype),
                       force_full_load=vae.disable_offload)
    video = vae.process_input(video).to(device=vae.device, dtype=vae.vae_dtype)
    return stream.push(video).to(device="cpu", dtype=vae.vae_output_dtype())
