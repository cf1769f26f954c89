"""The SAMPLER object of clips: a solver of ComfyUI over one clip after the other, for every node that takes a SAMPLER."""
from __future__ import annotations

import logging
from typing import Iterator

import comfy.model_management as mm
import torch
from comfy.samplers import Sampler
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.noise import mix
from ..forcing_core.rollout.clips import Clip, Clips, clip_rollout, lay
from ..forcing_core.streaming import ENDLESS
from .host_clips import (
    HANDS,
    ClipConds,
    Handing,
    Pinned,
    clips_on,
    fit_weights,
    kind_of,
    own_hand,
    own_options,
    refuse,
    running_ahead,
)

log = logging.getLogger(__name__)


class ClipSampler(Sampler):
    """Runs `inner`, a SAMPLER of ComfyUI, over one clip after the other. hand: key of HANDS, or None for what the model has.
    ahead: how far the reference stands behind a clip, 0 for where the model has it.

    For one that streams: `frames`, latent frames of the whole video where the latents it gets are those of a clip.
    """

    frames: int | None = None

    def __init__(self, inner: Sampler, clips: Clips, hand: str | None = None, ahead: int = 0):
        self.inner, self.clips, self.hand, self.ahead = inner, clips, hand, ahead

    @torch.no_grad()
    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False) -> Tensor:
        """Latents like `noise`, those of a reference before the first frame of the video included."""
        run = ClipRun(self, model_wrap, sigmas, extra_args, callback, (noise, latent_image, denoise_mask), disable_pbar)
        return self.collect(run)

    def collect(self, run: ClipRun) -> Tensor:
        """What `sample` returns, of the frames as they become final."""
        parts = [latents for _, latents in run.finished()]
        whole = torch.cat([run.reference, *parts], dim=2)
        run.show(whole)
        return whole

    def tensors(self, run: ClipRun, clip: Clip) -> tuple[Tensor, Tensor, Tensor | None]:
        """Noise, latents and mask of a clip, with those of the reference in front."""
        return tuple(None if whole is None else run.cut(whole, clip) for whole in run.whole)

    def begins(self, run: ClipRun, clip: Clip) -> bool:
        """Asked before every clip; False ends the run."""
        return True


class ClipRun:
    """One call of the sampler: checked inputs, then finished frames. whole: noise, latents and mask that it was called with.
    reference: latents of the frames before the video's, once there was a clip."""

    def __init__(self, sampler: ClipSampler, guider, sigmas, extra_args, callback, whole, quiet: bool):
        self.sampler, self.guider, self.sigmas, self.extra_args = sampler, guider, sigmas, extra_args
        self.callback, self.whole, self.quiet = callback, whole, quiet
        model, options = guider.inner_model, extra_args["model_options"]
        refuse(options)
        self.kind = kind_of(model)
        self.frames = sampler.frames or _frames(whole[0], self.kind.lead)
        self.clips, self.hand = sampler.clips, sampler.hand
        if self.frames > sampler.clips.length:
            inner = options.get("transformer_options", {})
            self.hand = sampler.hand or own_hand(guider, inner)
            self.clips = clips_on(model, sampler.clips, self.hand)
            _check_sigmas(sigmas)
            fit_weights(guider, (*whole[0].shape[:2], self.kind.lead + self.clips.length, *whole[0].shape[3:]))
        self.conds = ClipConds(guider, self.kind, options.get("transformer_options", {}))
        self.count = 1 if self.frames >= ENDLESS else sum(1 for _ in lay(self.frames, self.clips))
        if self.count > 1 and self.clips.fitting(self.frames) != self.frames:
            log.info("The last clip of %d latent frames is a short one; a video of %d would have none.", self.frames,
                     self.clips.fitting(self.frames))
        self.reference: Tensor = whole[0][:, :, :0]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def finished(self) -> Iterator[tuple[Clip, Tensor]]:
        """Yield (clip, latents) with the frames that became final."""
        try:
            with running_ahead(self.guider.inner_model, self.kind, self.sampler.ahead):
                yield from clip_rollout(self.make, self._clips(), self.clips)
        finally:
            self.conds.restore()

    def _clips(self) -> Iterator[Clip]:
        for clip in lay(self.frames, self.clips):
            if not self.sampler.begins(self, clip):
                return
            yield clip

    def make(self, clip: Clip, handed: Tensor | None) -> Tensor:
        """x0 of a clip, without its reference."""
        mm.throw_exception_if_processing_interrupted()
        options = own_options(self.extra_args["model_options"], later=clip.index > 0)
        inner, lead, guider = options["transformer_options"], self.kind.lead, self.guider
        values = self.conds.lay(clip, inner)
        noise, latents, mask = self.sampler.tensors(self, clip)
        if handed is not None:
            how = Handing(clip, handed, noise, latents, mask, guider.inner_model, lead, values, inner)
            HANDS[self.hand](how)
            latents, mask = how.latents, how.mask
            guider = guider if how.x is None else Pinned(guider, how.x)
        seed = self.extra_args.get("seed")
        extra = {**self.extra_args, "model_options": options, "seed": mix(seed or 0, clip.index) if clip.index else seed}
        made = self.sampler.inner.sample(guider, self.sigmas, extra, self._ticking(clip), noise, latents, mask, self.quiet)
        if not torch.isfinite(made).all():
            raise ForcingError(f"Clip {clip.index + 1} came out as NaN or infinite. Load the model in bf16 instead of fp16 or "
                               "fp8_fast, and check LoRA strengths.")
        if not clip.index:
            self.reference = made[:, :, :lead]
        return made[:, :, lead:]

    def cut(self, whole: Tensor, clip: Clip) -> Tensor:
        """The clip's part of latents of the video, the reference in front."""
        first = self.kind.lead + clip.first
        part = whole[:, :, first:first + clip.frames]
        return torch.cat([whole[:, :, :self.kind.lead], part], dim=2) if self.kind.lead else part

    def _ticking(self, clip: Clip):
        """The callback of a solver: steps of all clips, or of one where there is no end."""
        if self.callback is None:
            return None
        done = clip.index % self.count * self.steps

        def tick(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            self.callback(done + min(step, self.steps - 1), x0, x, self.count * self.steps)
        return tick

    def show(self, whole: Tensor) -> None:
        """The last tick of several clips again, with all frames, for outputs that are made of it."""
        if self.callback is not None and self.count > 1:
            self.callback(self.count * self.steps - 1, whole, whole, self.count * self.steps)


def _frames(noise: Tensor, lead: int) -> int:
    if noise.ndim != 5 or noise.shape[2] <= lead:
        raise ForcingError(f"A video latent [batch, channels, frames, height, width] is needed, not {list(noise.shape)}. "
                           "Connect the LATENT of the node that makes the conditioning.")
    return noise.shape[2] - lead


def _check_sigmas(sigmas: Tensor) -> None:
    if len(sigmas) < 2 or float(sigmas[-1]) > 0:
        raise ForcingError("A clip has to be finished before the next one goes on from it, so the SIGMAS must end with 0. Do "
                           "not split them over two samplers.")
