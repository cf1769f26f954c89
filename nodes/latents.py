"""Latents on the block grid: empty ones by seconds or frames, start images, and videos to go on with."""
from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import pixel_frames
from .common import CATEGORY

UNITS = ["seconds", "frames of video", "latent frames"]
FITS = ["crop", "stretch", "pad"]


def latent_frames(length: float, unit: str, fps: float) -> float:
    """Latent frames (possibly a fraction) of a length in one of UNITS."""
    per_unit = {
        "seconds": lambda: (length * fps - 1) / 4 + 1,
        "frames of video": lambda: (length - 1) / 4 + 1,
        "latent frames": lambda: length,
    }
    return per_unit[unit]()


def on_grid(length: float, unit: str, block: int, fps: float, given: int = 0) -> int:
    """Latent frames for a length: seconds are rounded to the nearest block; frames have to fit exactly.

    Raises ForcingError naming the two nearest legal lengths.
    """
    wanted = latent_frames(length, unit, fps) - given
    blocks = max(1, round(wanted / block))
    if unit != "seconds" and blocks * block != wanted:
        lower = max(1, int(wanted // block))
        near = sorted({lower, lower + 1})
        texts = [f"{pixel_frames(given + n * block) if unit == UNITS[1] else given + n * block:g}" for n in near]
        raise ForcingError(f"{length:g} {unit} does not fall on the block grid of {block} latent frames. "
                           f"Use {' or '.join(texts)}.")
    return given + blocks * block


def empty(width: int, height: int, frames: int, batch: int, channels: int = 16) -> torch.Tensor:
    """Zero latents [batch, channels, frames, height/8, width/8]; raises ForcingError for sizes off the 16-pixel grid."""
    if width % 16 or height % 16:
        near = [f"{side - side % 16} or {side - side % 16 + 16}" for side in (width, height)]
        raise ForcingError(f"{width}x{height} does not divide by 16. Use a width of {near[0]} and a height of {near[1]}.")
    return torch.zeros((batch, channels, frames, height // 8, width // 8), device=mm.intermediate_device())


def with_given(given: torch.Tensor, total: int) -> dict:
    """A LATENT of `total` frames that starts with `given` [B, C, M, H, W], masked so that samplers keep them."""
    rest = given.new_zeros((*given.shape[:2], total - given.shape[2], *given.shape[3:]))
    mask = torch.ones((1, 1, total, 1, 1), device=given.device)
    mask[:, :, :given.shape[2]] = 0
    return {"samples": torch.cat([given, rest], dim=2), "noise_mask": mask}


class ForcingEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingEmptyLatent",
            display_name="Forcing Empty Latent",
            category=CATEGORY,
            description="Empty video latent of a legal length for causal models, at any size.",
            search_aliases=["empty video latent", "ar video"],
            inputs=[
                io.Int.Input("width", default=832, min=16, max=8192, step=16,
                             tooltip="Pixels, divisible by 16. The 1.3B models were trained at 832x480."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Pixels, divisible by 16."),
                io.Float.Input("length", default=5.0, min=0.5, max=100000.0, step=0.5,
                               tooltip="In the unit below. Seconds are rounded to the nearest whole block."),
                io.Combo.Input("unit", options=UNITS, default="seconds",
                               tooltip="A video of n latent frames has 1 + 4*(n - 1) frames."),
                io.Int.Input("block", default=3, min=1, max=64,
                             tooltip="Latent frames a block: 3 for chunkwise models, 1 for framewise ones (Causal Forcing "
                                     "framewise, ++)."),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0, advanced=True,
                               tooltip="Frames a second that the model makes; 16 for Wan 2.1."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once; memory grows with it."),
            ],
            outputs=[io.Latent.Output(),
                     io.Int.Output(id="frames", display_name="frames", tooltip="Frames of video this will decode to.")],
        )

    @classmethod
    def execute(cls, width, height, length, unit, block, batch_size, fps=16.0) -> io.NodeOutput:
        frames = on_grid(length, unit, block, fps)
        return io.NodeOutput({"samples": empty(width, height, frames, batch_size)}, pixel_frames(frames))


def _padded(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    scale = min(width / image.shape[-1], height / image.shape[-2])
    size = max(1, round(image.shape[-1] * scale)), max(1, round(image.shape[-2] * scale))
    small = comfy.utils.common_upscale(image, *size, "bicubic", "disabled")
    out = image.new_zeros((*image.shape[:2], height, width))
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    out[:, :, top:top + size[1], left:left + size[0]] = small
    return out


FIT = {
    "crop": lambda image, w, h: comfy.utils.common_upscale(image, w, h, "bicubic", "center"),
    "stretch": lambda image, w, h: comfy.utils.common_upscale(image, w, h, "bicubic", "disabled"),
    "pad": _padded,
}


class ForcingStartImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingStartImage",
            display_name="Forcing Start Image",
            category=CATEGORY,
            description="Makes an image (or the frames of a clip) the given start of a video. Framewise models continue it "
                        "well; chunkwise ones were not trained for a single image and may flicker.",
            search_aliases=["image to video", "i2v", "start frame"],
            inputs=[
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE."),
                io.Image.Input("image", tooltip="One image, or a clip of 1 + 4n frames; other lengths are cut to that."),
                io.Latent.Input("latent", tooltip="From Forcing Empty Latent: the size, and the frames to generate. The start "
                                                  "is put in front of them."),
                io.Combo.Input("fit", options=FITS, default="crop",
                               tooltip="What to do where the shape differs: crop the edges, stretch, or pad with black."),
            ],
            outputs=[io.Latent.Output(tooltip="Connect to Sampler Custom Advanced.")],
        )

    @classmethod
    def execute(cls, vae, image, latent, fit) -> io.NodeOutput:
        samples = latent["samples"]
        height, width = samples.shape[3] * 8, samples.shape[4] * 8
        frames = image[:1 + 4 * ((image.shape[0] - 1) // 4), :, :, :3]
        pixels = FIT[fit](frames.movedim(-1, 1), width, height).movedim(1, -1).clamp(0, 1)
        given = vae.encode(pixels).to(samples)
        given = given.expand(samples.shape[0], -1, -1, -1, -1).contiguous()
        return io.NodeOutput(with_given(given, given.shape[2] + samples.shape[2]))


class ForcingExtend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingExtend",
            display_name="Forcing Extend",
            category=CATEGORY,
            description="Goes on with a finished video: its latents become the given start of a longer one. No decode and "
                        "re-encode, so no drift at the joint.",
            search_aliases=["continue video", "extend video"],
            inputs=[
                io.Latent.Input("context", tooltip="Latents of the video so far, from a sampler or a VAE encoder."),
                io.Float.Input("length", default=5.0, min=0.5, max=100000.0, step=0.5, tooltip="How much to add."),
                io.Combo.Input("unit", options=["seconds", "latent frames"], default="seconds",
                               tooltip="4 latent frames are 16 frames of video, one second."),
                io.Int.Input("block", default=3, min=1, max=64, tooltip="Latent frames a block of the model."),
                io.Int.Input("context_frames", default=0, min=0, max=100000, advanced=True,
                             tooltip="Use only the last so many latent frames as context, and return the video from there. 0 "
                                     "uses all of it; the model sees at most its window anyway."),
            ],
            outputs=[io.Latent.Output(tooltip="Context and empty frames; connect to Sampler Custom Advanced.")],
        )

    @classmethod
    def execute(cls, context, length, unit, block, context_frames=0) -> io.NodeOutput:
        samples = context["samples"]
        if samples.ndim != 5:
            raise ForcingError("Forcing Extend needs video latents, not those of a picture. Connect a causal sampler's output.")
        given = samples[:, :, -context_frames:] if context_frames else samples
        added = max(1, round(length * 4 / block)) * block if unit == "seconds" else on_grid(length, unit, block, 16.0)
        return io.NodeOutput(with_given(given, given.shape[2] + added))
