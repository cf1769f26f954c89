"""Video of any length to a file while it is made: sample a block, decode it, write it, forget it."""
from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Callable

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import RolloutOptions
from ..forcing_core.policies import build
from ..forcing_core.streaming import ENDLESS, FORMATS, Audio, VideoSink
from .common import CATEGORY
from .host_vae import BlockDecoder
from .latents import latent_frames
from .sampler import PURE_NOISE, CausalSampler, given_frames

log = logging.getLogger(__name__)


class StreamSampler(CausalSampler):
    """A rollout over `frames` latent frames whose blocks go to `consume` (in the VAE's scale, given frames first) and are
    not kept. It is called with the latents of the given frames and one block; returns the newest block."""

    def __init__(self, rollout: RolloutOptions, frames: int, consume: Callable[[Tensor], None], beside: int):
        super().__init__(replace(rollout, keep_on_interrupt=True))
        self.frames, self.consume, self.beside = frames, consume, beside

    def collect(self, run, progress) -> Tensor:
        out, newest = run.guider.inner_model.process_latent_out, None
        for _, latents in run.finished(progress):
            if newest is None and run.given is not None:
                self.consume(out(run.given))
            newest = latents
            self.consume(out(latents))
        return newest


def whole_frames(seconds: float, fps: float, given: int, options: RolloutOptions) -> int:
    """Latent frames of a video of about so many seconds, given ones included: whole blocks, at least one new one."""
    if seconds == 0:
        return ENDLESS
    head = 1 if options.independent_first and given == 0 else 0
    blocks = round((latent_frames(seconds, "seconds", fps) - given - head) / options.block)
    return given + head + max(0 if head else 1, blocks) * options.block


def check_endless(options: RolloutOptions) -> None:
    """Raise ForcingError for a memory that grows with the video or ends at some position."""
    try:
        policy = build(options.cache, ENDLESS)
    except ForcingError as error:
        raise ForcingError("A video without an end needs a window, and positions that are counted inside of it. Connect "
                           "Forcing Cache with a window and positions 'relative' or 'rebased', or set a length.") from error
    if policy.capacity >= ENDLESS:
        raise ForcingError("A video without an end needs a memory that does not grow. Set a window in Forcing Cache, or a "
                           "length in Forcing Stream.")


def check_stream(sampler, sigmas: Tensor, samples: Tensor) -> None:
    """Raise ForcingError for what needs the whole clip in memory, or is no clip."""
    if not isinstance(sampler, CausalSampler):
        raise ForcingError("Only a causal rollout makes a video block by block. Connect the SAMPLER of Forcing Preset or "
                           "Forcing Sampler.")
    if sampler.snapshots is not None:
        raise ForcingError("A snapshot holds all latents of the video, which a stream does not keep. Leave the snapshot node "
                           "out, or use Sampler Custom Advanced.")
    if sampler.rollout.noise != "block":
        raise ForcingError("This kind of noise is drawn for the whole video at once. Set noise to 'per block' in Forcing "
                           "Sampler.")
    if len(sigmas) == 0 or float(sigmas[0]) < PURE_NOISE:
        raise ForcingError("A stream starts every block from pure noise; there are no latents to be denoised in part. Connect "
                           "the SIGMAS of Forcing Preset or Forcing Sigmas.")
    if samples.ndim != 5 or samples.shape[0] != 1:
        raise ForcingError(f"One video is streamed at a time, not latents of the shape {list(samples.shape)}. Use Forcing "
                           "Empty Latent with batch_size 1.")


def short_latent(samples: Tensor, given: int, block: int) -> tuple[Tensor, Tensor | None]:
    """The latents and the mask that the guider is called with: given frames and one block."""
    empty = samples.new_zeros((*samples.shape[:2], block, *samples.shape[3:]))
    if not given:
        return empty, None
    mask = samples.new_ones((1, 1, given + block, 1, 1))
    mask[:, :, :given] = 0
    return torch.cat([samples[:, :, :given], empty], dim=2), mask


def sound(audio: dict | None) -> Audio | None:
    """ComfyUI's AUDIO; more than two channels are mixed to one."""
    if audio is None:
        return None
    wave = audio["waveform"][0].float().cpu()
    wave = wave if wave.shape[0] <= 2 else wave.mean(0, keepdim=True)
    return Audio(wave.numpy(), int(audio["sample_rate"]))


