"""Forcing Knot: seams that both blocks have seen, and a picture that the video keeps moving towards."""
from __future__ import annotations

import copy
from dataclasses import replace

from comfy_api.latest import io

from ..forcing_core.errors import ForcingError
from ..forcing_core.policies.reference import with_reference
from ..forcing_core.rollout import Knot
from .common import CATEGORY
from .sampler import CausalSampler

CAUSAL = "timestep 0 (causal models)"
PINS = {CAUSAL: "timestep", "timestep of the block (I2V models)": "level"}


class ForcingKnot(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingKnot",
            display_name="Forcing Knot",
            category=CATEGORY,
            description="Knot Forcing for any causal rollout: neighbouring blocks share latent frames, which hides the seams, "
                        "and a reference picture stays in memory, ahead in time, which keeps a face. For portraits above all.",
            search_aliases=["knot forcing", "portrait animation", "running ahead", "reference image", "seam"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From Forcing Preset or Forcing Sampler. A short window (Forcing Cache, 6 "
                                                    "to 9) is what the paper has."),
                io.Int.Input("knot", default=1, min=0, max=64,
                             tooltip="Latent frames that a block shares with the next one, at most a block. Time grows by "
                                     "(block + knot) / block. 0: no knot, only the reference."),
                io.Combo.Input("pin", options=list(PINS), default=CAUSAL, advanced=True,
                               tooltip="How the network learns that the shared frames are given. Text-to-video models: "
                                       "timestep 0. I2V models also get them in their channels for given frames; then the "
                                       "timestep of the block may fit better, and fusing has an effect."),
                io.Boolean.Input("fuse", default=True, advanced=True,
                                 tooltip="On: a shared frame becomes the mean of both blocks' versions, as published. No "
                                         "effect with timestep 0, where the second block keeps the first one's."),
                io.Latent.Input("reference", optional=True,
                                tooltip="The picture to stay close to, from VAE Encode at the size of the video. Needs the "
                                        "policy window, and relative positions for long videos."),
                io.Int.Input("lookahead", default=8, min=1, max=64, advanced=True,
                             tooltip="Latent frames that the reference stands ahead at the beginning. Window and lookahead "
                                     "together should stay within the 21 that most models were trained on."),
                io.Int.Input("stride", default=4, min=1, max=64, advanced=True,
                             tooltip="How far the reference moves on whenever the video has come up to it."),
            ],
            outputs=[io.Sampler.Output(tooltip="The same rollout, with knots and the reference.")],
        )

    @classmethod
    def execute(cls, sampler, knot, pin=CAUSAL, fuse=True, lookahead=8, stride=4, reference=None) -> io.NodeOutput:
        if not isinstance(sampler, CausalSampler):
            raise ForcingError("Only a causal rollout can be knotted. Connect the SAMPLER of Forcing Preset or Forcing "
                               "Sampler.")
        made, options = copy.copy(sampler), sampler.rollout
        if reference is not None:
            made.reference = _latents(reference)
            cache = with_reference(options.cache, made.reference.shape[2], lookahead, stride)
            options = replace(options, cache=cache)
        made.rollout = replace(options, knot=Knot(knot, fuse, PINS[pin]))
        return io.NodeOutput(made)


def _latents(reference: dict):
    """[B, C, r, H, W]; a latent of a picture is one frame."""
    samples = reference["samples"]
    samples = samples.unsqueeze(2) if samples.ndim == 4 else samples
    if samples.ndim != 5:
        raise ForcingError(f"The reference is no latent of a picture: its shape is {list(samples.shape)}. Connect VAE Encode.")
    return samples
