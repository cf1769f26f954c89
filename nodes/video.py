"""Videos as the start of a rollout, or as what it restyles: at the model's rate, on its grid of pixels, as latents."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator

import comfy.model_management as mm
import torch
from comfy_api.latest import InputImpl, io
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import pixel_frames
from ..forcing_core.streaming import source as files
from .common import CATEGORY
from .host_vae import encode
from .latents import FIT, FITS, on_grid, with_given

PARTS = ["last", "first"]
SIDE = 16  # pixels of a token, and so what sides are multiples of
# explicit choice -> how a side that is no multiple becomes one: what hangs over is cut, missing pixels are added
SIDES = {"crop": lambda n: n // SIDE * SIDE, "pad": lambda n: -(-n // SIDE) * SIDE, "stretch": lambda n: round(n / SIDE) * SIDE}


@dataclass(frozen=True)
class Source:
    """shown: when frames are seen; read: indices of them, rising -> frames [H, W, 3] in 0..1."""

    shown: files.Shown
    read: Callable[[list[int]], Iterator[Tensor]]


def of_images(images: Tensor, fps: float) -> Source:
    return Source(files.constant(len(images), fps), lambda indices: (images[i, :, :, :3].float() for i in indices))


def of_video(video) -> Source:
    """A VIDEO of ComfyUI. Files keep the times of their frames, which its own reader replaces by a constant rate."""
    if isinstance(video, InputImpl.VideoFromComponents) or not hasattr(video, "get_active_trim_window"):
        parts = video.get_components()
        return of_images(parts.images, float(parts.frame_rate))
    file = video.get_stream_source()
    shown = files.shown(file).part(*video.get_active_trim_window())

    def read(indices: list[int]) -> Iterator[Tensor]:
        for frame in files.frames(file, [shown.times[i] for i in indices]):
            yield torch.from_numpy(frame).float().div_(255)
    return Source(shown, read)


def taken(available: int, part: str, wanted: int, block: int) -> slice:
    """Which of `available` frames of video become latents: whole blocks, at most `wanted` latent frames (0: all).

    Raises ForcingError where there is no whole block.
    """
    most = ((available - 1) // 4 + 1) // block * block
    if not most:
        raise ForcingError(f"The video has {available} frames at the model's rate; a block of {block} latent frames takes "
                           f"{pixel_frames(block)}. Use a longer video, or a smaller block if the model has one.")
    frames = pixel_frames(min(most, wanted or most))
    return slice(available - frames, available) if part == "last" else slice(frames)


def size_of(width: int, height: int, wanted: tuple[int, int], fit: str) -> tuple[int, int]:
    """(width, height) in whole tokens: the wanted one, where 0 is what keeps the shape of the video."""
    scale = max((want / own for want, own in zip(wanted, (width, height)) if want), default=1.0)
    return tuple(want or max(SIDE, SIDES[fit](round(own * scale))) for want, own in zip(wanted, (width, height)))


def _cut(image: Tensor, width: int, height: int) -> Tensor:
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top:top + height, left:left + width]


def _framed(image: Tensor, width: int, height: int) -> Tensor:
    right, below = width - image.shape[-1], height - image.shape[-2]
    return torch.nn.functional.pad(image, (right // 2, right - right // 2, below // 2, below - below // 2))


# to the next multiple of 16, pixels stay as they are; smaller pictures than a token are enlarged
OWN = {"crop": _cut, "pad": _framed, "stretch": FIT["stretch"]}


def fitted(frames: Iterable[Tensor], wanted: tuple[int, int], fit: str) -> Iterator[Tensor]:
    """Frames [H, W, 3] of one size. wanted: (width, height), 0 for that of the video, where nothing is resampled but by
    "stretch"."""
    size = how = None
    for frame in frames:
        if size is None:
            small = min(frame.shape[:2]) < SIDE
            size, how = size_of(frame.shape[1], frame.shape[0], wanted, fit), (FIT if any(wanted) or small else OWN)[fit]
        yield how(frame.movedim(-1, 0)[None], *size)[0].movedim(0, -1).clamp(0, 1)


class ForcingStartVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingStartVideo",
            display_name="Forcing Start Video",
            category=CATEGORY,
            description="A video that exists as the start of a new one, or as what is restyled: taken at the model's frame "
                        "rate, fitted to its grid and encoded piece by piece.",
            search_aliases=["video to video", "continue video", "extend video", "v2v", "video input"],
            inputs=[
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE. Tiny VAEs only decode here."),
                io.Video.Input("video", optional=True, tooltip="From Load Video, Create Video or Forcing Stream. Variable "
                                                               "frame rates keep their speed."),
                io.Image.Input("images", optional=True, tooltip="Frames, in place of a video."),
                io.Float.Input("images_fps", default=16.0, min=0.1, max=1000.0, step=1.0, advanced=True,
                               tooltip="Frames a second of the images; a video knows its own."),
                io.Combo.Input("part", options=PARTS, default="last",
                               tooltip="Which end of the video to take: the last part to go on from, the first to restyle."),
                io.Float.Input("length", default=3.0, min=0.0, max=100000.0, step=0.5,
                               tooltip="How much of it, in the unit below; 0 for all. The model sees at most its window, 12 "
                                       "latent frames being 2.8 s."),
                io.Combo.Input("unit", options=["seconds", "latent frames"], default="seconds",
                               tooltip="Seconds are rounded to whole blocks."),
                io.Int.Input("block", default=3, min=1, max=64,
                             tooltip="Latent frames a block of the model: the start consists of whole ones."),
                io.Combo.Input("fit", options=FITS, default="crop",
                               tooltip="Where the shape differs, or a side is no multiple of 16: crop the edges, stretch, or "
                                       "pad with black."),
                io.Int.Input("width", default=0, min=0, max=8192, step=16, tooltip="Pixels; 0 for that of the video. The 1.3B "
                                                                                   "models were trained at 832x480."),
                io.Int.Input("height", default=0, min=0, max=8192, step=16, tooltip="Pixels; 0 for that of the video."),
                io.Float.Input("add", default=5.0, min=0.0, max=100000.0, step=0.5,
                               tooltip="Seconds of new video behind the start, in whole blocks. Forcing Stream has a length of "
                                       "its own and does not use it."),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0, advanced=True,
                               tooltip="Frames a second that the model makes; 16 for Wan 2.1."),
            ],
            outputs=[io.Latent.Output(id="start", display_name="start",
                                      tooltip="The video and empty frames behind it. Connect to Sampler Custom Advanced or "
                                              "Forcing Stream, which go on with it."),
                     io.Latent.Output(id="source", display_name="source",
                                      tooltip="The video alone, for Forcing Restyle and Forcing Extend.")],
        )

    @classmethod
    def execute(cls, vae, images_fps=16.0, part="last", length=3.0, unit="seconds", block=3, fit="crop", width=0, height=0,
                add=5.0, fps=16.0, video=None, images=None) -> io.NodeOutput:
        if (video is None) == (images is None):
            raise ForcingError("Forcing Start Video takes one video. Connect either video or images.")
        source = of_images(images, images_fps) if video is None else of_video(video)
        wanted = on_grid(length, unit, block, fps) if length else 0
        indices = source.shown.at(fps)
        indices = indices[taken(len(indices), part, wanted, block)]
        latents = encode(vae, fitted(source.read(indices), (width, height), fit)).to(mm.intermediate_device())
        added = max(1, round(add * fps / 4 / block)) * block if add else 0
        return io.NodeOutput(with_given(latents, latents.shape[2] + added), {"samples": latents})
