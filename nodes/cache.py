"""The cache policy as a socket of its own, and the picture of what it does."""
from __future__ import annotations

import comfy.sampler_helpers
from comfy_api.latest import io, ui

from ..forcing_core import plan_view
from ..forcing_core.errors import ForcingError
from .cache_inputs import options_of, policy_input
from .common import CATEGORY, Cache
from .host_memory import element_size, shape_of
from .sampler import CausalSampler, given_frames


class ForcingCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingCache",
            display_name="Forcing Cache",
            category=CATEGORY,
            description="What past frames each block may attend to. Memory and time per block are constant once the window "
                        "is full, so the video can be as long as you like.",
            search_aliases=["kv cache", "window", "sink", "long video", "rolling forcing", "reward forcing", "deep forcing",
                            "relax forcing", "memflow"],
            inputs=[policy_input()],
            outputs=[Cache.Output(display_name="cache")],
        )

    @classmethod
    def execute(cls, policy) -> io.NodeOutput:
        return io.NodeOutput(options_of(policy))


class ForcingPlanView(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingPlanView",
            display_name="Forcing Plan View",
            category=CATEGORY,
            description="Draws, before anything runs, which past frames each block attends to, where its sinks stand in time, "
                        "and the exact bytes the KV store will take.",
            search_aliases=["vram estimate", "cache visualizer"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will run: layers, width and compute type set the bytes."),
                io.Sampler.Input("sampler", tooltip="From Forcing Preset or Forcing Sampler."),
                io.Latent.Input("latent", tooltip="The latent that will be sampled: length, size, batch, given frames."),
                io.Int.Input("conditions", default=1, min=1, max=64,
                             tooltip="Conditions with a store of their own: 1 for distilled models, 2 with cfg other than 1."),
            ],
            outputs=[io.Image.Output(tooltip="The picture."),
                     io.String.Output(id="memory", display_name="memory", tooltip="One line with the store's bytes."),
                     io.Int.Output(id="bytes", display_name="bytes", tooltip="The store's bytes as a number.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, sampler, latent, conditions) -> io.NodeOutput:
        if not isinstance(sampler, CausalSampler):
            raise ForcingError("This SAMPLER is not a causal rollout. Connect Forcing Preset or Forcing Sampler.")
        options, samples = sampler.rollout, latent["samples"]
        shape = shape_of(model.model, samples.shape)
        given = given_frames(samples, _full_mask(latent))
        store = plan_view.StoreShape(layers=shape.layers, dim=shape.dim, height=shape.height, width=shape.width,
                                     batch=shape.batch, conditions=conditions,
                                     element_size=element_size(model))
        steps = {} if options.expected is None else {"steps": len(options.expected) - 1}
        table = plan_view.simulate(options.cache, shape.frames, given=given, independent_first=options.independent_first,
                                   **steps)
        image, memory = plan_view.draw(table, store), plan_view.announce(options.cache, shape.frames, store)
        return io.NodeOutput(image, memory.text, memory.bytes, ui=ui.PreviewImage(image, cls=cls))


def _full_mask(latent: dict):
    """The noise mask as a sampler will get it, whatever shape a mask node gave it."""
    mask, samples = latent.get("noise_mask"), latent["samples"]
    return None if mask is None else comfy.sampler_helpers.prepare_mask(mask, samples.shape, samples.device)
