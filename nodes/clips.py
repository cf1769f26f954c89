"""Forcing Clips: bidirectional models (Wan Animate, InfiniteTalk, Wan S2V, I2V) over videos of any length, clip by clip."""
from __future__ import annotations

from comfy.samplers import Sampler
from comfy_api.latest import io

from ..forcing_core.errors import ForcingError
from ..forcing_core.rollout.clips import Clips, latents_of
from .clip_sampler import ClipSampler
from .clip_stream import StreamableClips
from .common import CATEGORY
from .host_clips import REPLACE
from .sampler import CausalSampler

OWN = "the model's own way"


class ForcingClips(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingClips",
            display_name="Forcing Clips",
            category=CATEGORY,
            description="Makes a bidirectional model endless: Wan Animate, InfiniteTalk, Wan S2V and I2V models sample clip "
                        "after clip, and each goes on from the last latents of the one before, which are never decoded and "
                        "encoded again.",
            search_aliases=["long video", "infinitetalk", "wan animate", "s2v extend", "continue motion", "sliding window"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="Any solver of ComfyUI, from KSamplerSelect."),
                io.Int.Input("clip_frames", default=81, min=1, max=1025, step=4,
                             tooltip="Frames of video in a clip, 4n + 1: what the model was trained on. 81 for InfiniteTalk "
                                     "and I2V, 77 for Animate and S2V."),
                io.Int.Input("overlap", default=2, min=0, max=64,
                             tooltip="Latent frames (of 4 frames each) that a clip gets from the one before. InfiniteTalk: 3. "
                                     "S2V is shown the last 19 instead."),
                io.Int.Input("knot", default=0, min=0, max=64,
                             tooltip="Knot Forcing: how many of the overlap both clips make; they become the mean of the "
                                     "two. 1 as published, for Animate and I2V. 0: the first clip's stay."),
                io.Combo.Input("hand_over", options=[OWN, REPLACE], default=OWN, advanced=True,
                               tooltip="How the model learns of the overlap. Replacement works with every model, and less "
                                       "well: the noisy latents are replaced at every step."),
                io.Int.Input("ahead", default=0, min=0, max=64, advanced=True,
                             tooltip="Knot Forcing's running ahead, for Wan Animate: the reference stands so many latent "
                                     "frames behind the clip's end. 0: before its beginning, as the model was trained."),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced with latents of the whole length, or for Forcing "
                                               "Stream.")],
        )

    @classmethod
    def execute(cls, sampler, clip_frames, overlap, knot, hand_over=OWN, ahead=0) -> io.NodeOutput:
        if isinstance(sampler, (CausalSampler, ClipSampler)) or not isinstance(sampler, Sampler):
            raise ForcingError("Clips are made by a solver of ComfyUI, not by a rollout. Connect KSamplerSelect.")
        clips = Clips(latents_of(clip_frames), overlap, knot)
        return io.NodeOutput(StreamableClips(sampler, clips, REPLACE if hand_over == REPLACE else None, ahead))
