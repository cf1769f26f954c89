"""Video of any length to a file while it is made: sample a block, decode it, write it, forget it."""
from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Callable

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.utils
import torch
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import RolloutOptions
from ..forcing_core.policies import build
from ..forcing_core.saved import Saved
from ..forcing_core.steering import Helm, SteeredNoise, read_log
from ..forcing_core.streaming import ENDLESS, FORMATS, Audio, VideoSink
from ..forcing_core.streaming.ear import RATE, Ear
from ..forcing_core.streaming.recorder import Recorder, saved_log
from .common import CATEGORY
from .desk import Desk
from .host_conditioning import listen
from .host_overlap import OVERLAP, Overlap
from .host_vae import TINY, BlockDecoder
from .latents import latent_frames
from .sampler import PURE_NOISE, CausalSampler, given_frames
from .snapshot import Snapshots, StreamSnapshots
from .stream_files import log_beside, metadata, new_file, stores_metadata, words_of

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.5


class StreamSampler(CausalSampler):
    """A rollout over `frames` latent frames whose blocks go to `blocks` (in the VAE's scale, given frames first) and are not
    kept. It is called with the latents of the given frames and one block; returns the newest block. desk: who steers."""

    def __init__(self, sampler: CausalSampler, frames: int, blocks: Overlap, desk: Desk):
        streams = StreamSnapshots(sampler.snapshots or Snapshots(), blocks.state, self.go_on)
        super().__init__(replace(sampler.rollout, keep_on_interrupt=True), streams, sampler.restyle)
        self.reference = sampler.reference
        self.frames, self.blocks, self.recorder, self.desk = frames, blocks, blocks.recorder, desk
        self.beside, self.prompted, self.resumed = blocks.decoder.beside, desk.encoder is not None, False
        desk.settle = blocks.settle

    def go_on(self, saved: Saved, done: int) -> None:
        """Take up a saved stream whose last block was `done`."""
        self.desk.steering.go_on(saved_log(saved, done), done)
        self.recorder.load(saved, self.desk.example, self.desk.scale)
        self.resumed = True

    def steer(self, run) -> Helm:
        run.noise = SteeredNoise(run.noise)
        helm = Helm(self.desk.steering, run.denoiser, run.noise, run.options.block, self.desk.loras.set,
                    mm.throw_exception_if_processing_interrupted, run.kept.stopped)
        run.switches = helm.restore(run.blocks, run.switches)
        return helm

    def collect(self, run, progress) -> Tensor:
        out, newest = run.guider.inner_model.process_latent_out, None
        with self.blocks, closing(run.finished(progress)) as finished:
            for block, latents in finished:
                if newest is None and run.given is not None and not self.resumed:
                    self.blocks.write(out(run.given))
                newest = latents
                self.blocks.write(out(latents), partial(self._written, block.index, self.desk.numbers(run, block)))
        self.recorder.note()
        if newest is None:  # stopped before a block; the file has nothing new
            shape = run.shape
            newest = torch.zeros(shape.batch, run.guider.inner_model.diffusion_model.out_dim, run.options.block, shape.height,
                                 shape.width)
        return newest

    def _written(self, block: int, numbers: dict[str, Any]) -> None:
        self.desk.live.wrote(block, self.recorder.frames, **numbers)


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


