"""Clips to a file while they are made: what Forcing Stream does with a SAMPLER of Forcing Clips.

Every clip leaves as it is finished; between two of them the panel can change prompt, seed and LoRA strengths, or stop.
"""
from __future__ import annotations

from collections import deque
from contextlib import closing

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.utils
import torch
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.noise import BlockNoise
from ..forcing_core.options import RolloutOptions
from ..forcing_core.plan import Block
from ..forcing_core.policies import WindowOptions
from ..forcing_core.rollout.clips import Clip
from ..forcing_core.steering import Helm, SteeredNoise, read_log
from ..forcing_core.streaming import ENDLESS, VideoSink
from ..forcing_core.streaming.recorder import Recorder
from .clip_sampler import ClipRun, ClipSampler
from .desk import Desk
from .host_clips import clips_on, kind_of
from .host_vae import BlockDecoder
from .latents import latent_frames
from .stream import sound
from .stream_files import log_beside, metadata, new_file, stores_metadata, words_of


class StreamableClips(ClipSampler):
    """A SAMPLER of clips that Forcing Stream can run."""

    def stream(self, hidden, noise, guider, sigmas, latent_image, vae, length, fps, filename_prefix, format, offload_decoder,
               audio, tiny_vae, clip, replay) -> io.NodeOutput:
        """The node's answer; arguments are its inputs."""
        samples, model = latent_image["samples"], guider.model_patcher.model
        _check(samples, sigmas)
        clips = clips_on(model, self.clips, self.hand)
        frames = ENDLESS if length == 0 else clips.fitting(round(latent_frames(length, "seconds", fps)))
        start, mask = first_clip(latent_image, kind_of(model).lead + min(frames, clips.length))
        decoder = BlockDecoder(vae, guider.model_patcher, samples.shape, offload_decoder, tiny_vae)
        path, subfolder = new_file(filename_prefix, samples.shape[3] * 8, samples.shape[4] * 8)
        sink = VideoSink(path, fps, format, metadata=metadata(hidden), audio=sound(audio),
                         note={} if stores_metadata() else None)
        decoder.deep = sink.format.deep
        desk = Desk(guider, _as_blocks(clips.stride), frames, clip, read_log(replay), fps, hidden.unique_id, decoder, samples,
                    words_of(hidden.prompt, hidden.unique_id))
        desk.live.policy = "clips"
        desk.live.file = {"filename": sink.path.name, "subfolder": subfolder, "type": "output", "format": sink.format.suffix}
        recorder = Recorder(lambda latents: (part.numpy() for part in decoder.frames(latents)), decoder.stream, sink,
                            desk.steering, desk.live)
        with desk, sink:
            _run(guider, _ClipStream(self, frames, recorder, desk, noise.seed), start, sigmas, mask, noise.seed, sink)
        if not sink.frames:  # told to stop before there was anything
            raise mm.InterruptProcessingException
        if stores_metadata() and not recorder.note():
            log_beside(sink.path, recorder)
        saved = ui.SavedResult(sink.path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(sink.path)), ui=ui.PreviewVideo([saved]))


class _ClipStream(ClipSampler):
    """A video of `frames` latent frames whose final ones go to `recorder` and are not kept. Noise is that of (seed, clip), so
    a longer video has the shorter one as its beginning. It is called with the latents of the first clip; returns the newest
    frames."""

    def __init__(self, sampler: ClipSampler, frames: int, recorder: Recorder, desk: Desk, seed: int):
        super().__init__(sampler.inner, sampler.clips, sampler.hand, sampler.ahead)
        self.frames, self.recorder, self.desk, self.seed = frames, recorder, desk, seed
        self.helm: Helm | None = None

    def collect(self, run: ClipRun) -> Tensor:
        out, newest = run.guider.inner_model.process_latent_out, run.whole[0]
        with closing(run.finished()) as clips:
            for clip, newest in clips:
                self.recorder.write(out(newest))
                self.desk.live.wrote(clip.index, self.recorder.frames, seed=self.helm.noise.seed,
                                     prompt=self.desk.prompt(self.helm.text, clip.first + clip.final.start))
        self.recorder.note()
        return newest

    def begins(self, run: ClipRun, clip: Clip) -> bool:
        if self.helm is None:
            whole = run.whole[0]
            noise = SteeredNoise(BlockNoise(self.seed, tuple(whole.shape[:2]), tuple(whole.shape[3:]), whole.device))
            self.helm = Helm(self.desk.steering, run.conds, noise, self.clips.stride, self.desk.loras.set,
                             mm.throw_exception_if_processing_interrupted)
        final = clip.final
        return self.helm(Block(clip.index, clip.first + final.start, final.stop - final.start), deque())

    def tensors(self, run: ClipRun, clip: Clip) -> tuple[Tensor, Tensor, Tensor | None]:
        noise = self.helm.noise.initial(Block(clip.index, clip.first, run.kind.lead + clip.frames))
        if clip.index == 0:
            return noise, *run.whole[1:]
        return noise, torch.zeros_like(noise), None


def _as_blocks(frames: int) -> RolloutOptions:
    """What a desk asks of a rollout: blocks, between which anything may change."""
    return RolloutOptions(block=frames, cache=WindowOptions(window=frames, sink=0, positions="relative", block=frames))


def _check(samples: Tensor, sigmas: Tensor) -> None:
    """Raise ForcingError for what is no single video, or has nothing to begin with."""
    if samples.ndim != 5 or samples.shape[0] != 1:
        raise ForcingError(f"One video is streamed at a time, not latents of the shape {list(samples.shape)}. Set batch_size "
                           "to 1.")
    if len(sigmas) == 0:
        raise ForcingError("There are no steps to sample. Connect the SIGMAS of BasicScheduler.")


def first_clip(latent: dict, frames: int) -> tuple[Tensor, Tensor | None]:
    """The latents of the first clip and their mask, as a guider takes them; frames that are missing are empty."""
    def cut(whole: Tensor, fill: float) -> Tensor:
        part = whole[:, :, :frames]
        missing = part.new_full((*part.shape[:2], frames - part.shape[2], *part.shape[3:]), fill)
        return torch.cat([part, missing], dim=2)

    samples, mask = latent["samples"], latent.get("noise_mask")
    mask = None if mask is None else cut(comfy.sampler_helpers.prepare_mask(mask, samples.shape, samples.device), 1.0)
    return cut(samples, 0.0), mask


def _run(guider, how: ClipSampler, start: Tensor, sigmas: Tensor, mask: Tensor | None, seed: int, sink: VideoSink) -> None:
    """One run as Sampler Custom Advanced makes it. An interrupt ends it; only before the first frame it is passed on."""
    bar = comfy.utils.ProgressBar(len(sigmas) - 1)

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        bar.update_absolute(step + 1, total)

    try:
        guider.sample(torch.zeros_like(start), start, how, sigmas, denoise_mask=mask, callback=callback,
                      disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    except mm.InterruptProcessingException:
        if not sink.frames:
            raise
