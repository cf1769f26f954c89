"""The guider: CFG with a store of its own for every condition, and the stores' memory reserved in time."""
from __future__ import annotations

import math

import comfy.model_patcher
import comfy.samplers
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.latest import io

from ..forcing_core.errors import ForcingError
from .common import CATEGORY
from .host_memory import KEY, reserve


class CausalGuider(comfy.samplers.CFGGuider):
    """ComfyUI's CFGGuider that also reserves the KV stores; the negative prompt may be missing."""

    def __init__(self, model_patcher):
        super().__init__(model_patcher)
        # a copy: other users of the same MODEL must not see our wrapper
        self.model_options = comfy.model_patcher.create_model_options_clone(self.model_options)
        add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, reserve, self.model_options, is_model_options=True)


class ForcingGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingGuider",
            display_name="Forcing Guider",
            category=CATEGORY,
            description="Prompt and guidance for a causal rollout. Every condition keeps its own KV store, and ComfyUI is "
                        "told about that memory before it places the weights.",
            inputs=[
                io.Model.Input("model", tooltip="From Forcing Load Checkpoint or any other loader; LoRAs included."),
                io.Conditioning.Input("positive", tooltip="What the video shows."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="Only used where cfg is not 1. Leave unconnected for distilled models."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="1 for all few-step models (guidance is built in). 3 for the many-step AR teacher. "
                                       "Anything else than 1 doubles time and memory."),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model, positive, cfg, negative=None) -> io.NodeOutput:
        if negative is None and not math.isclose(cfg, 1.0):  # ComfyUI would take zeros for the negative's answer
            raise ForcingError(f"cfg {cfg:g} needs a negative prompt. Connect one, or set cfg to 1.")
        guider = CausalGuider(model)
        conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
        guider.inner_set_conds(conds)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)