def heard(ear: Ear | None, audio: dict | None) -> Audio | None:
    """What a file sounds like: its audio, or the voice that comes while it is made."""
    return sound(audio) or (ear and Audio(ear, RATE))


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
                                       "(FFV1) keeps every bit and plays in most players, but not in the browser. 16 bit: "
                                       "for editing, 16 bits a colour instead of 8, in files several times as large."),
                io.Boolean.Input("offload_decoder", default=False, advanced=True,
                                 tooltip="Keep what the VAE remembers between blocks in RAM instead of VRAM (2 GB at 832x480 "
                                         "in 16 bit). A little slower; the same video."),
                io.Audio.Input("audio", optional=True, tooltip="Sound for the video, cut to its length."),
                io.Combo.Input("tiny_vae", options=list(TINY), default="auto", optional=True, advanced=True,
                               tooltip="Only for tiny VAEs, whose file does not say which latents it takes: model for taew2_1, "
                                       "vae for lighttaew2_1. auto takes 16-bit files for the former. Wrong colours mean the "
                                       "other."),
                io.Clip.Input("clip", optional=True,
                              tooltip="Text encoder, for new prompts while the stream runs. Without it everything else can be "
                                      "steered: seed, LoRA strength, pause, stop."),
                io.String.Input("replay", default="", multiline=True, optional=True, advanced=True,
                                tooltip="The log of a steered stream (JSON, from the panel or the file's metadata): does the "
                                        "same again at the same frames. Empty: nothing."),
                io.Combo.Input("overlap", options=list(OVERLAP), default="auto", optional=True, advanced=True,
                               tooltip="Decode a block while the next one is sampled, wherever both models have room for it; "
                                       "the same video. auto: not on a CPU. It needs weights that stay on the card "
                                       "(--highvram or --disable-dynamic-vram)."),
            ],
            outputs=[io.Video.Output(tooltip="The written file.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image, vae, length, fps, filename_prefix, format,
                offload_decoder=False, audio=None, tiny_vae="auto", clip=None, replay="", overlap="auto") -> io.NodeOutput:
        if hasattr(sampler, "stream"):  # of Forcing Clips: it makes whole clips
            return sampler.stream(cls.hidden, noise, guider, sigmas, latent_image, vae, length, fps, filename_prefix, format,
                                  offload_decoder, audio, tiny_vae, clip, replay)
        samples = latent_image["samples"]
        check_stream(sampler, sigmas, samples)
        mask = latent_image.get("noise_mask")
        mask = None if mask is None else comfy.sampler_helpers.prepare_mask(mask, samples.shape, samples.device)
        given = given_frames(samples, mask)
        frames = whole_frames(length, fps, given, sampler.rollout)
        if frames == ENDLESS:
            check_endless(sampler.rollout)
        start, mask = short_latent(samples, given, sampler.rollout.block)
        decoder = BlockDecoder(vae, guider.model_patcher, samples.shape, offload_decoder, tiny_vae)
        path, subfolder = new_file(filename_prefix, samples.shape[3] * 8, samples.shape[4] * 8)
        saving = sampler.snapshots is not None and bool(sampler.snapshots.name)
        ear = listen(guider, fps)
        sink = VideoSink(path, fps, format, metadata=metadata(cls.hidden), audio=heard(ear, audio), keep=saving,
                         note={} if stores_metadata() else None)
        decoder.deep = sink.format.deep
        desk = Desk(guider, sampler.rollout, frames, clip, read_log(replay), fps, cls.hidden.unique_id, decoder, samples,
                    words_of(cls.hidden.prompt, cls.hidden.unique_id))
        desk.live.ear = ear
        desk.live.file = {"filename": sink.path.name, "subfolder": subfolder, "type": "output", "format": sink.format.suffix}
        recorder = Recorder(lambda latents: (part.numpy() for part in decoder.decoded(latents)), decoder.stream, sink,
                            desk.steering, desk.live)
        how = StreamSampler(sampler, frames, Overlap(decoder, recorder, desk.room, overlap), desk)
        with desk, sink:
            _run(guider, how, start, sigmas, mask, noise.seed, sink)
        if not sink.frames:  # told to stop before there was anything
            raise mm.InterruptProcessingException
        if stores_metadata() and not recorder.note():
            log_beside(sink.path, recorder)
        log.info("%.1f s of video are in %s.", sink.seconds, sink.path)
        saved = ui.SavedResult(sink.path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(sink.path)), ui=ui.PreviewVideo([saved]))


def _seldom(steps: int) -> Callable:
    """A sampler's callback that moves the bar twice a second. No previews: the panel shows the finished frames, and a page
    that redraws its graph for every step of a fast model has no time left for its user."""
    bar, shown = comfy.utils.ProgressBar(steps), -PROGRESS_SECONDS

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS:
            shown = now
            bar.update_absolute(step + 1, total)
    return callback


def _run(guider, how: StreamSampler, start: Tensor, sigmas: Tensor, mask: Tensor | None, seed: int, sink: VideoSink) -> None:
    """One run as Sampler Custom Advanced makes it. An interrupt ends it; only before the first frame it is passed on."""
    try:
        callback = _seldom(sigmas.shape[-1] - 1)
        guider.sample(torch.zeros_like(start), start, how, sigmas, denoise_mask=mask, callback=callback,
                      disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    except mm.InterruptProcessingException:
        if not sink.frames:
            raise
