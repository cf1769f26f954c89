"""The VAE side of `host`: decoding blocks as they come, while the diffusion model stays loaded.

What ComfyUI's `VAE.decode` does around the network - load it, cast, scale to 0..1 - is done here for one block.
"""
from __future__ import annotations

from typing import Iterator

import comfy.model_management as mm
import torch
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.streaming import DecodeStream

STEP = 4  # latent frames decoded at once
STEADY = 5  # latent frames from which ComfyUI's estimate counts the caches that a later block comes with


class BlockDecoder:
    """Frames of a video, block by block. vae: a ComfyUI VAE; offload: keep what it remembers between blocks in host memory.

    beside: device bytes that weights and decoding take while a rollout runs. Raises ForcingError for other VAEs.
    """

    def __init__(self, vae, patcher, latent_shape, offload: bool = False):
        """patcher: of the diffusion model, which has to be loaded again should the VAE have pushed it out."""
        if not hasattr(vae, "first_stage_model"):
            raise ForcingError(f"A {type(vae).__name__} is no VAE of ComfyUI. Use Load VAE with the Wan 2.1 VAE.")
        vae.throw_exception_if_invalid()
        self.vae, self.patcher = vae, patcher
        rest = torch.device("cpu") if offload and not mm.is_device_cpu(vae.device) else None
        self.stream = DecodeStream(vae.first_stage_model, rest)
        self.channels = vae.latent_channels
        self.needed = vae.memory_used_decode((1, self.channels, STEADY, *latent_shape[3:]), vae.vae_dtype)

    @property
    def beside(self) -> int:
        return 0 if mm.is_device_cpu(self.vae.device) else int(self.needed + self.vae.patcher.model_size())

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """uint8 [T, H, W, 3] on the CPU, in parts, of the next latents [1, C, F, h, w] in the VAE's scale."""
        if latents.shape[1] != self.channels:
            raise ForcingError(f"The VAE takes {self.channels} channels, the model makes {latents.shape[1]}. Load the Wan 2.1 "
                               "VAE (wan_2.1_vae.safetensors).")
        mm.load_models_gpu([self.vae.patcher], memory_required=max(0, self.needed - self.stream.nbytes),
                           force_full_load=self.vae.disable_offload)
        for part in latents.split(STEP, dim=2):
            video = self.stream.push(part.to(device=self.vae.device, dtype=self.vae.vae_dtype))
            pixels = self.vae.process_output(video[0, :3].float()).mul_(255).round_()
            yield pixels.to(torch.uint8).movedim(0, -1).contiguous().cpu()
        if not any(loaded.model is self.patcher for loaded in mm.current_loaded_models):
            mm.load_models_gpu([self.patcher])