def _metadata(hidden) -> dict:
    """What core's Save Video stores, unless ComfyUI was told to store nothing."""
    if args.disable_metadata:
        return {}
    prompt = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return {**(hidden.extra_pnginfo or {}), **prompt}


def _place(prefix: str, kind: str, samples: Tensor) -> tuple[Path, str]:
    """(path without suffix, subfolder) of a new file in the output folder."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), samples.shape[4] * 8, samples.shape[3] * 8)
    return Path(folder) / f"{name}_{counter:05}_", subfolder


class ForcingStream(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingStream",
            display_name="Forcing Stream",
            category=CATEGORY,
            description="Samples, decodes and writes a video block by block, in the memory of one block whatever the length. "
                        "The file plays while it grows; Cancel ends it and keeps it.",
            search_aliases=["endless video", "infinite video", "save video", "long video"],
            is_output_node=True,
            inputs=[
                io.Noise.Input("noise", tooltip="From RandomNoise. Only the seed counts."),
                io.Guider.Input("guider", tooltip="From Forcing Guider, or any other guider."),
                io.Sampler.Input("sampler", tooltip="From Forcing Preset or Forcing Sampler."),
                io.Sigmas.Input("sigmas", tooltip="From the same node, or from Forcing Sigmas."),
                io.Latent.Input("latent_image", tooltip="The size, and the given frames at the start if there are any (Forcing "
                                                        "Start Image, Forcing Extend). Its length does not count."),
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE."),
                io.Float.Input("length", default=30.0, min=0.0, max=1000000.0, step=0.5,
                               tooltip="Seconds of video, the given start included, rounded to whole blocks. 0: until you "
                                       "press Cancel, which needs a window and relative or rebased positions (Forcing Cache)."),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0,
                               tooltip="Frames a second that the model makes; 16 for Wan 2.1."),
                io.String.Input("filename_prefix", default="video/Forcing", tooltip="Name in ComfyUI's output folder."),
                io.Combo.Input("format", options=list(FORMATS), default="mp4",
                               tooltip="mp4 (H.264) plays everywhere, webm (VP9) is smaller and slower to write, mkv lossless "
                                       "(FFV1) keeps every bit and plays in most players, but not in the browser."),
                io.Boolean.Input("offload_decoder", default=False, advanced=True,
                                 tooltip="Keep what the VAE remembers between blocks in RAM instead of VRAM (2 GB at 832x480 "
                                         "in 16 bit). A little slower; the same video."),
                io.Audio.Input("audio", optional=True, tooltip="Sound for the video, cut to its length."),
            ],
            outputs=[io.Video.Output(tooltip="The written file.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image, vae, length, fps, filename_prefix, format,
                offload_decoder=False, audio=None) -> io.NodeOutput:
        samples = latent_image["samples"]
        check_stream(sampler, sigmas, samples)
        mask = latent_image.get("noise_mask")
        mask = None if mask is None else comfy.sampler_helpers.prepare_mask(mask, samples.shape, samples.device)
        given = given_frames(samples, mask)
        frames = whole_frames(length, fps, given, sampler.rollout)
        if frames == ENDLESS:
            check_endless(sampler.rollout)
        start, mask = short_latent(samples, given, sampler.rollout.block)
        decoder = BlockDecoder(vae, guider.model_patcher, samples.shape, offload_decoder)
        path, subfolder = _place(filename_prefix, format, samples)
        with VideoSink(path, fps, format, metadata=_metadata(cls.hidden), audio=sound(audio)) as sink:
            def consume(latents: Tensor) -> None:
                for part in decoder.frames(latents):
                    sink.write(part.numpy())

            how = StreamSampler(sampler.rollout, frames, consume, decoder.beside)
            _run(guider, how, start, sigmas, mask, noise.seed, sink)
        log.info("%.1f s of video are in %s.", sink.seconds, sink.path)
        saved = ui.SavedResult(sink.path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(sink.path)), ui=ui.PreviewVideo([saved]))


def _run(guider, how: StreamSampler, start: Tensor, sigmas: Tensor, mask: Tensor | None, seed: int, sink: VideoSink) -> None:
    """One run as Sampler Custom Advanced makes it. An interrupt ends it; only before the first frame it is passed on."""
    callback = latent_preview.prepare_callback(guider.model_patcher, sigmas.shape[-1] - 1)
    try:
        guider.sample(torch.zeros_like(start), start, how, sigmas, denoise_mask=mask, callback=callback,
                      disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    except mm.InterruptProcessingException:
        if not sink.frames:
            raise
