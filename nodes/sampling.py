"""Presets, the sampler with every option, and sigmas."""
from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import RolloutOptions, first_sigmas_of, from_preset, sigmas_of
from ..forcing_core.policies import WindowOptions
from ..forcing_core.presets import get
from ..forcing_core.schedule import levels
from .common import CATEGORY, SYSTEM_TIP, SYSTEMS, Cache
from .sampler import CausalSampler

NOISE = {"per block": "block", "as ComfyUI's AR sampler": "comfy", "reference order": "reference"}
TIMESTEPS = {"1000 x sigma": "exact", "rounded (CausVid)": "round", "truncated (AR teacher)": "floor"}
ACCELERATE = {"off": {}, "joined passes": {"joined": True}, "fused kernels": {"accelerate": "kernels"},
              "CUDA graphs": {"accelerate": "graphs"}, "prefetch paged weights": {"accelerate": "prefetch"},
              "all of these three": {"accelerate": "all"}}
SOLVERS = {"few steps (distilled)": "renoise", "UniPC (AR teacher)": "unipc"}


class ForcingPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingPreset",
            display_name="Forcing Preset",
            category=CATEGORY,
            description="The easiest path: choose the system of your checkpoint and connect SAMPLER and SIGMAS to Sampler "
                        "Custom Advanced. Works with a MODEL from any loader.",
            search_aliases=["self forcing", "longlive", "causal sampler", "autoregressive sampler"],
            inputs=[
                io.Combo.Input("system", options=SYSTEMS, default="self-forcing", tooltip=SYSTEM_TIP),
                Cache.Input("cache", optional=True,
                            tooltip="Replaces the system's own window, sink and positions, for example a 12-frame window "
                                    "with a sink to go past 5 s."),
                io.Boolean.Input("keep_on_interrupt", default=False, advanced=True,
                                 tooltip="On: pressing Cancel returns the blocks finished so far and the graph goes on "
                                         "with them. Off: Cancel stops the graph, as everywhere in ComfyUI."),
            ],
            outputs=[io.Sampler.Output(tooltip="The causal rollout of this system."),
                     io.Sigmas.Output(tooltip="The denoising steps this system was trained on.")],
        )

    @classmethod
    def execute(cls, system: str, keep_on_interrupt: bool = False, cache=None) -> io.NodeOutput:
        preset = get(system)
        options = replace(from_preset(preset, cache), keep_on_interrupt=keep_on_interrupt)
        return io.NodeOutput(CausalSampler(options), torch.tensor(sigmas_of(preset), dtype=torch.float32))


class ForcingSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingSigmas",
            display_name="Forcing Sigmas",
            category=CATEGORY,
            description="Turns a denoising step list into SIGMAS, exactly as the official code warps it.",
            inputs=[
                io.Combo.Input("system", options=["custom", *SYSTEMS], default="custom",
                               tooltip="custom uses the widgets below; a system uses its own published lists."),
                io.String.Input("steps", default="1000, 750, 500, 250",
                                tooltip="Denoising step list: falling whole numbers from 1000 (pure noise) to above 0."),
                io.String.Input("first_block_steps", default="",
                                tooltip="Another list for the first generated block only (Causal Forcing++ uses 1000, 750, "
                                        "500, 250). Empty: the same list."),
                io.Float.Input("shift", default=5.0, min=0.1, max=100.0, step=0.1,
                               tooltip="Flow shift the model was trained with: 5 for most of the family, 8 for CausVid."),
                io.Boolean.Input("warp", default=True, advanced=True,
                                 tooltip="On: the list is warped by the shift (all but CausVid's 3-step model)."),
            ],
            outputs=[io.Sigmas.Output(tooltip="For Sampler Custom Advanced."),
                     io.Sigmas.Output(id="first_block", display_name="FIRST BLOCK",
                                      tooltip="For the first_block_sigmas input of Forcing Sampler.")],
        )

    @classmethod
    def execute(cls, system: str, steps: str, first_block_steps: str, shift: float, warp: bool) -> io.NodeOutput:
        if system != "custom":
            preset = get(system)
            main, first = sigmas_of(preset), first_sigmas_of(preset)
        else:
            main = _sigmas(steps, shift, warp)
            first = _sigmas(first_block_steps, shift, warp)[:-1] if first_block_steps.strip() else None
        return io.NodeOutput(torch.tensor(main), torch.tensor((*first, 0.0) if first else main))


class ForcingSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingSampler",
            display_name="Forcing Sampler",
            category=CATEGORY,
            description="The causal rollout with every option, for checkpoints and schedules that no preset covers.",
            search_aliases=["autoregressive sampler", "causal sampler"],
            inputs=[
                io.Int.Input("block", default=3, min=1, max=64,
                             tooltip="Latent frames denoised together. Must match the checkpoint: 3 for chunkwise models, 1 "
                                     "for framewise ones."),
                Cache.Input("cache", optional=True,
                            tooltip="What past frames each block may see. Unconnected: everything, at absolute positions, "
                                    "which is right up to the training length (21 latent frames)."),
                io.Sigmas.Input("first_block_sigmas", optional=True,
                                tooltip="Sigmas of the first generated block only, from Forcing Sigmas (Causal Forcing++)."),
                io.Boolean.Input("independent_first_frame", default=False, advanced=True,
                                 tooltip="The first frame is a block of its own: only for models trained that way."),
                io.Float.Input("context_timestep", default=0.0, min=0.0, max=1000.0, step=1.0, advanced=True,
                               tooltip="Timestep told to the network in the clean pass that writes a block into memory. 0 as "
                                       "published; small values soften errors carried along. No noise is added."),
                io.Combo.Input("noise", options=list(NOISE), default="per block", advanced=True,
                               tooltip="per block: noise depends on seed, block and step, so a longer video starts with the "
                                       "shorter one and GPU equals CPU. as ComfyUI's AR sampler: reuse seeds of core's node. "
                                       "reference order: draws in the order of the official code."),
                io.Combo.Input("timesteps", options=list(TIMESTEPS), default="1000 x sigma", advanced=True,
                               tooltip="How a sigma becomes the timestep the network is told. CausVid's 3-step list is fed "
                                       "unwarped: choose rounded."),
                io.Combo.Input("solver", options=list(SOLVERS), default="few steps (distilled)", advanced=True,
                               tooltip="UniPC only for the many-step AR teacher of Causal Forcing, with cfg 3."),
                io.Boolean.Input("allow_short_tail", default=False, advanced=True,
                                 tooltip="Let the last block be shorter than the others instead of refusing the length."),
                io.Boolean.Input("keep_on_interrupt", default=False, advanced=True,
                                 tooltip="On: pressing Cancel returns the blocks finished so far and the graph goes on "
                                         "with them. Off: Cancel stops the graph, as everywhere in ComfyUI."),
                io.Combo.Input("accelerate", options=list(ACCELERATE), default="off", advanced=True,
                               tooltip="joined passes: the clean pass of a block and the first pass of the next one in one, "
                                       "which saves a few percent and rounds a little differently. The others are for NVIDIA "
                                       "cards and do nothing elsewhere: fused kernels need Triton and round a little "
                                       "differently too, CUDA graphs pay in long videos with a window, while the model fits "
                                       "into memory; prefetching where it does not (dynamic VRAM)."),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, block, independent_first_frame=False, context_timestep=0.0, noise="per block",
                timesteps="1000 x sigma", solver="few steps (distilled)", allow_short_tail=False, keep_on_interrupt=False,
                accelerate="off", cache=None, first_block_sigmas=None) -> io.NodeOutput:
        first = None if first_block_sigmas is None else tuple(float(s) for s in first_block_sigmas if s > 0)
        return io.NodeOutput(CausalSampler(RolloutOptions(
            block=block, cache=cache or WindowOptions(block=block), independent_first=independent_first_frame,
            first_sigmas=first, context_timestep=context_timestep, noise=NOISE[noise], timesteps=TIMESTEPS[timesteps],
            solver=SOLVERS[solver], allow_tail=allow_short_tail, keep_on_interrupt=keep_on_interrupt,
            **ACCELERATE[accelerate])))


def _sigmas(text: str, shift: float, warp: bool) -> tuple[float, ...]:
    try:
        steps = [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ForcingError(f"'{text}' is not a list of whole numbers. Write for example 1000, 750, 500, 250.") from error
    return tuple(level.sigma for level in levels(steps, shift, warp)) + (0.0,)
