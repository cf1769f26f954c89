"""A video in another style: the sampler starts every block from the source's own, made noisy."""
from __future__ import annotations

import copy
from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.rollout.restyle import Restyle
from .common import CATEGORY
from .sampler import CausalSampler


@dataclass(frozen=True)
class Source:
    """options: how; latents: of the video [B, C, F, H, W], in the VAE's scale."""

    options: Restyle
    latents: Tensor

    def fitting(self, shape, base_model) -> Tensor:
        """float32 latents in the network's scale, on the CPU, for a run of this `host.Shape`. Raises ForcingError for other
        sizes."""
        batch, _, _, height, width = self.latents.shape
        if (height, width) != (shape.height, shape.width) or batch not in (1, shape.batch):
            raise ForcingError(f"The source is {batch} x {width * 8}x{height * 8} pixels, the latent {shape.batch} x "
                               f"{shape.width * 8}x{shape.height * 8}. Connect the same LATENT to Forcing Restyle and to the "
                               "sampler.")
        if self.latents.shape[1] != base_model.diffusion_model.out_dim:
            raise ForcingError(f"The source has {self.latents.shape[1]} channels, the model "
                               f"{base_model.diffusion_model.out_dim}. Encode the video with the Wan 2.1 VAE.")
        latents = base_model.process_latent_in(self.latents.float().cpu())
        return latents.expand(shape.batch, -1, -1, -1, -1)


class ForcingRestyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingRestyle",
            display_name="Forcing Restyle",
            category=CATEGORY,
            description="Video to video: every block starts from the source's own block, made noisy, and is denoised under "
                        "your prompt. The memory holds what was made, so the new style stays.",
            search_aliases=["video to video", "v2v", "vid2vid", "style transfer", "denoise"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From Forcing Preset or Forcing Sampler, of a system that makes block "
                                                    "after block."),
                io.Latent.Input("source", tooltip="The video, from Forcing Start Video (source) or a VAE encoder. Connect it "
                                                  "to the sampling node too, which takes the size from it."),
                io.Float.Input("strength", default=0.8, min=0.01, max=1.0, step=0.01,
                               tooltip="Noise that a block starts with. 1 takes nothing from the source, little noise keeps "
                                       "it; 0.7 to 0.95 changes style and keeps motion."),
                io.Float.Input("motion", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="How much less noise a block gets where the source moves as fast as can be. 0.1 as in "
                                       "StreamDiffusionV2, 0 for the same noise everywhere."),
            ],
            outputs=[io.Sampler.Output(tooltip="The same rollout, which starts from the source. Behind its end it goes on "
                                               "freely.")],
        )

    @classmethod
    def execute(cls, sampler, source, strength, motion) -> io.NodeOutput:
        if not isinstance(sampler, CausalSampler):
            raise ForcingError("Only a causal rollout restyles block by block. Connect the SAMPLER of Forcing Preset or "
                               "Forcing Sampler.")
        latents = source["samples"]
        if latents.ndim != 5:
            raise ForcingError("Forcing Restyle needs the latents of a video, not of a picture. Connect Forcing Start Video.")
        options = Restyle(strength, motion)
        options.check(sampler.rollout.cache.rollout)
        made = copy.copy(sampler)
        made.restyle = Source(options, latents)
        return io.NodeOutput(made)
