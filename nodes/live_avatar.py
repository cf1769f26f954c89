"""Forcing Live Avatar: Wan 2.2 S2V made autoregressive by the published LoRA, over a MODEL of any loader."""
from __future__ import annotations

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..forcing_core.checkpoints.live_avatar import live_avatar_lora
from ..forcing_core.checkpoints.lora import to_comfy
from ..forcing_core.presets import get
from .common import CATEGORY
from .loading import prepared

SYSTEM = "live-avatar"


class ForcingLiveAvatar(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingLiveAvatar",
            display_name="Forcing Live Avatar",
            category=CATEGORY,
            description="Live Avatar: a picture that speaks, block by block and without an end. Puts its LoRA, as published, "
                        "on Wan 2.2 S2V 14B, with the right strength and flow shift.",
            search_aliases=["live avatar", "s2v", "talking head", "audio driven", "lip sync"],
            inputs=[
                io.Model.Input("model", tooltip="Wan 2.2 S2V 14B from Load Diffusion Model, in fp8 or bf16."),
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras"),
                               tooltip="liveavatar.safetensors of Quark-Vision/Live-Avatar, in models/loras. ComfyUI's own "
                                       "LoRA loader does not know that its factors count half."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, advanced=True,
                               tooltip="1.0 is what was published."),
            ],
            outputs=[io.Model.Output(tooltip="Connect to Forcing Guider; the sampler is Forcing Preset with live-avatar.")],
        )

    @classmethod
    def execute(cls, model, lora: str, strength: float = 1.0) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora)
        factors = live_avatar_lora(path, model.model.diffusion_model.state_dict())
        made = comfy.sd.load_lora_for_models(model, None, to_comfy(factors), strength, 0.0)[0]
        return io.NodeOutput(prepared(made, get(SYSTEM).shift))
